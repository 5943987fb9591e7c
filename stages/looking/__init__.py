"""Computes what `qpipe inspect` and `qpipe report` show: examples, measures and text.

`examples` selects and joins examples, `measures` computes one number per supervised position,
`overview` summarises a folder, `vocabulary` reads the bytes of tokens, `token_text` displays them,
and `inspect` is the command's work. Begin with `examples`.
"""
