"""Models on disk and in memory.

`files` finds and loads checkpoints, `heads` recognises how a model computes its logits, `student`
is the model under training, `packed_attention` keeps packed examples apart if `packing` finds that
it does in a model, `compiling` compiles its layers, and `saving` writes a model folder. This room
does not know targets or steps. Begin with `student`.
"""
