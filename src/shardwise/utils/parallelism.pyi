from shardwise.compat.parallelism import *
