"""The target methods: the trust in the observed token, the residual, and the scale.

`rows` holds the methods, a row for each, `table` chooses one, and `words` prints them. `definition`
holds the types of a row and of a chosen method, `rules` the array functions that the rows name,
`divergences` the losses of a divergence, `dense` the reference over the whole vocabulary. All works
on arrays; this room does not know files or sparse supports. Begin with `table`.
"""

from .table import METHODS, choose, dense_target

__all__ = ["METHODS", "choose", "dense_target"]
