"""Comparing versions of installed packages."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from torch.torch_version import TorchVersion

from shardwise.compat.constants import STR_OPERATION_TO_FUNC
from shardwise.errors import ConfigError, MissingPackage


def compare_versions(library_or_version: Any, operation: str, requirement_version: str) -> bool:
    """Does a version stand in a relation to another one?

    Args:
        library_or_version: the name of an installed package, or a version object.
        operation: ``>``, ``>=``, ``==``, ``!=``, ``<=`` or ``<``.
        requirement_version: the other version.

    Raises:
        ConfigError: another operation.
        MissingPackage: the package is not installed.
    """
    if operation not in STR_OPERATION_TO_FUNC:
        raise ConfigError(f"operation={operation!r} is not known", fix=f"one of {' '.join(STR_OPERATION_TO_FUNC)}")
    if isinstance(library_or_version, str) and not isinstance(library_or_version, TorchVersion):
        try:
            library_or_version = importlib.metadata.version(library_or_version)
        except importlib.metadata.PackageNotFoundError:
            raise MissingPackage(
                f"the package '{library_or_version}' is not installed", fix=f"pip install {library_or_version}"
            ) from None
    return bool(STR_OPERATION_TO_FUNC[operation](TorchVersion(str(library_or_version)), requirement_version))


def is_torch_version(operation: str, version: str) -> bool:
    """Does the version of torch stand in a relation to ``version``? See :func:`compare_versions`."""
    return compare_versions("torch", operation, version)
