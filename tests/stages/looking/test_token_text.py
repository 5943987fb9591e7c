"""Text of tokens: characters that are cut, and text that would steer a terminal."""

from pathlib import Path

import pytest
import tokenizers
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.pipeline.folders.provenance import tokenizer_hash
from qpipe.stages.looking.token_text import TokenText, escaped, of_tokenizer, token_text
from qpipe.tests.support.examples import targeted
from qpipe.tests.support.folders import folder_of
from transformers import AutoTokenizer, PreTrainedTokenizerFast


def by_bytes(*contents: bytes | None) -> TokenText:
    """Token i has these bytes."""
    return TokenText(lambda token_id: contents[token_id])


def test_the_token_in_which_a_character_begins_shows_it() -> None:
    text = by_bytes(b"a\xf0\x9f", b"\x98", b"\x80b", b" \xe6", b"\xbc\xa2")
    assert text.pieces([0, 1, 2, 3, 4]) == ["a😀", "", "b", " 漢", ""]


def test_bytes_that_make_no_character_are_shown_as_bytes() -> None:
    text = by_bytes(b"\xf0\x9f", b"x", b"\xff")
    assert text.pieces([0, 1, 2, 0]) == ["⟨F0⟩⟨9F⟩", "x", "⟨FF⟩", "⟨F0⟩⟨9F⟩"]
    assert text.alone(0) == "⟨F0⟩⟨9F⟩"


def test_ids_without_a_token_are_shown_as_ids() -> None:
    text = by_bytes(None, b"\xe6")
    assert text.pieces([1, 0]) == ["⟨E6⟩", "⟨0⟩"]


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b2J", "\\x9b2J"),
        ("\u202egnp", "\\u202egnp"),
        ("a\rb\x07\x00", "a\\rb\\x07\\x00"),
        ("\u2028\ufeff\U000e0041", "\\u2028\\ufeff\\U000e0041"),
        ("line\n\ttab é 漢 👩\u200d🚀", "line\n\ttab é 漢 👩\u200d🚀"),
    ],
)
def test_what_steers_or_hides_is_written_out(hostile: str, shown: str) -> None:
    assert escaped(hostile) == shown
    assert "".join(by_bytes(hostile.encode()).pieces([0])) == shown


def test_a_real_tokenizers_pieces_make_up_the_text(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    said = "<|im_start|>the answer is 漢字 😀 é\n<|im_end|>"
    ids = tokenizer(said, add_special_tokens=False)["input_ids"]
    text = of_tokenizer(tokenizer)
    pieces = text.pieces(ids)
    assert "".join(pieces) == said
    assert "😀" in [piece.strip() for piece in pieces]
    assert text.alone(10**6) == "⟨1000000⟩"


def test_a_sentencepiece_tokenizers_bytes_and_blanks() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<unk>": 0, "▁the": 1, "<0xE6>": 2, "<0xBC>": 3, "<0xA2>": 4}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    text = of_tokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert text.pieces([1, 2, 3, 4, 1]) == [" the", "漢", "", "", " the"]


def test_another_tokenizer_is_refused_and_none_leaves_ids(tmp_path: Path, tiny_model: Path) -> None:
    rows = [targeted("a", [0, 7], [1.0], [{7: 1.0}])]
    other = read_manifest(folder_of(tmp_path / "other", rows))
    with pytest.raises(UserError, match="give the model that was scored"):
        token_text(other, str(tiny_model))
    with pytest.raises(UserError, match="no such folder"):
        token_text(other, "/no/such/model")
    text, note = token_text(other, None)
    assert text.alone(7) == "⟨7⟩"
    assert "--model DIR (the folder of made-up)" in note
    own = tokenizer_hash(AutoTokenizer.from_pretrained(tiny_model))
    same = read_manifest(folder_of(tmp_path / "same", rows, tokenizer_hash=own))
    text, note = token_text(same, str(tiny_model))
    assert note == ""
    assert text.alone(7) != "⟨7⟩"


def test_runs_of_spaces_that_a_tokenizer_has_added_are_spaces() -> None:
    """As Gemma keeps the indentation of code; special tokens stay as they are spelt."""
    model = tokenizers.models.BPE({"a": 0, "▁b": 1, "▁▁▁▁": 2, "<▁>": 3}, [])
    made = tokenizers.Tokenizer(model)
    made.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback()]
    )
    made.add_tokens([tokenizers.AddedToken("▁▁▁▁", normalized=False)])
    made.add_special_tokens([tokenizers.AddedToken("<▁>", special=True)])
    text = of_tokenizer(PreTrainedTokenizerFast(tokenizer_object=made))
    assert text.pieces([0, 2, 1, 3]) == ["a", "    ", " b", "<▁>"]
