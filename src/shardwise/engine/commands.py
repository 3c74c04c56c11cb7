"""What an engine does that all its ranks have to do: one table, for ranks with data and for those without.

A rank with data comes to these through its forward and backward; a rank whose data has ended
(:mod:`shardwise.engine.join`) is told which comes next and gives it to :meth:`Engine.execute`.
"""

from __future__ import annotations

from enum import Enum


class Command(Enum):
    """One thing that needs every rank. In brackets: its arguments."""

    BUFFERS = "buffers"  # rank 0's for everyone, before a forward
    GATHER = "gather"  # [units] bring their values, in one message
    BACKWARD = "backward"  # [gradients, settings] a backward begins
    REDUCE = "reduce"  # [unit] start its reduce
    BACKWARD_ENDS = "backward ends"  # [gather_log] the rest of the reduces, and the exchange
    ABANDON = "abandon"  # the last backward ended in an exception
    SCALE = "scale"  # [factor] multiply all gradients
    VALUES = "values"  # [unit, bucket, kind] bring master values or gradients together
    # --- across models; their tensors are named by addresses
    NORMS = "norms"  # [addresses, norm type]
    MULTIPLY = "multiply"  # [addresses, factor]
    CLAMP = "clamp"  # [addresses, bound]
    OPERATION = "operation"  # [name, many, addresses, args, kwargs] torch's own, on gradients
    STEP = "step"  # [optimizer, gradients, settings]
    GRADS = "grads"  # [bucket] gradients that the script changed by hand
