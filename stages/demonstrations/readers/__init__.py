"""Readers yield the rows of one file or data set in order.

`reader` defines what a reader is and `files` chooses one by file name; `text` reads JSON lines and
CSV, `json_array` JSON arrays, `columnar` Parquet and Arrow, `data_sets` folders of `datasets` and
the hub. `parquet_pages` and `widths` tell what Parquet and Arrow would take before it is decoded.
Readers do not know what a row means. Begin with `reader`.
"""
