"""The commands, one file each: options, the call, and what is printed.

A command imports what it runs inside its function, so that `qpipe --help` loads nothing heavy.
`options` holds what several commands share. Begin with `score`.
"""
