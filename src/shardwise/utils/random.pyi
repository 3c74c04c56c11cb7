from shardwise.compat.random import *
