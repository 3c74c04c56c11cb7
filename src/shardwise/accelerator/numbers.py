"""The part of an Accelerator that brings numbers of all ranks together."""

from __future__ import annotations

from typing import Any

from shardwise import operations
from shardwise.accelerator.base import Base
from shardwise.data_loader import gather_for_metrics


class Numbers(Base):
    _flag = False

    def gather(self, tensor: Any) -> Any:
        """Nested tensors of all ranks, concatenated along dim 0. See :func:`shardwise.operations.gather`."""
        self._point_if_due("gather")
        return operations.gather(tensor)

    def gather_for_metrics(self, input_data: Any, use_gather_object: bool = False) -> Any:
        """:meth:`gather`, without what a prepared dataloader repeats: every sample once. See ``docs/data.md``.

        Args:
            input_data: nested tensors with one row (or equally many rows) per sample; or any picklable
                objects: lists with one per sample are joined, and so is each list in a tuple or dict of them.
            use_gather_object: pickle even tensors, for example because the ranks have different shapes. They are
                joined as lists of their rows.

        Raises:
            DataError: two loaders are read at once, and their batches in hand end differently.
        """
        self._point_if_due("gather_for_metrics")
        return gather_for_metrics(input_data, self._steps.tail(), use_gather_object)

    def reduce(self, tensor: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """Nested tensors, summed (``sum``) or averaged (``mean``) over the ranks, times ``scale``.

        Sums of integers and bools are int64, means of them floats. See :func:`shardwise.operations.reduce`.
        """
        self._point_if_due("reduce")
        return operations.reduce(tensor, reduction, scale)

    def pad_across_processes(self, tensor: Any, dim: int = 0, pad_index: Any = 0, pad_first: bool = False) -> Any:
        """Nested tensors, made as long along ``dim`` as the longest of any rank. See
        :func:`shardwise.operations.pad_across_processes`."""
        self._point_if_due("pad_across_processes")
        return operations.pad_across_processes(tensor, dim=dim, pad_index=pad_index, pad_first=pad_first)

    def set_trigger(self) -> None:
        """Raise this rank's flag, for :meth:`check_trigger` to see on every rank."""
        self._flag = True

    def check_trigger(self) -> bool:
        """Has any rank raised its flag since the last check? Lowers all flags. A collective of 8 bytes."""
        self._point_if_due("check_trigger")
        found = operations.largest(float(self._flag)) > 0
        self._flag = False
        return found
