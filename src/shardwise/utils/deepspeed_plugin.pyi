from shardwise.compat.deepspeed_plugin import *
