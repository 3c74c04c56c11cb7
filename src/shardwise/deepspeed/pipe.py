"""Names of ``deepspeed.pipe``, for scripts that ask ``isinstance(model, PipelineModule)``: pipelines are left out."""

from __future__ import annotations

from typing import Any

from shardwise.deepspeed.refused import error


class _LeftOut:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise error("pipe")


class PipelineModule(_LeftOut):
    """No model is one."""


class LayerSpec(_LeftOut):
    """Cannot be made."""


class TiedLayerSpec(LayerSpec):
    """Cannot be made."""
