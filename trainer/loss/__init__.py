"""What is minimised.

`sparse` is the plain reference on log-probabilities, `objective` a method as the trainer follows it
(frozen or live), `course` the objective over a run, `head` the output head, and `fused` the head,
the log-sum-exp and the loss in one, chunk by chunk: `chunk_in_kernels` computes a chunk by the
Triton kernels of `kernels`, `chunk_in_torch` by passes of torch. `sparse_cross_entropy` needs
tensors alone, no folder; in `tensor_parallel` each process has a part of the vocabulary. This room
does not know models or files. Begin with `sparse`.
"""

from .fused import sparse_cross_entropy
from .sparse import induced_target
from .tensor_parallel import vocabulary_parallel_cross_entropy

__all__ = ["induced_target", "sparse_cross_entropy", "vocabulary_parallel_cross_entropy"]
