from shardwise.compat.memory import *
