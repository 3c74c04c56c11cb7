"""The engine: units, their schedule, and optimizers on their pieces."""
