"""Score files of other tools, imported and exported.

`import_scores` reads top-k log-probabilities that another tool has written; `distillkit` decodes
packed ones, `megatron` reads those in tars. `export_scores` writes files, `export_megatron` tars;
`topk_rows` is the row that all share. Begin with it.
"""
