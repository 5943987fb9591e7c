"""The transformers engine: padded batches of similar length, the head at supervised positions only.

`scorer` runs the model, `batches` divides examples into groups with an equal beginning and these
into batches, `beginnings` keeps what the model computed of a beginning, and `linear_layers` selects
how a CPU computes the layers. Begin with `scorer`.
"""
