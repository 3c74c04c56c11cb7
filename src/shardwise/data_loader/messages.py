"""One batch, or any object, as bytes for another rank.

Tensors travel as they lie in memory, behind a pickle of everything around them. So a batch may have any shape,
nesting and classes, and nothing is announced about it beforehand.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Sequence
from typing import Any

import torch

from shardwise.comm import World, objects
from shardwise.comm.group import Group
from shardwise.comm.stats import Op
from shardwise.errors import DataError

_ALIGN = 64  # a view of another dtype needs an aligned start
_TIMEOUT = 600.0
# Tags below 8 are not used by units; operations use 0.
_HEADER, _BODY = Op("dispatch", "a batch's header", 1), Op("dispatch", "a batch", 2)
_RAGGED = Op("gather", "a ragged round", 3)


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[torch.Tensor] = []
        self.notes: list[tuple[int, torch.dtype, tuple[int, ...]]] = []
        self.end = 0

    def persistent_id(self, obj: Any) -> int | None:
        if type(obj) is not torch.Tensor or obj.layout is not torch.strided or obj.is_quantized:
            return None
        tensor = obj.detach().cpu().resolve_conj().resolve_neg().contiguous()
        self.tensors.append(tensor)
        self.notes.append((self.end, tensor.dtype, tuple(tensor.shape)))
        self.end += -(-tensor.numel() * tensor.element_size() // _ALIGN) * _ALIGN
        return len(self.tensors) - 1


class _Unpacker(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[torch.Tensor]) -> None:
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, pid: Any) -> torch.Tensor:
        return self.tensors[pid]


def pack(item: Any) -> torch.Tensor:
    """``item`` as bytes: ``(n,)`` of uint8, on the CPU.

    Raises:
        DataError: something in it cannot be pickled.
    """
    file = io.BytesIO()
    packer = _Packer(file)
    try:
        packer.dump(item)
    except (pickle.PicklingError, TypeError, AttributeError) as error:
        raise DataError(
            f"a batch cannot be sent to other ranks: {error}",
            fix="let collate_fn return tensors, numbers, strings, lists, dicts and classes that pickle can name; "
            "or pass dispatch_batches=False",
        ) from error
    text = file.getvalue()
    about = pickle.dumps((len(text), packer.notes))
    ahead = 8 + len(about) + len(text)
    ahead += -ahead % _ALIGN
    out = torch.empty(ahead + packer.end, dtype=torch.uint8)
    head = len(about).to_bytes(8, "big") + about + text
    out[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    for (start, _, _), tensor in zip(packer.notes, packer.tensors, strict=True):
        data = tensor.reshape(-1).view(torch.uint8)
        out[ahead + start : ahead + start + data.numel()] = data
    return out


def unpack(data: torch.Tensor) -> Any:
    """The item that :func:`pack` was given. Its tensors share the memory of ``data``."""
    raw = data.numpy()
    size = int.from_bytes(raw[:8].tobytes(), "big")
    length, notes = pickle.loads(raw[8 : 8 + size].tobytes())
    ahead = 8 + size + length
    text = raw[8 + size : ahead].tobytes()
    ahead += -ahead % _ALIGN
    tensors = []
    for start, dtype, shape in notes:
        count = torch.Size(shape).numel() * dtype.itemsize
        part = data[ahead + start : ahead + start + count]
        tensors.append(part.view(dtype).view(shape) if count else torch.empty(shape, dtype=dtype))
    return _Unpacker(io.BytesIO(text), tensors).load()


def _group() -> Group:
    return World.current().control_group(_TIMEOUT)


BATCH, END, FAILED = 0, 1, 2


class Channel:
    """From rank 0 to every other rank: one message per rank and round, of about a batch's bytes.

    Args:
        token: tells loaders apart; equal on all ranks.
    """

    def __init__(self, token: int) -> None:
        self.token = token
        self.run = self.number = 0
        self._sending: list[tuple[list[object], Op, list[torch.Tensor]]] = []

    def begin(self) -> None:
        """Begin another iteration."""
        self.run += 1
        self.number = 0

    def send(self, items: Sequence[tuple[int, Any]], kind: int = BATCH) -> None:
        """Start sending ``(rank, item)`` pairs, after those of the round before have arrived.

        Raises:
            DataError: an item cannot be pickled. Then nothing was sent.
        """
        bodies = [(rank, pack(item)) for rank, item in items]
        if not bodies:
            return
        self.flush()
        group = _group()
        for rank, body in bodies:
            head = torch.tensor([self.token, self.run, self.number, kind, body.numel()])
            self._sending.append((group.exchange([(head, rank)], [], _HEADER), _HEADER, [head]))
            self._sending.append((group.exchange([(body, rank)], [], _BODY), _BODY, [body]))

    def flush(self) -> None:
        """Wait for what is being sent."""
        sending, self._sending = self._sending, []
        for works, op, _ in sending:
            _group().wait(works, op)

    def receive(self) -> tuple[int, Any]:
        """This rank's next message: its kind and item.

        Raises:
            DataError: rank 0 reads another loader, or another iteration of this one.
        """
        group = _group()
        while True:
            head = torch.empty(5, dtype=torch.int64)
            group.wait(group.exchange([], [(head, 0)], _HEADER), _HEADER)
            token, run, number, kind, size = head.tolist()
            body = torch.empty(size, dtype=torch.uint8)
            group.wait(group.exchange([], [(body, 0)], _BODY), _BODY)
            if token == self.token and run < self.run:
                continue  # this rank left an earlier loop before rank 0 did
            if (token, run, number) != (self.token, self.run, self.number):
                other = "another dataloader" if token != self.token else f"iteration {run}, batch {number}"
                raise DataError(
                    f"rank 0 sent {other} while this rank reads iteration {self.run}, batch {self.number} of one",
                    where=f"rank {World.current().rank}",
                    fix="read dispatched dataloaders in the same order on every rank, or pass dispatch_batches=False",
                )
            self.number += 1
            return kind, unpack(body)


def exchange(item: Any, ranks: Sequence[int]) -> list[Any]:
    """Any picklable object from each of ``ranks``, in that order; only they call this. Tensors come on the CPU.

    Cost: see :func:`shardwise.comm.objects.exchange`.
    """
    if len(ranks) == 1:
        return [item]
    return [unpack(row) for row in objects.exchange(pack(item), objects.among(_group(), ranks, _RAGGED))]
