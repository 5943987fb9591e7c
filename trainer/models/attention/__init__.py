"""Attention that keeps packed examples apart, and whether it does in a model.

`packed_attention` is the attention function, `packing` tries it on a model and installs it. This
room does not know steps or losses. Begin with `packing`.
"""
