"""A model of transformers without values, from its folder's configuration."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from shardwise.errors import CheckpointError
from shardwise.inference.meta import init_empty_weights


def model_of(folder: str | os.PathLike[str], dtype: torch.dtype | None) -> nn.Module:
    """The module that a Hugging Face folder's ``config.json`` describes: parameters on meta, buffers with values.

    Args:
        dtype: of the buffers that it computes; ``None``: as the configuration says.

    Raises:
        CheckpointError: no configuration, one without an architecture, or transformers is missing or too old for it.
    """
    path = Path(folder)
    file = path / "config.json"
    try:
        text = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no configuration of a model ({type(error).__name__})",
            where=str(file),
            fix="give the folder that save_pretrained wrote, or a module and checkpoint=",
        ) from error
    names = text.get("architectures") if isinstance(text, dict) else None
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError(
            "a folder of transformers, which is not installed", fix="pip install transformers"
        ) from error
    known = [getattr(transformers, name, None) for name in names or ()]
    if not known or known[0] is None:
        raise CheckpointError(
            f"its architectures are {names}, which transformers {transformers.__version__} does not have",
            where=str(file),
            fix="install the version of transformers that wrote it, or give a module and checkpoint=",
        )
    kind: Any = known[0]
    with _readable(file):
        config = transformers.AutoConfig.from_pretrained(path)
    wanted = getattr(config, "dtype", None) if dtype is None else dtype
    model: Any
    before = torch.get_default_dtype()
    torch.set_default_dtype(wanted if isinstance(wanted, torch.dtype) and wanted.is_floating_point else before)
    try:
        with init_empty_weights(), _without_drawing():
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # on meta nobody has
    if (path / "generation_config.json").is_file() and hasattr(model, "generation_config"):
        with _readable(path / "generation_config.json"):
            model.generation_config = transformers.GenerationConfig.from_pretrained(path)
    return cast(nn.Module, model)


def _without_drawing() -> AbstractContextManager[None]:
    """Initial values that nobody will see take most of the time in which a small model is made."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # it was elsewhere once, and only saves time
        return nullcontext()
    return cast("AbstractContextManager[None]", no_init_weights())


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Around what transformers reads: what it finds wrong there is said as ours."""
    from huggingface_hub.errors import StrictDataclassError

    try:
        yield
    except CheckpointError:  # a ValueError too
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        said = " ".join(str(error).split())
        raise CheckpointError(
            f"transformers cannot read it: {said}", where=str(file), fix="use another copy of the file"
        ) from error
