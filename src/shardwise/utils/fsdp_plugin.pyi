from shardwise.compat.fsdp_plugin import *
