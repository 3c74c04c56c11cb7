"""Probes for DeepSpeed's extensions. Nothing is compiled here: the answer says whether what one is for works."""

from __future__ import annotations

from typing import Any

from shardwise.errors import LeftOut

_SERVED = {
    "AsyncIOBuilder": "async_io",
    "CPUAdagradBuilder": "cpu_adagrad",
    "CPUAdamBuilder": "cpu_adam",
    "CPULionBuilder": "cpu_lion",
    "FusedAdamBuilder": "fused_adam",
    "FusedLambBuilder": "fused_lamb",
    "FusedLionBuilder": "fused_lion",
}
_LEFT_OUT = {
    "EvoformerAttnBuilder": "evoformer_attn",
    "FPQuantizerBuilder": "fp_quantizer",
    "GDSBuilder": "gds",
    "InferenceBuilder": "transformer_inference",
    "InferenceCoreBuilder": "inference_core_ops",
    "InferenceCutlassBuilder": "cutlass_ops",
    "QuantizerBuilder": "quantizer",
    "RaggedOpsBuilder": "ragged_device_ops",
    "RaggedUtilsBuilder": "ragged_ops",
    "RandomLTDBuilder": "random_ltd",
    "SparseAttnBuilder": "sparse_attn",
    "SpatialInferenceBuilder": "spatial_inference",
    "StochasticTransformerBuilder": "stochastic_transformer",
    "TransformerBuilder": "transformer",
}
COMPATIBLE = dict.fromkeys(_SERVED.values(), True) | dict.fromkeys(_LEFT_OUT.values(), False)
__all__ = ["COMPATIBLE", "OpBuilder"]


class OpBuilder:
    """One extension of DeepSpeed. Scripts ask for it before they use what it is for.

    Attributes:
        NAME: its key in ``ops.__compatible_ops__``.
    """

    NAME = ""

    def is_compatible(self, verbose: bool = False) -> bool:
        """Does what the extension is for (an optimizer, states on a disk) work here?"""
        return COMPATIBLE[self.NAME]

    def load(self, verbose: bool = False) -> Any:
        """Raises LeftOut: there is no extension to load."""
        raise LeftOut(
            f"the extension '{self.NAME}' of DeepSpeed is left out",
            where="shardwise.deepspeed.ops.op_builder",
            fix="use the optimizers of shardwise.deepspeed.ops, and zero_optimization.offload_* for a host or a disk",
        )


def __getattr__(name: str) -> type[OpBuilder]:
    key = _SERVED.get(name) or _LEFT_OUT.get(name)
    if key is None:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    made = type(name, (OpBuilder,), {"NAME": key, "__module__": __name__})
    globals()[name] = made
    return made
