"""`qpipe score`: from demonstrations, or from a score folder, to a score folder.

`stage` is the stage itself, `from_demonstrations` and `from_folder` supply its examples, `plan`
and `costs` forecast a run. Begin with `from_demonstrations`, then `stage`.
"""
