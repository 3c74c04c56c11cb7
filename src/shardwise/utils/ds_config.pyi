from shardwise.compat.ds_config import *
