"""The trainer: streams the examples of target folders and fine-tunes a student on them.

`data` turns folders into batches, `loss` defines what is minimised, `models` loads and saves,
`step` takes one optimizer step, `run` is a whole training run, and `integrations` serves other
trainers. This floor does not know engines or demonstrations. Begin with `run.train`, then
`run.loop`.
"""
