"""A folder on disk: its plan, its shards and its seal.

A stage writes shards, each with a sidecar, and seals the folder with a manifest. An interrupted
run continues with the missing shards. This room does not know what a stage computes. Begin with
`manifest` (what a folder states about itself), `sealed` (reading), `shard_run` (writing) and
`tasks` (running a whole stage).
"""
