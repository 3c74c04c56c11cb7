"""``deepspeed.ops.aio``: whether states on a disk are served is what its builder is asked."""

from __future__ import annotations

from shardwise.deepspeed.ops import op_builder

AsyncIOBuilder = op_builder.__getattr__("AsyncIOBuilder")
