"""What scoring again found."""

from typing import TYPE_CHECKING

from .tables import print_table

if TYPE_CHECKING:
    from ..folders.rescore import Rescored


def print_rescored(result: "Rescored") -> None:
    """How far a folder's scores are from transformers in float32."""
    weights = {True: "", False: ", of other weights", None: ", of weights not compared"}
    print_table(
        [
            (
                "scored again",
                f"{result.examples:,} demonstrations, {result.positions:,} supervised "
                f"tokens: {result.engine} in {result.dtype} against transformers in "
                f"float32{weights[result.same_weights]}",
            ),
            (
                "observed token",
                f"log-probability off by {result.observed:.2g} nats at most, "
                f"{result.observed_mean:.2g} on average",
            ),
            ("top k", f"log-probability off by {result.entries:.2g} nats at most"),
            (
                "rank",
                f"{result.ranks_changed:,} changed, by {result.rank:,} at most; "
                f"{result.modes_changed:,} most probable tokens are others",
            ),
            ("KL", f"{result.kl_mean:.2g} nats on average, {result.kl_max:.2g} at most"),
        ]
    )
