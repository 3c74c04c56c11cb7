from shardwise.compat.versions import *
