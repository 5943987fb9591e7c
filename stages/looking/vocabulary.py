"""The vocabulary of a tokenizer: the bytes that each token stands for."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...pipeline.errors import UserError, one_line


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """The tokens by id: as the tokenizer spells them, and their bytes; None for an unused id.

    The bytes of a special token are its name, which stands for nothing in a text.
    """

    spellings: list[str | None]
    contents: list[bytes | None]
    special: frozenset[int]

    def __getitem__(self, token_id: int) -> bytes | None:
        return self.contents[token_id] if 0 <= token_id < len(self.contents) else None


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """The vocabulary of a fast tokenizer: byte-level, or of sentencepiece's kind."""
    decoder = tokenizer.backend_tokenizer.decoder
    is_byte_level = decoder is not None and b'"ByteLevel"' in decoder.__getstate__()
    added = tokenizer.added_tokens_decoder
    special = frozenset(number for number, token in added.items() if token.special)
    # other added tokens, such as runs of spaces (Gemma), are decoded as any token
    named = {number: str(added[number]) for number in (added if is_byte_level else special)}
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    spellings = tokenizer.convert_ids_to_tokens(range(size))
    decode = _from_byte_level if is_byte_level else _from_sentencepiece
    contents = [
        None if token is None else named[number].encode() if number in named else decode(token)
        for number, token in enumerate(spellings)
    ]
    return Vocabulary(spellings, contents, special)


def matching_ids(theirs: Vocabulary, ours: Vocabulary) -> NDArray[np.int32]:
    """For each of their ids, our id of the same text, or −1.

    No id of ours stands twice. Where a vocabulary has a text twice, as a token and as a byte, equal
    spellings belong together; then tokens come before bytes. A special token is only ever another
    special token.
    """
    found = np.full(len(theirs.contents), -1, np.int32)
    free = [*_by_preference(ours)]
    for with_spelling in (True, False):
        places: dict[Any, int] = {}
        for number in free:
            places.setdefault(_key(ours, number, with_spelling), number)
        for number in _by_preference(theirs):
            if found[number] < 0:
                found[number] = places.pop(_key(theirs, number, with_spelling), -1)
        taken = {*found.tolist()}
        free = [number for number in free if number not in taken]
    return found


def load_tokenizer(model: str, local: bool, option: str = "--model") -> Any:
    """The fast tokenizer of a folder or a name on the hub, of which `local` reads only the cache.

    Raises UserError, which names the option, where there is none.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if Path(model).is_absolute() and not Path(model).is_dir():
        raise UserError(f"{option} {model}: no such folder: give the model that was scored")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            model, trust_remote_code=False, local_files_only=local
        )
    except Exception as error:  # libraries raise many kinds for damaged files
        raise UserError(f"{option} {model}: has no usable tokenizer: {one_line(error)}") from error
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"{option} {model}: has no fast tokenizer: save one in it (tokenizer.json), or leave "
            f"{option} out"
        )
    return tokenizer


def _by_preference(vocabulary: Vocabulary) -> list[int]:
    """The ids in use, bytes last."""
    used = [number for number, each in enumerate(vocabulary.contents) if each is not None]
    return sorted(used, key=lambda number: _is_byte(vocabulary.spellings[number] or ""))


def _key(vocabulary: Vocabulary, number: int, with_spelling: bool) -> tuple[Any, ...]:
    spelling = vocabulary.spellings[number] if with_spelling else ""
    return number in vocabulary.special, vocabulary.contents[number], spelling


@cache
def _byte_of_letter() -> dict[str, int]:
    """The byte for each letter of byte-level tokenizers (Radford et al., 2019)."""
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in own]
    letters = {chr(byte): byte for byte in own}
    return letters | {chr(0x100 + place): byte for place, byte in enumerate(others)}


def _from_byte_level(token: str) -> bytes:
    letters = _byte_of_letter()
    return b"".join(bytes([letters[each]]) if each in letters else each.encode() for each in token)


def _from_sentencepiece(token: str) -> bytes:
    return bytes([int(token[3:5], 16)]) if _is_byte(token) else token.replace("▁", " ").encode()


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")
