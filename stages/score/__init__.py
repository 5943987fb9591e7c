"""`qpipe score`: makes a score folder from demonstrations or from another score folder.

`stage` is the stage itself, `from_demonstrations` and `from_folder` supply its examples, `plan`
estimates a run, and `show` prints demonstrations with what is supervised. Begin with
`from_demonstrations`, then `stage`.
"""
