"""Where a stage runs: in this process, as one task of several, or on a Ray cluster.

`options` holds the settings and starts a run, `ray` distributes shards over Ray actors. This room
does not know what a stage computes. Begin with `options`.
"""
