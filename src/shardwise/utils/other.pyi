from shardwise.compat.other import *
