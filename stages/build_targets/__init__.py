"""`qpipe build-targets` and `qpipe compare-methods`: from score folders to a target folder.

`stage` is the stage, `inputs` opens the base's scores and a teacher's, `teacher` joins the two by
example id, `other_tokenizer` does so for a teacher of other tokens, which `alignment` compares,
`teacher_by_column` takes each row's own teacher, and `compare_methods` states what each method
would store. Begin with `stage`.
"""
