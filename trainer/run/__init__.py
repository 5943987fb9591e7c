"""From the settings to a saved model.

`train` sets a run up and records its result, `loop` takes the steps, `target_folders` opens and
checks the targets, `checkpoint` saves and restores the state, and `folder` looks after the run's
output folder. Begin with `train`, then `loop`.
"""
