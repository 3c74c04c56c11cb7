from shardwise.compat.offload import *
