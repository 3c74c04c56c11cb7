"""A simulated accelerator: ``simulated_device.install()`` gives torch a device type ``sim``. See README.md."""

from __future__ import annotations

from simulated_device.build import NoCompiler, build
from simulated_device.install import install

__all__ = ["NoCompiler", "build", "install"]
