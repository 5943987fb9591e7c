"""From target folders to batches.

`stream` reads the examples of a folder in a random order that depends on the seed alone, `mixture`
interleaves several streams, `steps` cuts samples into optimizer steps and micro-batches, and
`batch` turns examples into tensors. This room does not know models or losses. Begin with `stream`.
"""
