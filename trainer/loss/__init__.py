"""What is minimised.

`sparse` is the plain reference on log-probabilities, `objective` a method as the trainer follows it
(frozen or live), `head` the output head in chunks, and `fused` the head, the log-sum-exp and the
loss in one pass over these chunks. `sparse_cross_entropy` needs tensors alone, no folder. This room
does not know models or files. Begin with `sparse`.
"""

from .fused import sparse_cross_entropy
from .sparse import induced_target

__all__ = ["induced_target", "sparse_cross_entropy"]
