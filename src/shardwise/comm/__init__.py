"""Collectives over torch.distributed: fixed rank order, counted bytes, faults with a report."""

from shardwise.comm.group import Group, Transfer
from shardwise.comm.mesh import Mesh
from shardwise.comm.stats import CommCount, CommStats
from shardwise.comm.world import World, init

__all__ = ["CommCount", "CommStats", "Group", "Mesh", "Transfer", "World", "init"]
