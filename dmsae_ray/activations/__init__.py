"""Residual-stream activations: shard format, datasets of shards, and the order and stream training reads them in."""
