"""The commands, and what only they need: demonstrations, encoding, engines, execution, reports.

`cli` is the entry point and `commands` holds one file for each command. `score` and
`build_targets` are the two stages; a stage supplies the content of shards, and `pipeline.folders`
writes them. Begin with `cli`, then `commands.score` and `score.from_demonstrations`.
"""
