"""Models larger than the memory of one device, to run them: where their tensors go, and what brings them there.

Scripts import it as :mod:`shardwise.big_modeling`, :mod:`shardwise.hooks` and :mod:`shardwise.utils`, under the names
that Hugging Face Accelerate has for it. Nothing here shards or trains.
"""
