from shardwise.compat.enums import *
