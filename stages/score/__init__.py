"""`qpipe score`: makes a score folder from demonstrations or from another score folder.

`stage` is the stage itself, `from_demonstrations` and `from_folder` supply its examples, and
`plan` estimates a run. Begin with `from_demonstrations`, then `stage`.
"""
