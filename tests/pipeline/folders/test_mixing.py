"""Mixtures of target folders by reference."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from qpipe.pipeline import decoder
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import read_manifest, write_manifest
from qpipe.pipeline.folders.mixing import read_mix, write_mix
from qpipe.pipeline.methods import choose
from qpipe.stages.build_targets.settings import BuildSettings
from qpipe.stages.build_targets.stage import build_targets
from qpipe.stages.cli import main
from qpipe.stages.folders.settings import SubsetSettings
from qpipe.stages.folders.share import share
from qpipe.stages.folders.subset import subset
from qpipe.stages.folders.verify import verify


@pytest.fixture
def parts(targets: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Two target folders of other rows, to be moved and changed."""
    for name, where in (("long", "tokens > 24"), ("short", "tokens <= 24")):
        subset(SubsetSettings(targets, tmp_path / name, None, (where,)))
    return tmp_path / "long", tmp_path / "short"


def test_a_mixture_names_its_parts(parts: tuple[Path, Path], tmp_path: Path) -> None:
    result = write_mix(tmp_path / "mixed", [(parts[0], 3), (parts[1], 1.5)])
    found = read_mix(tmp_path / "mixed")
    assert [part.folder.path.resolve() for part in found] == [part.resolve() for part in parts]
    assert [part.weight for part in found] == [3, 1.5]
    assert [part.folder.manifest for part in found] == [read_manifest(part) for part in parts]
    assert list(verify(tmp_path / "mixed")) == []
    assert write_mix(tmp_path / "mixed", [(parts[0], 3), (parts[1], 1.5)]).was_done
    assert not list((tmp_path / "mixed").glob("*.arrow"))
    assert result.manifest.identity.inputs == {
        f"part-{number}": read_manifest(part).fingerprint for number, part in enumerate(parts, 1)
    }


def test_ten_parts_and_more_stay_in_their_order(targets: Path, tmp_path: Path) -> None:
    for number in range(11):
        ids = tmp_path / f"{number}.txt"
        ids.write_text(f"chats.jsonl:{number + 1}\n")
        subset(SubsetSettings(targets, tmp_path / f"p{number}", ids))
    wanted = [(tmp_path / f"p{number}", number + 1.0) for number in range(11)]
    write_mix(tmp_path / "mixed", wanted)
    found = [(part.folder.path.name, part.weight) for part in read_mix(tmp_path / "mixed")]
    assert found == [(folder.name, weight) for folder, weight in wanted]


def test_parts_move_with_the_mixture(parts: tuple[Path, Path], tmp_path: Path) -> None:
    write_mix(tmp_path / "mixed", [(parts[0], 1), (parts[1], 1)])
    (tmp_path / "elsewhere").mkdir()
    for name in ("long", "short", "mixed"):
        (tmp_path / name).rename(tmp_path / "elsewhere" / name)
    found = read_mix(tmp_path / "elsewhere" / "mixed")
    assert found[0].folder.path.resolve() == (tmp_path / "elsewhere" / "long").resolve()


def test_a_part_that_changed_or_went_is_refused(parts: tuple[Path, Path], tmp_path: Path) -> None:
    write_mix(tmp_path / "mixed", [(parts[0], 3), (parts[1], 1)])
    shard = parts[0] / "shard-00000.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-9] + b"\0" + whole[-8:])
    assert any("its hash is not the manifest's" in line for line in verify(tmp_path / "mixed"))
    shutil.rmtree(parts[0])
    with pytest.raises(UserError, match=r"its part .*long does not exist"):
        read_mix(tmp_path / "mixed")
    shutil.copytree(parts[1], parts[0])
    with pytest.raises(UserError, match=r"its part .*long has changed"):
        read_mix(tmp_path / "mixed")
    assert any("has changed, its fingerprint" in line for line in verify(tmp_path / "mixed"))


def test_a_changed_seal_is_refused(parts: tuple[Path, Path], tmp_path: Path) -> None:
    write_mix(tmp_path / "mixed", [(parts[0], 3), (parts[1], 1)])
    path = tmp_path / "mixed" / "manifest.json"
    value = json.loads(path.read_text())
    value["provenance"]["parts"]["part-1"] = "../../../etc"
    path.write_text(json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    with pytest.raises(UserError, match="its seal does not match its content"):
        read_mix(tmp_path / "mixed")


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("p" * 300, "its part .*ppp does not exist"),
        ([1], "it does not name its parts"),
        (None, "does not name"),
        ("reference://::data:application/json;base64,e30=", "is not in a store that a mixture"),
        ("simplecache::s3://bucket/a", "is not in a store that a mixture may name"),
        (
            "http://169.254.169.254/latest",
            "not in a store that a mixture may name, s3, .*: copy",
        ),
    ],
)
def test_a_sealed_place_that_cannot_be_is_refused(
    parts: tuple[Path, Path], tmp_path: Path, place: Any, words: str
) -> None:
    mixed = tmp_path / "mixed"
    write_mix(mixed, [(parts[0], 3), (parts[1], 1)])
    manifest = read_manifest(mixed)
    places = manifest.provenance["parts"] | {"part-1": place}
    write_manifest(mixed, replace(manifest, provenance={"parts": places}))
    with pytest.raises(UserError, match=words):
        read_mix(mixed)


def test_folders_that_do_not_fit_are_refused(
    parts: tuple[Path, Path], scores: Path, tmp_path: Path
) -> None:
    def message(*given: tuple[Path, float]) -> str:
        with pytest.raises(UserError) as error:
            write_mix(tmp_path / "mixed", given)
        assert not (tmp_path / "mixed").exists()
        return str(error.value)

    for method, form in (("dft", "live"), ("dft", "frozen-weight"), ("gift", "frozen-target")):
        choice = choose(method, form)
        build_targets(BuildSettings(scores, tmp_path / f"{method}-{form}", choice))
    ours = (parts[0], 1.0)
    assert "its residual is observed and there base" in message(ours, (tmp_path / "dft-live", 1))
    both = ((tmp_path / "dft-frozen-weight", 1.0), (tmp_path / "dft-live", 1.0))
    assert "its live method is dft and there none" in message(*both)
    assert "give a weight above 0" in message(ours, (parts[1], 0))
    assert "give a weight above 0" in message(ours, (parts[1], float("nan")))
    assert "is the same as" in message(ours, (*ours[:1], 2.0))
    assert "needs two folders" in message(ours)
    assert "made by `qpipe score`" in message(ours, (scores, 1))
    write_mix(tmp_path / "mixed", [ours, (tmp_path / "gift-frozen-target", 1)])


def test_a_mixture_holds_no_rows(parts: tuple[Path, Path], tmp_path: Path) -> None:
    write_mix(tmp_path / "mixed", [(parts[0], 3), (parts[1], 1)])
    with pytest.raises(UserError, match="made by `qpipe mix` holds no rows"):
        decoder(tmp_path / "mixed")
    with pytest.raises(UserError, match="share each of them, then `qpipe mix` their URLs"):
        share(tmp_path / "mixed", tmp_path / "copy", None, None)
    with pytest.raises(UserError, match="made by `qpipe mix` holds no rows"):
        subset(SubsetSettings(tmp_path / "mixed", tmp_path / "some", None, ("tokens > 2",)))


def test_the_command(
    parts: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    out = ["--out", str(tmp_path / "mixed")]

    def run(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["qpipe", "mix", *words, *out])
        with pytest.raises(SystemExit) as end:
            main()
        return int(end.value.code or 0)

    assert run(f"{parts[0]}=3", f"{parts[1]}") == 2
    assert "give a folder and its weight" in capsys.readouterr().err
    assert run(f"{parts[0]}=3", f"{parts[1]}=1") == 0
    assert " 75.0%" in capsys.readouterr().out
