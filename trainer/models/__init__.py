"""Models on disk and in memory.

`files` finds and loads checkpoints, `parts` compares what is in them with what is loaded, `size`
reads their sizes, `causality` refuses models that are not causal, `heads` recognises how a model
computes its logits, `student` is the model under training, `attention` keeps packed examples apart,
`compiling` compiles its layers, `summary` states what a run uses of it, and `saving` writes a model
folder. This room does not know targets or steps. Begin with `student`.
"""
