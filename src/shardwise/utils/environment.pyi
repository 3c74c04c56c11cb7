from shardwise.compat.environment import *
