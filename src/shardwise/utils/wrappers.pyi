from shardwise.compat.wrappers import *
