"""Score files of other tools, imported and exported.

`import_scores` reads top-k log-probabilities that another tool has written, `distillkit` decodes
packed ones, `export_scores` writes them, `topk_rows` is the row that both share. Begin with
`topk_rows`.
"""
