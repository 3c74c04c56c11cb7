"""The words of the command line, as values. Nothing here imports torch, so a wrong request is refused at once."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

from shardwise.errors import CheckpointError, ConfigError, MissingPackage
from shardwise.sizes import parse_bytes

_WORDS = {"auto": "auto", "split": "split", "disk": {"": "disk"}, "cpu": {"": "cpu"}}
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16", "float": "float32"}
_DTYPES |= {name: name for name in ("auto", "bfloat16", "float16", "float32", "float64")}
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "vocab.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "*.tiktoken",
)  # fmt: skip


def check_folder(folder: Path) -> None:
    """Is there a model, and what runs it?

    Raises:
        CheckpointError: there is none.
        MissingPackage: transformers is not installed.
    """
    if not folder.is_dir():
        raise CheckpointError("is no folder", where=str(folder), fix="give the folder that save_pretrained wrote")
    if not (folder / "config.json").is_file():
        raise CheckpointError("has no config.json", where=str(folder), fix="give the folder that save_pretrained wrote")
    if importlib.util.find_spec("transformers") is None:
        raise MissingPackage("'shardwise generate' needs transformers, which is not installed",
                             fix="pip install transformers")  # fmt: skip


def check_tokenizer(folder: Path) -> None:
    """Are there files of a tokenizer?

    Raises:
        CheckpointError: there are none.
    """
    if not any(any(folder.glob(name)) for name in _TOKENIZER_FILES):
        raise CheckpointError(
            "has no tokenizer, so that text cannot be made tokens",
            where=str(folder),
            fix="save one there (tokenizer.save_pretrained), or give tokens: --ids \"1 2 3\", or 'ids' in --prompts",
        )


def parse_map(text: str) -> str | dict[str, Any]:
    """``auto``, ``split``, ``disk``, ``cpu``, or JSON, as :func:`shardwise.load` takes it.

    Raises:
        ConfigError: it is none of these.
    """
    if text in _WORDS:
        return _WORDS[text]  # type: ignore[return-value]
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    places = found.values() if isinstance(found, dict) else ()
    if not places or not all(isinstance(at, str | int) and not isinstance(at, bool) for at in places):
        raise ConfigError(
            f"--device-map {text} is not known",
            fix='auto, split, disk, cpu, or JSON from names of modules to places: \'{"": "disk", "lm_head": "cpu"}\'',
        )
    return dict(found)


def parse_memory(text: str | None, device_map: str | dict[str, Any]) -> dict[int | str, int | str] | None:
    """``cpu=8GiB,0=20GiB`` as a dict.

    Raises:
        ConfigError: it is something else, or the map says already where everything is.
    """
    if text is None:
        return None
    if not isinstance(device_map, str):
        raise ConfigError("--max-memory has no meaning with a map that gives every place",
                          fix="--device-map auto or split, or leave --max-memory out")  # fmt: skip
    out: dict[int | str, int | str] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if not (name == "cpu" or name.isdigit()) or parse_bytes(size) is None or name in out:
            raise ConfigError(f"--max-memory {text}: {part.strip() or 'an empty part'} is not PLACE=SIZE",
                              fix="cpu=8GiB,0=20GiB: 'cpu' or the number of a device each")  # fmt: skip
        out[name] = size
    return out


def parse_dtype(text: str | None) -> str | None:
    """The name that torch has for a dtype, or ``auto``.

    Raises:
        ConfigError: it is no dtype that models run in.
    """
    if text is not None and text not in _DTYPES:
        raise ConfigError(f"--dtype {text} is not known", fix=f"one of {', '.join(_DTYPES)}")
    return None if text is None else _DTYPES[text]


def check_quantization(text: str | None) -> None:
    """It is ``int8``, or nothing was said.

    Raises:
        ConfigError: it is another word.
    """
    if text not in (None, "int8"):
        raise ConfigError(f"--quantization {text} is not known", fix="int8")


def sampling_of(temperature: float | None, top_p: float | None, greedy: bool) -> dict[str, Any]:
    """Arguments of ``model.generate``. Where nothing was said, the model's own configuration decides.

    Raises:
        ConfigError: they contradict each other, or are no such numbers.
    """
    if greedy and (temperature is not None or top_p is not None):
        raise ConfigError("--greedy draws nothing, so that --temperature and --top-p mean nothing",
                          fix="give one or the others")  # fmt: skip
    if greedy:
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "num_beams": 1}
    if temperature is not None and not 0 < temperature < float("inf"):
        raise ConfigError(f"--temperature {temperature:g} is not above 0", fix="--greedy takes the likeliest token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"--top-p {top_p:g} is not above 0 and at most 1", fix="0.9, for example")
    out = {"temperature": temperature, "top_p": top_p}
    said = {name: value for name, value in out.items() if value is not None}
    return {"do_sample": True, "num_beams": 1, **said} if said else {}


def check_counts(**counts: int | None) -> None:
    """All that are given are 1 or more.

    Raises:
        ConfigError: one is not.
    """
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value} is not 1 or more", fix="give 1 or more")
