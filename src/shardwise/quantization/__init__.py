"""Weights in int8 with one scale per block: the arithmetic, and the layer that runs with them.

Frozen, and no more than bytes to everything else: they are sharded, gathered, streamed and saved as other parameters.
"""
