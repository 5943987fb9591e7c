"""Texts and names in a folder: they control no terminal, and load no code and nothing remote."""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from msgspec.structs import replace
from qpipe.pipeline.errors import UserError, escaped
from qpipe.pipeline.folders.manifest import Manifest, read_manifest
from qpipe.stages.folders.rescore import rescore
from qpipe.stages.looking.token_text import token_text
from qpipe.trainer.models.files import find_model, load_model

from ...support.commands import run_qpipe
from ...support.folders import build, reseal, seal_scores

pytestmark = pytest.mark.usefixtures("no_sync")

EVIL = "x\x1b]0;owned\x07\x9b2J\u202e\u2066\x85\u2028\ufeffy"


def named(model: str) -> Callable[[Manifest], Manifest]:
    return lambda manifest: replace(manifest, provenance={"model": model, "revision": model})


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    folder = seal_scores(tmp_path / "scores")
    reseal(folder, named(EVIL))
    return folder


def test_no_command_prints_what_could_control_a_terminal(scores: Path, tmp_path: Path) -> None:
    targets = build(scores, tmp_path / "targets")
    reseal(targets, lambda each: replace(each, provenance={"model": EVIL, EVIL: EVIL}))
    for folder in (scores, targets):
        for words in (
            ("inspect", folder),
            ("inspect", folder, "--json"),
            ("status", folder),
            ("verify", folder),
            ("lineage", folder),
            ("list", tmp_path),
            ("list", tmp_path, "--json"),
            ("report", folder, "--out", tmp_path / "page.html"),
            ("share", folder, tmp_path / f"shared-{folder.name}"),
            ("subset", folder, "--where", "tokens > 0", "--out", tmp_path / f"sub-{folder.name}"),
            ("verify", folder, "--rescore", 1),
        ):
            done = run_qpipe(*words)
            assert done.status in (0, 2), done.err
            found = {each for each in done.out + done.err if hides(each)}
            assert not found, (words, found)


def hides(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cf", "Zl", "Zp") and character not in "\n\r\t"


def test_every_character_that_hides_is_escaped() -> None:
    everything = "".join(map(chr, range(0x110000)))
    shown = escaped(everything)
    assert {each for each in shown if hides(each)} == {"\u200c", "\u200d"}  # joiners of scripts
    assert escaped(EVIL) == r"x\x1b]0;owned\x07\x9b2J\u202e\u2066\x85\u2028\ufeffy"
    assert shown.count("é") == 1


@pytest.fixture
def trap(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model whose code makes a file beside it, for a user who answers any question with yes."""
    folder = copytree(tiny_model, tmp_path / "a" / "trap")
    code = f"open({str(tmp_path / 'code-ran')!r}, 'w')\nclass C: pass\nclass T: pass\n"
    (folder / "code.py").write_text(code)
    for name, key, value in (
        ("config.json", "AutoConfig", "code.C"),
        ("tokenizer_config.json", "AutoTokenizer", [None, "code.T"]),
    ):
        config = json.loads((folder / name).read_text())
        config["auto_map"] = {key: value, "AutoModelForCausalLM": "code.C"}
        config |= {"model_type": "unheard-of"} if name == "config.json" else {}
        config |= {"tokenizer_class": "Unheard"} if name != "config.json" else {}
        (folder / name).write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    return folder


def test_a_model_with_code_is_refused_and_the_code_not_run(trap: Path, scores: Path) -> None:
    with pytest.raises(UserError, match=r"model .*trap: cannot be read"):
        find_model(str(trap))
    reseal(scores, named(str(trap)))
    manifest = read_manifest(scores)
    assert "shown as ids" in token_text(manifest, None)[1]
    with pytest.raises(UserError, match=r"no usable tokenizer|has tokenizer"):
        token_text(manifest, str(trap))
    with pytest.raises(UserError, match="give --model"):
        rescore(scores)
    assert not (trap.parents[1] / "code-ran").exists()


def test_the_weights_of_a_model_with_code_run_none(
    trap: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("config.json", "tokenizer_config.json"):
        known = json.loads((tiny_model / name).read_text())
        theirs = json.loads((trap / name).read_text())
        (trap / name).write_text(json.dumps(known | {"auto_map": theirs["auto_map"]}))
    import torch

    load_model(find_model(str(trap)), torch.float32)
    assert not (trap.parents[1] / "code-ran").exists()


def test_a_name_in_a_folder_downloads_nothing(
    scores: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reseal(scores, named("somebody/model"))
    asked: list[dict[str, Any]] = []

    def answer(*_: Any, **options: Any) -> None:
        asked.append(options)
        raise OSError("not there")

    monkeypatch.setattr("huggingface_hub.snapshot_download", answer)
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", answer)
    assert "shown as ids" in token_text(read_manifest(scores), None)[1]
    with pytest.raises(UserError, match="give --model"):
        rescore(scores)
    assert [each["local_files_only"] for each in asked] == [True, True]
    with pytest.raises(UserError, match="the hub cannot supply it"):
        find_model("somebody/model")  # a name that the user gave
    assert asked[-1]["local_files_only"] is False
