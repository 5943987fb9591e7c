"""The rows of one shard, in memory and in Arrow.

`records` defines the examples, `schema` the columns of each stage and the format versions,
`batches` the flat arrays that computations use, and `arrow` the conversion to and from record
batches. This room does not know files, folders or methods. Begin with `records`, then `schema`.
"""
