"""Reads files and data sets into demonstrations.

`sources` opens the files and data sets that a user names, `readers/` reads their rows, `formats`
recognises the form of a row and converts it, and `demonstration` is the result. This room does not
know tokenizers. Begin with `demonstration`, then `formats`.
"""
