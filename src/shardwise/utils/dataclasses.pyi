from shardwise.compat.dataclasses import *
