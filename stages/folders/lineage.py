"""`qpipe lineage`: the folders that a folder was made from, back to the demonstrations."""

from collections.abc import Iterator
from typing import Any

import msgspec

from ...pipeline.errors import UserError
from ...pipeline.folders.manifest import Identity, Manifest


def described(identity: Identity) -> str:
    """A short description of how a folder was made."""
    settings = identity.settings
    match identity.stage:
        case "build-targets":
            parameters = "".join(
                f", {name}={value:.6g}" if isinstance(value, float) else f", {name}={value}"
                for name, value in settings["parameters"].items()
            )
            return f"{settings['method']} ({settings['form']}{parameters})"
        case "score":
            if "imported" in settings:
                by = f"imported from {settings['imported']}"
            else:
                by = f"{settings.get('engine', '?')} in {settings.get('dtype', '?')}"
            return f"top {settings['top_k']} of a vocabulary of {settings['vocab_size']:,}, {by}"
        case "mix":
            weights = settings["weights"]
            return "weights " + ", ".join(f"{weight:g}" for weight in weights)
        case other:
            return other


def generations(manifest: Manifest) -> Iterator[tuple[int, str]]:
    """The folder and its ancestors: number of steps back, and description of each.

    Raises UserError if the parents in the manifest are invalid.
    """
    try:
        yield from _generations(0, "", manifest.identity, manifest.parents)
    except (TypeError, KeyError, AttributeError, ValueError, msgspec.ValidationError) as error:
        raise UserError(
            f"manifest {manifest.fingerprint[:12]}: damaged parents ({error})"
        ) from error


def _generations(
    depth: int, role: str, identity: Identity, parents: dict[str, Any]
) -> Iterator[tuple[int, str]]:
    name = f"{role}: " if role else ""
    yield depth, f"{name}{identity.stage} {identity.fingerprint[:12]}: {described(identity)}"
    for role, fingerprint in identity.inputs.items():
        if role in parents:
            parent = parents[role]
            own = msgspec.convert(parent["identity"], Identity)
            yield from _generations(depth + 1, role, own, parent["parents"])
        else:
            yield depth + 1, f"{role} {fingerprint[:12]}"
