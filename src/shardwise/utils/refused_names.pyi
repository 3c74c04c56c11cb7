from shardwise.compat.refused_names import *
