from shardwise.compat.constants import *
