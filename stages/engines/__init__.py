"""Engines run a model: token ids in, log-probabilities at the supervised positions out.

`base` defines the protocol and packs an engine's arrays into a scored example, `choose` selects
and starts an engine; `vllm_engine`, `in_transformers` and `server` are the engines. Engines do
not know folders. Begin with `base`.
"""
