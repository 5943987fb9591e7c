"""Computes what `qpipe inspect` and `qpipe report` show: examples, measures and text.

`examples` selects and joins examples, `measures` computes one number per supervised position,
`overview` summarises a folder, `token_text` displays tokens, and `inspect` is the command's work.
Begin with `examples`.
"""
