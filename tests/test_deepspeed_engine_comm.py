"""``deepspeed.comm``: the calls that scripts make beside their engine."""

from __future__ import annotations

import pytest
import torch

import shardwise.deepspeed as deepspeed
from models import rank, world
from ranks import run
from shardwise.deepspeed import comm


def calls():
    deepspeed.init_distributed()
    deepspeed.init_distributed(dist_backend="gloo", timeout=30.0)  # a second time: nothing
    try:
        assert comm.is_initialized()
        assert (comm.get_rank(), comm.get_world_size()) == (rank(), world())
        assert comm.get_all_ranks_from_group() == list(range(world()))
        assert comm.get_global_rank(comm.get_world_group(), world() - 1) == world() - 1
        mine = torch.tensor([1.0 + comm.get_rank()])
        total = mine.clone()
        comm.all_reduce(total)
        most = mine.clone()
        comm.all_reduce(most, op=comm.ReduceOp.MAX)
        first = mine.clone()
        comm.broadcast(first, src=0)
        parts = [torch.zeros(1) for _ in range(world())]
        comm.all_gather(parts, mine)
        flat = torch.zeros(world())
        comm.all_gather_into_tensor(flat, mine[0])  # a number
        objects = [None] * world()
        comm.all_gather_object(objects, {"rank": rank()})
        comm.barrier()
        return [float(total), float(most), float(first), [float(p) for p in parts], flat.tolist(), len(objects)]
    finally:
        if world() == 1:
            comm.destroy_process_group()


@pytest.mark.parametrize("ranks", [1, 2])
def test_collectives(ranks):
    each = [1.0 + r for r in range(ranks)]
    for found in run(ranks, calls):
        assert found == [sum(each), each[-1], 1.0, each, each, ranks]
