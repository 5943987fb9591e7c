"""What is minimised.

`sparse` is the plain reference on log-probabilities, `objective` a method as the trainer follows it
(frozen or live), and `fused` the head, the log-sum-exp and the loss in one pass over chunks of
logits. This room does not know models or files. Begin with `sparse`.
"""

from .sparse import induced_target

__all__ = ["induced_target"]
