"""Names of ``deepspeed.moe``: experts are not spread over ranks here. Mixtures of experts train like any model."""
