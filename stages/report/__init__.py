"""`qpipe report`: one self-contained HTML page of targets, of scores, or of training runs.

`data` and `training` make what a page shows, `page` puts it together with the files beside it.
"""
