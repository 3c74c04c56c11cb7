"""Experiment trackers: TensorBoard, Weights & Biases, MLflow, Comet, ClearML, Aim, DVCLive, SwanLab, Trackio, JSONL,
CSV.

Each talks to its own client, which is imported when the tracker starts. Names mean what they mean in Accelerate.
"""

from shardwise.compat.imports import (
    is_aim_available,
    is_clearml_available,
    is_comet_ml_available,
    is_dvclive_available,
    is_mlflow_available,
    is_swanlab_available,
    is_tensorboard_available,
    is_trackio_available,
    is_wandb_available,
)
from shardwise.tracking.aim import AimTracker
from shardwise.tracking.base import BlankTracker, GeneralTracker, on_main_process
from shardwise.tracking.clearml import ClearMLTracker
from shardwise.tracking.comet import CometMLTracker
from shardwise.tracking.csv import CSVTracker
from shardwise.tracking.dvclive import DVCLiveTracker
from shardwise.tracking.jsonl import JSONLTracker
from shardwise.tracking.kinds import LoggerType, get_available_trackers
from shardwise.tracking.mlflow import MLflowTracker
from shardwise.tracking.registry import LOGGER_TYPE_TO_CLASS, filter_trackers, register_tracker_class
from shardwise.tracking.tensorboard import TensorBoardTracker
from shardwise.tracking.wandb import SwanLabTracker, TrackioTracker, WandBTracker

__all__ = [
    "LOGGER_TYPE_TO_CLASS",
    "AimTracker",
    "BlankTracker",
    "CSVTracker",
    "ClearMLTracker",
    "CometMLTracker",
    "DVCLiveTracker",
    "GeneralTracker",
    "JSONLTracker",
    "LoggerType",
    "MLflowTracker",
    "SwanLabTracker",
    "TensorBoardTracker",
    "TrackioTracker",
    "WandBTracker",
    "filter_trackers",
    "get_available_trackers",
    "is_aim_available",
    "is_clearml_available",
    "is_comet_ml_available",
    "is_dvclive_available",
    "is_mlflow_available",
    "is_swanlab_available",
    "is_tensorboard_available",
    "is_trackio_available",
    "is_wandb_available",
    "on_main_process",
    "register_tracker_class",
]
