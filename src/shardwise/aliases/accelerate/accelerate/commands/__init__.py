"""``accelerate.commands``: its parts are :mod:`shardwise.cli.accelerate_commands`."""
