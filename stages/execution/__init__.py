"""Where a stage runs: in this process, as one task of several, or on a Ray cluster.

`settings` holds the options, `run` starts a run, and `ray` distributes shards over Ray actors. This
room does not know what a stage computes. Begin with `run`.
"""
