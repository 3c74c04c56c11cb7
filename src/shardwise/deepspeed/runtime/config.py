"""Where scripts import the configuration from."""

from shardwise.deepspeed.config import DeepSpeedConfig, DeepSpeedConfigError

__all__ = ["DeepSpeedConfig", "DeepSpeedConfigError"]
