from shardwise.compat.object_files import *
