"""Lightning over the sharding engine: its Trainer and Fabric, their loops and plugins as they are.

::

    from shardwise.lightning import ShardwiseStrategy

    trainer = lightning.Trainer(strategy=ShardwiseStrategy("zero3"), accelerator="cpu", devices=2)
    fabric = lightning.Fabric(strategy=ShardwiseStrategy("zero3"), accelerator="cpu", devices=2)

A module keeps its class and its parameters, which are sharded in place; it stays sharded when a fit is over. See
:class:`ShardwiseStrategy` for the arguments, and :func:`export_checkpoint` for ``load_from_checkpoint``.
"""

from shardwise.lightning.checkpoints import export as export_checkpoint
from shardwise.lightning.trainer import ShardwiseStrategy

__all__ = ["ShardwiseStrategy", "export_checkpoint"]
