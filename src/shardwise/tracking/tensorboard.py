"""TensorBoard, through ``torch.utils.tensorboard`` or ``tensorboardX``."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from shardwise.errors import MissingPackage
from shardwise.tracking.base import ClientTracker, on_main_process
from shardwise.tracking.kinds import client
from shardwise.tracking.values import flat, is_number, left_out, pictures, plain, settings, strict, whole_step


class TensorBoardTracker(ClientTracker):
    """Writes event files to ``LOGGING_DIR/RUN_NAME``.

    Numbers become scalars, strings texts, dicts of numbers several lines in one chart. Without a ``step``, calls are
    counted (the client would put them all on step 0).

    Args:
        run_name: the folder's name, below ``logging_dir``.
        logging_dir: created if it is not there.
        kwargs: for ``SummaryWriter``.
    """

    name = "tensorboard"
    requires_logging_directory = True
    writer = ClientTracker.tracker

    def __init__(self, run_name: str, logging_dir: str | os.PathLike[str], **kwargs: Any) -> None:
        super().__init__(run_name, **kwargs)
        self.logging_dir = os.path.join(logging_dir, run_name)

    @on_main_process
    def start(self) -> None:
        self._run = _module().SummaryWriter(self.logging_dir, **self.init_kwargs)

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the configuration as hyperparameters of the run, and in ``hparams.yml``.

        In TensorBoard, nested names are joined by ``/`` and values that are no numbers or texts become texts. The
        file is written as JSON, which is YAML.
        """
        nested = settings(values, self.name)
        short = {k: v if is_number(v) or isinstance(v, str) else str(v) for k, v in flat(nested).items()}
        # Not add_hparams: that opens a second event file, and TensorBoard then stops following the first.
        for summary in _module(".summary").hparams(short, {}):
            self.tracker.file_writer.add_summary(summary)
        self.tracker.flush()
        text = json.dumps(strict(nested), indent=2, allow_nan=False) + "\n"
        Path(self.logging_dir, "hparams.yml").write_text(text, encoding="utf-8")

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log values.

        Args:
            kwargs: for ``add_scalar``, ``add_text`` or ``add_scalars``, whichever a value needs.
        """
        values, step = plain(values, self.name), self._count(whole_step(step, self.name))
        for key, value in values.items():
            if is_number(value):
                self.tracker.add_scalar(key, value, global_step=step, **kwargs)
            elif isinstance(value, str):
                self.tracker.add_text(key, value, global_step=step, **kwargs)
            elif isinstance(value, dict) and all(is_number(v) for v in flat(value).values()):
                self.tracker.add_scalars(key, flat(value), global_step=step, **kwargs)
            else:
                left_out(self.name, key, value, "numbers, texts and dicts of numbers")
        self.tracker.flush()

    @on_main_process
    def log_images(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log images.

        Args:
            values: names and images: a list of arrays (height × width × channels) or PIL images, or a stacked array
                or tensor in the form that ``kwargs["dataformats"]`` says, ``NCHW`` by default.
            kwargs: for ``add_images``.
        """
        step = self._count(whole_step(step, self.name))
        for key, images in values.items():
            batch = pictures(images)
            if isinstance(batch, np.ndarray):
                self.tracker.add_images(key, batch, global_step=step, **kwargs)
                continue
            arrays = [np.asarray(image) for image in batch]
            arrays = [a if a.ndim == 3 else a[..., None] for a in arrays]
            together = len({a.shape for a in arrays}) == 1
            if together:
                self.tracker.add_images(key, np.stack(arrays), global_step=step, **{"dataformats": "NHWC", **kwargs})
            for i, array in enumerate(() if together else arrays):  # of different sizes: one by one
                self.tracker.add_image(f"{key}/{i}", array, global_step=step, **{"dataformats": "HWC", **kwargs})
        self.tracker.flush()

    @on_main_process
    def finish(self) -> None:
        """Close the writer."""
        if self._run is not None:
            self._run.close()
            self._run = None


def _module(part: str = "") -> Any:
    """``torch.utils.tensorboard``, or ``tensorboardX`` where only that is installed; or a part of it."""
    try:
        return client("tensorboard", f"torch.utils.tensorboard{part}")
    except MissingPackage:
        raise
    except ImportError:  # torch's needs tensorboard itself
        return client("tensorboard", f"tensorboardX{part}")
