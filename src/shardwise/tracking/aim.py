"""Aim."""

from __future__ import annotations

import os
from typing import Any

from shardwise.tracking.base import ClientTracker, on_main_process
from shardwise.tracking.kinds import client
from shardwise.tracking.values import flat, plain, settings, whole_step


class AimTracker(ClientTracker):
    """Aim, in a repository at the logging directory.

    Numbers and strings are tracked; dicts as names joined by ``/``. Aim's own objects go to it as they are.

    Args:
        run_name: the run's name.
        logging_dir: the repository; created if it is not there.
        kwargs: for ``aim.Run``.
    """

    name = "aim"
    requires_logging_directory = True
    writer = ClientTracker.tracker

    def __init__(self, run_name: str, logging_dir: str | os.PathLike[str] | None = ".", **kwargs: Any) -> None:
        super().__init__(run_name, **kwargs)
        self.aim_repo_path = logging_dir

    @on_main_process
    def start(self) -> None:
        self._run = client(self.name).Run(**{"repo": self.aim_repo_path, **self.init_kwargs})
        self._run.name = self.run_name

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the configuration as the run's ``hparams``."""
        self.tracker["hparams"] = settings(values, self.name)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Track values.

        Args:
            kwargs: for ``Run.track``.
        """
        text, step = client(self.name).Text, whole_step(step, self.name)
        for key, value in flat(plain(values, self.name)).items():
            self.tracker.track(text(value) if isinstance(value, str) else value, name=key, step=step, **kwargs)

    @on_main_process
    def log_images(
        self, values: dict[str, Any], step: int | None = None, kwargs: dict[str, dict[str, Any]] | None = None
    ) -> None:
        """Track images.

        Args:
            values: names and images: an array (height × width × channels) or a PIL image, with its caption if it is a
                pair of both; or a list of these.
            kwargs: ``{"aim_image": {...}, "track": {...}}``, for ``aim.Image`` and ``Run.track``.
        """
        image, step = client(self.name).Image, whole_step(step, self.name)
        for_image, for_track = (kwargs or {}).get("aim_image", {}), (kwargs or {}).get("track", {})
        for key, given in values.items():
            made = []
            for one in given if isinstance(given, list) else [given]:
                picture, caption = one if isinstance(one, tuple) else (one, "")
                made.append(image(picture, **{"caption": caption, **for_image}))
            self.tracker.track(made if isinstance(given, list) else made[0], name=key, step=step, **for_track)

    @on_main_process
    def finish(self) -> None:
        """Close the run."""
        if self._run is not None:
            self._run.close()
            self._run = None
