"""Log-probabilities of the supervised rows alone, computed inside vLLM's workers.

vLLM projects every row of a prompt onto the vocabulary. Here the supervised rows are selected
before the output head. `request` is what travels with a request, `steps` selects the rows of an
engine step, `summary` and its `kernels` read the logits once, `gather` and `shards` make
log-probabilities, on a CPU in `blocks` of rows, and `worker` puts this into vLLM's model runners.
`cpu_layers` makes the layers below faster on a CPU. The room does not know examples or folders.
Begin with `request`.
"""
