"""Models that do what real ones do to an engine: small, and each with one thing of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

D = 8


class Mlp(nn.Module):
    def __init__(self, n: int = 3, **kw: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(n))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


class TiedAcrossUnits(Mlp):
    def __init__(self) -> None:
        super().__init__()
        self.layers[2].weight = self.layers[0].weight


class Lora(nn.Module):
    """Frozen base, trainable adapters; the first frozen layer is needed after the last adapter gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(D, D)
        self.blocks = nn.ModuleList()
        for _ in range(3):
            self.blocks.append(LoraBlock())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x)
        for b in self.blocks:
            x = b(x)
        return x


class LoraBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(D, D).requires_grad_(False)
        self.base = nn.Linear(D, D, dtype=torch.bfloat16).requires_grad_(False)
        self.a = nn.Linear(D, 2, bias=False)
        self.b = nn.Linear(2, D, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(x))
        return x + self.base(x.bfloat16()).float() + self.b(self.a(x))


class MixedDtypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for _ in range(2):
            layer = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D, dtype=torch.float64))
            self.layers.append(Cast(layer))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Cast(nn.Module):
    def __init__(self, pair: nn.Module) -> None:
        super().__init__()
        self.pair = pair

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.pair[1](self.pair[0](x).double()).float())


class OddSizes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.none = nn.Parameter(torch.empty(0))
        self.layers = nn.ModuleList(nn.Linear(k, k + 2) for k in (1,))
        self.layers.append(nn.Linear(3, 7))
        self.one = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[1](self.layers[0](x[:, :1])) * self.gain + self.one


class Twice(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(super().forward(x))


@dataclasses.dataclass
class Out:
    first: torch.Tensor
    rest: dict[str, Any]


class Opaque:
    def __init__(self, value: torch.Tensor) -> None:
        self.value = value


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(NestedBlock() for _ in range(3))

    def forward(self, x: torch.Tensor) -> Any:
        out = Out(x, {"extra": (Opaque(x), [x])})
        for layer in self.layers:
            out = layer(out, scale=2.0)
        return out


class NestedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.side = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, out: Out, scale: float) -> Out:
        x = self.lin(out.first) + out.rest["extra"][0].value
        return Out(torch.tanh(x), {"extra": (Opaque(self.side(x) * scale), [None, x])})


class SkipsUnits(Mlp):
    """Uses layer 1 in even steps only."""

    step = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers[0](x)
        if self.step % 2 == 0:
            x = torch.tanh(self.layers[1](x))
        return self.layers[2](x)


class DirectUse(nn.Module):
    """A tied head by function, and a parameter of a child used without calling the child."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(D, 40, bias=False)
        self.blocks = nn.ModuleList(nn.Linear(40, 40) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.embed(x)
        for b in self.blocks:
            h = torch.tanh(b(h))
        return F.linear(h, self.embed.weight.t()) + F.linear(h, self.blocks[0].weight).mean(-1, keepdim=True)


class Checkpointed(Mlp):
    reentrant = False
    group = 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_() if self.reentrant else x
        for layer in self.layers:
            x = checkpoint(lambda y, layer=layer: torch.tanh(layer(y)), x, use_reentrant=self.reentrant)
        return x


class Reentrant(Checkpointed):
    reentrant = True


class ReentrantTwice(Checkpointed):
    """One unit under two reentrant checkpoints: its gradients arrive twice in one backward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        for layer in [*self.layers, self.layers[0], self.layers[1]]:
            x = checkpoint(lambda y, layer=layer: torch.tanh(layer(y)), x, use_reentrant=True)
        return x


class InsideCheckpoint(nn.Module):
    """The unit is the outer module and checkpoints its own inside."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Checkpointed(2) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(D, D), nn.LayerNorm(D), nn.Linear(D, D))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Moe(nn.Module):
    """An auxiliary loss left on the module, outside any output."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(AuxBlock() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class AuxBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin, self.gate = nn.Linear(D, D), nn.Linear(D, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.aux = self.gate(x).square().mean()
        return torch.tanh(self.lin(x))


class Branches(Mlp):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chosen = self.layers[1 + self.which % 2]
        return chosen(torch.tanh(self.layers[0](x)))


class Unrepeated(nn.Module):
    """No repeated blocks: cut by size. Large enough for that, and odd enough to need it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(D, 512), nn.Tanh(), nn.Linear(512, 600))
        self.middle = nn.Bilinear(60, 60, 128)
        self.last = nn.ModuleDict({"a": nn.Linear(600, 600), "b": nn.Linear(728, 1)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.first(x))
        h = torch.cat([torch.tanh(self.last["a"](h)), self.middle(h[:, :60], h[:, 60:120])], dim=1)
        return self.last["b"](h)
