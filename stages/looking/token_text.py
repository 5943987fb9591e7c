"""The text of single tokens, escaped so that it cannot control a terminal or a page.

A token may hold only a part of a character. In a sequence, the token in which a character begins
shows it, and the tokens that continue it show nothing; alone, such a token shows its bytes.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from ...pipeline.errors import UserError, escaped
from ...pipeline.folders.manifest import Manifest
from ...pipeline.folders.provenance import tokenizer_hash
from .vocabulary import load_tokenizer, vocabulary_of


class TokenText:
    """The text of token ids; `bytes_of` returns a token's bytes, or None if it has none."""

    def __init__(self, bytes_of: Callable[[int], bytes | None]) -> None:
        self._bytes_of = cache(bytes_of)
        self.alone = cache(self._alone)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token of a sequence; "" if it continues a character."""
        pieces: list[str] = []
        start = 0
        while start < len(ids):
            stop = start + 1
            while stop < len(ids) and _is_cut(self._joined(ids, start, stop)):
                if self._bytes_of(ids[stop]) is None or stop - start == 8:
                    break
                stop += 1
            pieces += self._run(ids[start:stop])
            start = stop
        return pieces

    def _joined(self, ids: Sequence[int], start: int, stop: int) -> bytes:
        return b"".join(self._bytes_of(each) or b"" for each in ids[start:stop])

    def _run(self, ids: Sequence[int]) -> list[str]:
        """The texts of tokens that share characters, or of one token."""
        if len(ids) == 1:
            return [self.alone(ids[0])]
        contents = [self._bytes_of(each) or b"" for each in ids]
        pieces = [""] * len(ids)
        owner = [place for place, content in enumerate(contents) for _ in content]
        offset = 0
        for character in b"".join(contents).decode("utf-8", "surrogateescape"):
            pieces[owner[offset]] += _shown(character)
            offset += len(character.encode("utf-8", "surrogateescape"))
        return pieces

    def _alone(self, token_id: int) -> str:
        """The text of a token by itself."""
        content = self._bytes_of(token_id)
        if content is None:
            return f"⟨{token_id}⟩"
        return "".join(map(_shown, content.decode("utf-8", "surrogateescape")))


IDS_ONLY = TokenText(lambda token_id: None)


def one_line_of(text: str) -> str:
    """Text on one line, with line feeds and tabs as visible signs."""
    return text.replace("\n", "↵").replace("\t", "⇥")


def token_text(manifest: Manifest, model: str | None) -> tuple[TokenText, str]:
    """The text of a folder's tokens, and a line to print if only ids can be shown.

    `model` is a folder or a name on the hub; None is the name in the manifest, of which only files
    on this machine are read. Raises UserError for a given model that cannot be read or has another
    tokenizer.
    """
    name: str = manifest.provenance.get("model") or ""
    if model is None and "/" not in name:  # the name of a folder, not one on the hub
        known = f" (the folder of {name})" if name else ""
        return IDS_ONLY, f"Tokens are shown as ids: --model DIR{known} shows their text."
    try:
        tokenizer = load_tokenizer(model or name, local=model is None)
        found, wanted = tokenizer_hash(tokenizer), manifest.settings["tokenizer_hash"]
        if found != wanted:
            raise UserError(
                f"--model {model or name}: has tokenizer {found[:12]}…, the folder was made with "
                f"{wanted[:12]}…: give the model that was scored"
            )
    except UserError as error:
        if model is not None:
            raise
        return IDS_ONLY, f"Tokens are shown as ids, --model DIR shows their text: {error}"
    return of_tokenizer(tokenizer), ""


def of_tokenizer(tokenizer: Any) -> TokenText:
    """The text of a fast tokenizer's tokens."""
    return TokenText(vocabulary_of(tokenizer).__getitem__)


def _is_cut(content: bytes) -> bool:
    """Whether the bytes end within a character."""
    for back in range(1, min(4, len(content)) + 1):
        byte = content[-back]
        if byte >= 0xC0:
            return back < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
        if byte < 0x80:
            return False
    return False


@cache
def _shown(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not part of a character
        return f"⟨{code - 0xDC00:02X}⟩"
    return escaped(character)
