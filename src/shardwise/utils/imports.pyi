from shardwise.compat.imports import *
