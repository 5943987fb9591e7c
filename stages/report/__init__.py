"""`qpipe report`: one self-contained HTML page of targets, of scores, or of training runs.

`make` chooses the page; `folder_page` and `training_page` compute its data, `pack` encodes it, and
`page` assembles the HTML file. Begin with `make`.
"""
