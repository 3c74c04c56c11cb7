from shardwise.compat.modeling import *
