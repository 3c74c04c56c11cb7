"""Where scripts import the configuration from, and the names of its optimizers."""

from shardwise.deepspeed.config import DeepSpeedConfig, DeepSpeedConfigError

ADAGRAD_OPTIMIZER = "adagrad"
ADAM_OPTIMIZER = "adam"
ADAMW_OPTIMIZER = "adamw"
LAMB_OPTIMIZER = "lamb"
LION_OPTIMIZER = "lion"
MUON_OPTIMIZER = "muon"
SGD_OPTIMIZER = "sgd"

__all__ = ["DeepSpeedConfig", "DeepSpeedConfigError"]
