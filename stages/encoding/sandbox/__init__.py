"""Runs templates, programs of others in Jinja's sandbox, with limits.

`environment` compiles a template and refuses single operations whose result would be huge; `watch`
ends a rendering that takes too much time or memory in all; `overruns` rejects the demonstrations on
which that happens. Begin with `environment`.
"""
