"""Names of Accelerate in transformers' own module that a Trainer calls with objects of ours."""

from __future__ import annotations

from functools import wraps
from typing import Any

from shardwise.data_loader import PreparedLoader, skip_first_batches


def serve(module: Any) -> None:
    """Let ``skip_first_batches`` in transformers' trainer take prepared loaders of either library.

    Loaders of Accelerate go to Accelerate as before, so a plain ``Trainer`` in the same process is not concerned.

    Args:
        module: ``transformers.trainer``.
    """
    theirs = module.skip_first_batches
    if theirs is skip_first_batches or getattr(theirs, "_serves_shardwise", False):
        return

    @wraps(theirs)
    def skip(dataloader: Any, num_batches: int = 0) -> Any:
        chosen = skip_first_batches if isinstance(dataloader, PreparedLoader) else theirs
        return chosen(dataloader, num_batches)

    skip._serves_shardwise = True  # type: ignore[attr-defined]
    module.skip_first_batches = skip
