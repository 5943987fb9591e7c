"""The packed log-probabilities of DistillKit, decoded.

A position takes a fixed number of bytes. `compressed_logprobs` holds, one after another, the first
`exact_k` values, the coefficients of a sum of terms over the place among the others, and bins of
quantised residuals of these, each a scale and whole numbers of some bits. With `delta_encoding` the
values are differences from the value before. `bytepacked_indices` holds k ids of as many bits as
the vocabulary of `d` ids needs. Bits are most significant first, bytes of numbers little-endian.

The settings are in `compression_config.yaml` beside the files. The coding is lossy: where decoded
probabilities add up to more than 1 they are scaled to 1, and such positions are counted.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import yaml
from msgspec import Meta
from numpy.typing import NDArray

from ...pipeline.errors import UserError, one_line
from ..demonstrations.demonstration import UnusableError
from .topk_rows import Floats, Ints, TopK

CONFIG = "compression_config.yaml"
Bytes = NDArray[np.uint8]
Kind = Literal["float16", "bfloat16", "float32", "float64"]
Positive = Annotated[int, Meta(ge=1, le=2**31)]
Bits = Annotated[int, Meta(ge=1, le=64)]
_TERMS = {"sqrt": np.sqrt, "exp": np.exp}


class Bin(msgspec.Struct, frozen=True):
    """Quantised residuals of consecutive values: a scale, and whole numbers."""

    scale_dtype: Kind
    element_bits: Bits
    num_elements: Positive

    @property
    def size(self) -> int:
        """The bytes of a position."""
        return _width(self.scale_dtype) + (self.num_elements * self.element_bits + 7) // 8


class Codec(msgspec.Struct, frozen=True):
    """The settings of a packed corpus, as in `compression_config.yaml`."""

    d: Positive
    k: Positive
    exact_k: Annotated[int, Meta(ge=0)]
    residual_bins: list[Bin]
    exact_dtype: Kind = "float32"
    polynomial_terms: list[int | Literal["sqrt", "exp"]] | None = None
    term_dtype: Kind = "float32"
    delta_encoding: bool = True
    error_diffusion: bool = False
    normalize_t: bool = False

    @property
    def id_bits(self) -> int:
        """The bits of an id."""
        return (self.d - 1).bit_length()

    @property
    def size(self) -> int:
        """The bytes of the values of a position."""
        terms = len(self.polynomial_terms or ()) * _width(self.term_dtype)
        exact = self.exact_k * _width(self.exact_dtype)
        return exact + terms + sum(each.size for each in self.residual_bins)

    def entries(self, ids: tuple[Ints, Bytes], log_probs: tuple[Ints, Bytes]) -> tuple[TopK, int]:
        """The entries of all rows [R, k], and the number of rows whose probabilities were scaled.

        Both arguments are lengths and bytes. Raises UnusableError for rows of another length.
        """
        id_bytes = _rows(*ids, (self.k * self.id_bits + 7) // 8, "bytepacked_indices")
        ids_Rk = _unpacked(id_bytes, self.id_bits, self.k).astype(np.int64)
        values_Rk = self._values(_rows(*log_probs, self.size, "compressed_logprobs"))
        with np.errstate(over="ignore"):
            mass_R = np.exp(values_Rk).sum(axis=1)
        is_over = mass_R > 1
        values_Rk[is_over] -= np.log(mass_R[is_over])[:, None]
        counts = np.full(len(ids_Rk), self.k, np.int64)
        return TopK(counts, ids_Rk.ravel(), values_Rk.ravel()), int(is_over.sum())

    def _values(self, content: Bytes) -> Floats:
        """The log-probabilities [R, k] of bytes [R, size]."""
        widths = [self.exact_k * _width(self.exact_dtype)]
        widths.append(len(self.polynomial_terms or ()) * _width(self.term_dtype))
        widths += [each.size for each in self.residual_bins]
        exact, terms, *bins = np.split(content, np.cumsum(widths)[:-1], axis=1)
        rest = np.zeros((len(content), self.k - self.exact_k))
        start = 0
        for each, part in zip(self.residual_bins, bins, strict=True):
            rest[:, start : start + each.num_elements] = _dequantised(each, part)
            start += each.num_elements
        if self.polynomial_terms:
            rest += _floats(terms, self.term_dtype) @ self._curves(rest.shape[1])
        values = np.concatenate([_floats(exact, self.exact_dtype), rest], axis=1)
        return np.cumsum(values, axis=1) if self.delta_encoding else values

    def _curves(self, places: int) -> Floats:
        """Each term at each place, [terms, places]."""
        at = np.linspace(0, 1, places) if self.normalize_t else np.arange(places, dtype=np.float64)
        terms = self.polynomial_terms or ()
        return np.stack([_TERMS[t](at) if isinstance(t, str) else at**t for t in terms])


def read_codec(file: Path, given: Path | None) -> Codec:
    """The settings of a packed file, from the given file or the one beside it.

    Raises UserError where they are missing or cannot be used.
    """
    path = given or file.with_name(CONFIG)
    try:
        codec = msgspec.convert(yaml.safe_load(path.read_text(encoding="utf-8")), Codec)
    except FileNotFoundError as error:
        raise UserError(
            f"{file}: its log-probabilities are packed, and {path} is missing: give DistillKit's "
            f"{CONFIG} with --codec"
        ) from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(
            f"{path}: not DistillKit's settings of packed log-probabilities: {one_line(error)}"
        ) from error
    if sum(each.num_elements for each in codec.residual_bins) > codec.k - codec.exact_k:
        raise UserError(
            f"{path}: exact_k {codec.exact_k} and residual_bins hold more than k {codec.k} values: "
            "correct it"
        )
    return codec


def _rows(lengths: Ints, flat: Bytes, wanted: int, name: str) -> Bytes:
    """The bytes of each row, [R, wanted]."""
    if (lengths != wanted).any():
        found = int(lengths[lengths != wanted][0])
        raise UnusableError(f"{name}: a position has {found} bytes, by the settings {wanted}")
    return flat.reshape(len(lengths), wanted)


def _unpacked(content: Bytes, bits: int, count: int) -> NDArray[np.uint64]:
    """Whole numbers [R, count] of some bits each."""
    flat = np.unpackbits(content, axis=1)[:, : bits * count].reshape(len(content), count, bits)
    numbers = np.zeros((len(content), count), np.uint64)
    for bit in range(bits):
        numbers = numbers << np.uint64(1) | flat[:, :, bit]
    return numbers


def _dequantised(bin: Bin, content: Bytes) -> Floats:
    """The residuals [R, elements] of a bin."""
    width = _width(bin.scale_dtype)
    scale_R1 = _floats(content[:, :width], bin.scale_dtype)
    numbers = _unpacked(content[:, width:], bin.element_bits, bin.num_elements).astype(np.float64)
    if bin.element_bits == 1:
        return (2 * numbers - 1) * scale_R1
    return (numbers - 2.0 ** (bin.element_bits - 1)) * scale_R1


def _floats(content: Bytes, kind: Kind) -> Floats:
    """The numbers of bytes [R, width · numbers]."""
    content = np.ascontiguousarray(content)
    if kind == "bfloat16":  # the high half of a float32
        return (content.view("<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return content.view(f"<f{_width(kind)}").astype(np.float64)


def _width(kind: Kind) -> int:
    return {"float16": 2, "bfloat16": 2, "float32": 4, "float64": 8}[kind]


def described(codec: Codec | None) -> dict[str, Any]:
    """The settings for the identity of an import; none if the file is not packed."""
    return {} if codec is None else {"codec": msgspec.to_builtins(codec)}
