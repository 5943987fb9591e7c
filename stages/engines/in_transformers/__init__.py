"""The transformers engine: padded batches of similar length, the head at supervised positions only.

`scorer` runs the model, `batches` divides examples into groups with an equal beginning and these
into batches, and `beginnings` keeps what the model computed of a beginning. Begin with `scorer`.
"""
