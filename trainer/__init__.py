"""The trainer: streams target shards and fine-tunes on them."""
