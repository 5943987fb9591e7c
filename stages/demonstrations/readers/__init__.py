"""Readers yield the rows of one file or data set in order.

`reader` defines what a reader is and `files` chooses one by file name; `text` reads JSON and JSON
lines, `columnar` Parquet and Arrow, `data_sets` folders of `datasets` and the hub. Readers do not
know what a row means. Begin with `reader`.
"""
