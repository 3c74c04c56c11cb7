from shardwise.compat.operations import *
