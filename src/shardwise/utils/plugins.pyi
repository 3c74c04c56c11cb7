from shardwise.compat.plugins import *
