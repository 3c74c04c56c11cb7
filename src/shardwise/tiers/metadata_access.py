"""What may be asked of a tensor whose values are elsewhere: the part of a ``__torch_function__`` that guards share."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

METADATA_ATTRIBUTES = frozenset({
    "shape", "dtype", "device", "layout", "requires_grad", "grad", "grad_fn", "is_leaf", "ndim", "names", "itemsize",
    "nbytes", "is_cpu", "is_cuda", "is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "is_xpu", "is_mps",
    "is_xla", "is_sparse_csr", "is_ipu", "is_mtia", "is_maia", "is_vulkan", "_version", "_base", "_grad",
})  # fmt: skip
"""Attributes that do not look at values."""
METADATA_METHODS = frozenset({
    "size", "dim", "numel", "nelement", "ndimension", "is_floating_point", "is_complex", "element_size", "get_device",
    "is_inference", "is_same_size", "is_signed", "__hash__", "__len__", "__format__",
})  # fmt: skip
"""Functions and methods that do not."""


def accessed(
    func: Any, attributes: Set[str] = METADATA_ATTRIBUTES, methods: Set[str] = METADATA_METHODS
) -> tuple[str, bool]:
    """(name, whether it looks at metadata only) of what a ``__torch_function__`` was called for."""
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        name = getattr(getattr(func, "__self__", None), "__name__", "")
        return name, name in attributes
    return name, name in methods
