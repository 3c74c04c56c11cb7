from shardwise.compat.fsdp_utils import *
