"""MLflow, through its fluent interface, so that the script's own ``mlflow`` calls reach the same run."""

from __future__ import annotations

import json
import os
from typing import Any

from shardwise.errors import TrackerError
from shardwise.tracking.base import ClientTracker, on_main_process
from shardwise.tracking.kinds import client
from shardwise.tracking.values import flat, is_number, left_out, logger, plain, settings, whole_step


class MLflowTracker(ClientTracker):
    """MLflow. The variables ``MLFLOW_EXPERIMENT_NAME``, ``MLFLOW_RUN_ID``, ``MLFLOW_TAGS`` and ``MLFLOW_NESTED_RUN``
    win over the arguments, as in Accelerate; ``MLFLOW_TRACKING_URI`` is the client's own.

    Numbers, and dicts of numbers, become metrics. Without a ``step``, calls are counted (the client would put them all
    on step 0).

    Args:
        experiment_name: created if there is none of that name; the project's name.
        logging_dir: where artifacts of a new experiment go; the client's choice by default.
        run_id: continue this run.
        tags: of a new experiment and of the run; a dict, or JSON.
        nested_run: below the run that is active.
        run_name, description: of a new run.
    """

    name = "mlflow"
    active_run = ClientTracker.tracker

    def __init__(
        self,
        experiment_name: str | None = None,
        logging_dir: str | os.PathLike[str] | None = None,
        run_id: str | None = None,
        tags: dict[str, Any] | str | None = None,
        nested_run: bool = False,
        run_name: str | None = None,
        description: str | None = None,
    ) -> None:
        super().__init__(run_name)
        self.experiment_name = os.environ.get("MLFLOW_EXPERIMENT_NAME", experiment_name)
        self.logging_dir = None if logging_dir is None else os.fspath(logging_dir)
        self.run_id = os.environ.get("MLFLOW_RUN_ID", run_id)
        self.tags = _tags(os.environ.get("MLFLOW_TAGS", tags))
        nested = os.environ.get("MLFLOW_NESTED_RUN")
        self.nested_run = nested_run if nested is None else nested.lower() in ("1", "true", "yes", "on", "y", "t")
        self.description = description

    @on_main_process
    def start(self) -> None:
        mlflow = client(self.name)
        experiment_id = None  # the default experiment, or that of the run to continue
        if self.experiment_name is not None:
            known = mlflow.get_experiment_by_name(self.experiment_name)
            experiment_id = (
                known.experiment_id
                if known is not None
                else mlflow.create_experiment(self.experiment_name, artifact_location=self.logging_dir, tags=self.tags)
            )
        self._run = mlflow.start_run(
            run_id=self.run_id,
            experiment_id=experiment_id,
            run_name=self.run_name,
            nested=self.nested_run,
            tags=self.tags,
            description=self.description,
        )

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]) -> None:
        """Keep the configuration as parameters of the run.

        A value that is too long for the client is kept as the artifact ``params/NAME.txt``, with a warning.
        """
        mlflow = client(self.name)
        limits = client(self.name, "mlflow.utils.validation")
        short = {}
        for key, value in settings(values, self.name).items():
            if len(str(value)) <= limits.MAX_PARAM_VAL_LENGTH:
                short[key] = value
                continue
            logger.warning_once(
                "MLflow's parameters take %s characters at most; '%s' is kept as the artifact params/%s.txt",
                limits.MAX_PARAM_VAL_LENGTH, key, key,
            )  # fmt: skip
            mlflow.log_text(str(value), f"params/{key}.txt", run_id=self._id)
        items, most = list(short.items()), limits.MAX_PARAMS_TAGS_PER_BATCH
        for i in range(0, len(items), most):
            mlflow.log_params(dict(items[i : i + most]), run_id=self._id)

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs: Any) -> None:
        """Log metrics.

        Args:
            kwargs: for ``mlflow.log_metrics``.
        """
        metrics = {}
        for key, value in flat(plain(values, self.name)).items():
            if is_number(value):
                metrics[key] = value
            else:
                left_out(self.name, key, value, "numbers and dicts of numbers")
        step = self._count(whole_step(step, self.name))
        client(self.name).log_metrics(metrics, step=step, **{"run_id": self._id, **kwargs})

    @on_main_process
    def log_figure(self, figure: Any, artifact_file: str, **save_kwargs: Any) -> None:
        """Keep a matplotlib or plotly figure as an artifact.

        Args:
            save_kwargs: for ``mlflow.log_figure``.
        """
        if self._id:  # raises unless the run is open: the client would open another one
            client(self.name).log_figure(figure, artifact_file, **save_kwargs)

    @on_main_process
    def log_artifacts(self, local_dir: str, artifact_path: str | None = None) -> None:
        """Keep all files of a folder, below ``artifact_path``."""
        client(self.name).log_artifacts(local_dir, artifact_path, run_id=self._id)

    @on_main_process
    def log_artifact(self, local_path: str, artifact_path: str | None = None) -> None:
        """Keep a file, below ``artifact_path``."""
        client(self.name).log_artifact(local_path, artifact_path, run_id=self._id)

    @on_main_process
    def finish(self) -> None:
        """End the run."""
        if self._run is not None:
            client(self.name).end_run()
            self._run = None

    @property
    def _id(self) -> str:
        return str(self.tracker.info.run_id)


def _tags(tags: Any) -> dict[str, Any] | None:
    if not isinstance(tags, str):
        return tags
    try:
        result = json.loads(tags)
    except ValueError as error:
        raise TrackerError(
            f"tags are no JSON: {error}", where="tracker 'mlflow' (MLFLOW_TAGS)", fix='for example {"team": "a"}'
        ) from error
    return dict(result)
