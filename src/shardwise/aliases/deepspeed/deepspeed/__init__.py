"""Shardwise, where a script says ``deepspeed``: see :func:`shardwise.install_as`. The module is Shardwise's own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

if importlib.util.find_spec("shardwise") is None:  # a child that was told of this folder alone
    sys.path.append(str(Path(__file__).resolve().parents[4]))

import shardwise.deepspeed
from shardwise.aliases import forwarding

forwarding.forward()
sys.modules[__name__] = shardwise.deepspeed
