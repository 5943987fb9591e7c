"""Commands that look after sealed folders: status, verify, share, subset, list.

One file is one subject, most of them one command: `status`, `verify`, `rescore`, `subset`,
`share`, `listing`, `lineage`. They read folders through `pipeline.folders` and do not know
engines, apart from `rescore`.
"""
