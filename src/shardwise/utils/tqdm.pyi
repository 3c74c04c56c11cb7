from shardwise.compat.tqdm import *
