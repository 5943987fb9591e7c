"""One optimizer step and one evaluation, on any number of processes.

`step` computes gradients over micro-batches and updates the weights, `evaluate` measures held-out
examples, `optimizer` makes the optimizer and its schedule, and `distributed` starts accelerate and
shards a model. This room does not know checkpoints or logs. Begin with `step`.
"""
