from shardwise.compat.deepspeed import *
