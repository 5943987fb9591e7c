"""Megatron-LM's tars of log-probabilities: written here as a teacher run of several ranks does."""

import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from qpipe.pipeline import read_scores
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.stages.exchange.export_scores import export_scores
from qpipe.stages.exchange.import_scores import import_scores
from qpipe.stages.exchange.settings import ExportSettings, ImportSettings
from qpipe.stages.folders.verify import verify
from torch import Tensor

from ...conftest import make_scores, make_tiny_model

VOCAB, SEQUENCE, K, SAMPLES = 70_000, 7, 5, 16  # ids of more than 16 bits


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Only its configuration and tokenizer are read."""
    return make_tiny_model(tmp_path_factory.mktemp("models") / "wide", vocab_size=VOCAB)


def samples() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens [samples, sequence + 1], and ids and log-probs [samples, sequence, K], descending."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (SAMPLES, SEQUENCE + 1))
    ids = rng.integers(0, VOCAB, (SAMPLES, SEQUENCE, K))
    ids[:, :, 1] = tokens[:, 1:]
    probs = np.sort(rng.dirichlet(np.ones(K + 1), (SAMPLES, SEQUENCE))[:, :, :K])[:, :, ::-1]
    logs = np.log(np.maximum(probs, 1e-4)).astype(np.float16)
    return torch.tensor(tokens), torch.tensor(ids), torch.tensor(logs)


def member(values: Tensor, ids: Tensor) -> bytes:
    """A payload: [sequence, samples, K]."""
    file = io.BytesIO()
    content = {
        "values": values,
        "indices_low": (ids & 0xFFFF).to(torch.uint16),
        "bit_17": (ids >> 16).to(torch.bool),
        "format_version": 2,
    }
    torch.save(content, file)
    return pa.Codec("zstd").compress(file.getvalue(), asbytes=True)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def cache(
    root: Path, micro: int, ranks: int, batch: int, p: float | None = None, **changes: Any
) -> tuple[Path, Path]:
    """The tars, two iterations in each, and the tokens of the samples."""
    tokens, ids, logs = samples()
    if p is not None:
        outside = torch.arange(K) >= 3
        ids, logs = torch.where(outside, -1, ids), torch.where(outside, -1e4, logs)
    saver = {"k": K, "p": p, "min_k": 2, "save_dtype": "fp16", "format_version": 2}
    saver |= {"mbs_save": micro, "dp_size_save": ranks, "gbs_save": batch} | changes
    saver = {name: value for name, value in saver.items() if name != "format_version" or value}
    meta = json.dumps({"hash": "0" * 32, "identifiers": {}, "saver": saver}).encode()
    root.mkdir()
    for rank in range(ranks):
        members: dict[str, bytes] = {}
        for iteration in range(SAMPLES // batch):
            own = [
                iteration * batch + (step * ranks + rank) * micro + each
                for step in range(batch // (micro * ranks))
                for each in range(micro)
            ]
            members[f"{iteration}.pt.zst"] = member(
                logs[own].half().transpose(0, 1), ids[own].transpose(0, 1)
            )
            if iteration % 2 or iteration == SAMPLES // batch - 1:
                write_tar(root / f"dp{rank}__{iteration}.tar", {"_meta.json": meta} | members)
                members = {}
    rows = [{"input_ids": each} for each in tokens.tolist()]
    pq.write_table(pa.Table.from_pylist(rows), root / "tokens.parquet")
    return root / "tokens.parquet", root


def imported(cached: tuple[Path, Path], model: Path, **options: Any) -> Path:
    file, tars = cached
    out = tars / "scores"
    given = {"logits": tars} | options
    import_scores(ImportSettings(file, "megatron", str(model), out, **given))
    assert list(verify(out)) == []
    return out


@pytest.mark.parametrize(("micro", "ranks", "batch"), [(1, 1, 16), (2, 2, 8), (1, 4, 4), (4, 2, 8)])
def test_every_layout_gives_each_sample_its_own_entries(
    model: Path, tmp_path: Path, micro: int, ranks: int, batch: int
) -> None:
    tokens, ids, logs = samples()
    folder = imported(cache(tmp_path / "cache", micro, ranks, batch), model)
    found = list(read_scores(folder))
    assert len(found) == SAMPLES
    for sample, example in enumerate(found):
        assert example.input_ids.tolist() == tokens[sample].tolist()
        assert example.positions.tolist() == list(range(1, SEQUENCE + 1))
        assert example.counts.tolist() == [K] * SEQUENCE
        assert example.topk_ids.tolist() == ids[sample].flatten().tolist()
        np.testing.assert_allclose(example.topk_log_probs, logs[sample].flatten().float())
        np.testing.assert_allclose(example.observed_log_probs, logs[sample, :, 1].float())
    names = {f"dp{rank}__{last}.tar" for rank in range(ranks) for last in _lasts(batch)}
    assert set(read_manifest(folder).identity.inputs) == {"tokens.parquet", *names}


def _lasts(batch: int) -> list[int]:
    iterations = SAMPLES // batch
    return sorted({*range(1, iterations, 2), iterations - 1})


def test_beyond_the_nucleus_are_no_entries(model: Path, tmp_path: Path) -> None:
    _, ids, _ = samples()
    folder = imported(cache(tmp_path / "cache", 2, 2, 8, p=0.9), model)
    assert read_manifest(folder).settings["top_k"] == 2
    for sample, example in enumerate(read_scores(folder)):
        assert example.counts.tolist() == [3] * SEQUENCE
        assert example.topk_ids.tolist() == ids[sample, :, :3].flatten().tolist()


def test_samples_without_a_tar_are_rejected(model: Path, tmp_path: Path) -> None:
    cached = cache(tmp_path / "cache", 2, 2, 4)
    (cached[1] / "dp1__1.tar").unlink()
    folder = imported(cached, model)
    reasons = {
        json.loads(line)["line"]: json.loads(line)["reason"]
        for line in (folder / "rejects.jsonl").open()
    }
    assert sorted(reasons) == [3, 4, 7, 8]
    assert reasons[3] == "no tar holds iteration 0 of rank 1"


def test_what_is_refused(model: Path, tmp_path: Path) -> None:
    def refusal(cached: tuple[Path, Path], **options: Any) -> str:
        with pytest.raises(UserError) as refused:
            imported(cached, model, **options)
        assert not (cached[1] / "scores").exists()
        return str(refused.value)

    first = cache(tmp_path / "first", 2, 2, 8)
    assert "give both, or neither" in refusal(first, logits=None)
    assert "holds no tar of Megatron-LM's logits" in refusal(first, logits=tmp_path)
    for version, at in ((1, "1"), (3, "3"), (None, "1 or earlier")):
        other = cache(tmp_path / f"of {version}", 2, 2, 8, format_version=version)
        assert f"dp0__1.tar: is of format version {at} of Megatron-LM's" in refusal(other)
    later = cache(tmp_path / "later", 2, 2, 8)
    for tar in later[1].glob("*.tar"):
        tar.unlink()
    (later[1] / "a.json").write_text("no JSON")
    (later[1] / "cache.json").write_text('{"format_version": 3, "dp_size_save": 2}')
    assert refusal(later).endswith(
        "cache.json: is of format version 3 of Megatron-LM's log-probabilities, only version 2 is "
        "read: save them again with Megatron-LM at commit 10cc4f5"
    )
    unknown = cache(tmp_path / "unknown", 2, 2, 8, mbs_save=0)
    assert "dp0__1.tar: not a tar of Megatron-LM: Expected `int` >= 1" in refusal(unknown)
    write_tar(first[1] / "dp0__7.tar", {"0.pt.zst": b""})
    assert "it has no _meta.json" in refusal(first)
    (first[1] / "dp0__7.tar").write_bytes(b"not a tar")
    assert "not a tar of Megatron-LM" in refusal(first)
    damaged = cache(tmp_path / "damaged", 2, 1, 16)
    (tar,) = damaged[1].glob("*.tar")
    content = bytearray(tar.read_bytes())
    content[3000:3100] = bytes(100)
    tar.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        imported(damaged, model)


# Export


@pytest.fixture(scope="module")
def scores(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """With the top 100 of 320 ids, so that most tokens are among the entries."""
    return make_scores(tmp_path_factory.mktemp("many"), tiny_model, top_k=100)


@pytest.fixture(scope="module")
def exported(scores: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "tars"
    export_scores(ExportSettings(scores, out, "model", "megatron", 64))
    return out


def test_what_is_written_is_read_again(
    exported: Path, scores: Path, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    file = exported / "tokens.parquet"
    import_scores(ImportSettings(file, "megatron", str(tiny_model), folder, logits=exported))
    found = {tuple(each.input_ids): each for each in read_scores(folder)}
    assert len(found) > 20
    for example in read_scores(scores):
        other = found.get(tuple(example.input_ids))
        if other is None:  # no token of it is among the entries
            continue
        kept = np.isin(example.positions, other.positions)
        entries = np.repeat(kept, example.counts)
        assert other.topk_ids.tolist() == example.topk_ids[entries].tolist()
        np.testing.assert_array_equal(other.topk_log_probs, example.topk_log_probs[entries])


def test_the_fields_are_those_of_the_format(exported: Path, scores: Path) -> None:
    """Format version 2 at commit 10cc4f5: a leading _meta.json, then a payload an iteration."""
    assert sorted(each.name for each in exported.iterdir()) == ["dp0__0.tar", "tokens.parquet"]
    with tarfile.open(exported / "dp0__0.tar") as tar:
        assert tar.getnames() == ["_meta.json", "0.pt.zst"]
        meta, payload = (tar.extractfile(name) for name in tar.getnames())
        assert meta is not None
        assert payload is not None
        saver = json.loads(meta.read())["saver"]
        plain = pa.CompressedInputStream(pa.BufferReader(payload.read()), "zstd").read()
    wanted = {"format_version": 2, "mbs_save": 1, "dp_size_save": 1, "gbs_save": 64, "k": 100}
    assert wanted.items() <= saver.items()
    tensors = torch.load(io.BytesIO(plain), weights_only=True)
    values, low, high = (tensors[name] for name in ("values", "indices_low", "bit_17"))
    assert values.shape == low.shape == high.shape == (64, 64, 100)
    assert (low.dtype, high.dtype) == (torch.uint16, torch.bool)
    ids = high.long() << 16 | low.long()
    for sample, example in enumerate(read_scores(scores)):
        ends = np.cumsum(example.counts)
        for place, end in zip(example.positions, ends, strict=True):
            assert ids[place - 1, sample].tolist() == example.topk_ids[end - 100 : end].tolist()
        assert int((values[:, sample, 0] > -900).sum()) == len(example.positions)
    assert (values[:, 30:] == -1e3).all()


def test_what_export_refuses(scores: Path, tmp_path: Path) -> None:
    def refusal(*given: Any) -> str:
        with pytest.raises(UserError) as refused:
            export_scores(ExportSettings(scores, tmp_path / "out", *given))
        assert list(tmp_path.iterdir()) == []
        return str(refused.value)

    assert "needs --sequence-length" in refusal("model", "megatron")
    assert "give --mass model" in refusal("top-k", "megatron", 64)
    assert "--sequence-length 5 takes 6" in refusal("model", "megatron", 5)


class Hostile:
    """What pickle would run as it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def with_payload(root: Path, content: Any) -> tuple[Path, Path]:
    """A cache of one tar with this payload, given as bytes or to be saved."""
    file, folder = cache(root, 2, 1, 16)
    (path,) = folder.glob("*.tar")
    with tarfile.open(path) as tar:
        meta = tar.extractfile("_meta.json")
        assert meta is not None
        kept = meta.read()
    saved = io.BytesIO()
    torch.save(content, saved)
    plain = content if isinstance(content, bytes) else saved.getvalue()
    packed = pa.Codec("zstd").compress(plain, asbytes=True)
    write_tar(path, {"_meta.json": kept, "0.pt.zst": packed})
    return file, folder


def test_a_payload_runs_nothing(model: Path, tmp_path: Path) -> None:
    hostile = with_payload(tmp_path / "cache", {"values": Hostile(tmp_path / "ran")})
    with pytest.raises(UserError, match="damaged: it holds "):
        imported(hostile, model)
    assert not (tmp_path / "ran").exists()


class Zeros:
    """What torch loads as so many zeros, also where it loads only what it considers as safe."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __reduce__(self) -> Any:
        return bytearray, (self.size,)


def deflated(content: Any) -> bytes:
    """As torch saves, but with the files of the archive compressed."""
    saved, packed = io.BytesIO(), io.BytesIO()
    torch.save(content, saved)
    with zipfile.ZipFile(saved) as plain, zipfile.ZipFile(packed, "w", 8) as archive:
        for name in plain.namelist():
            archive.writestr(name, plain.read(name))
    return packed.getvalue()


def test_a_payload_takes_no_more_than_a_limit(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However it expands: as zstd, as an archive, by strides of 0, or by what the pickle calls."""
    most = 1 << 20
    monkeypatch.setattr("qpipe.stages.exchange.megatron.MOST_BYTES", most)
    zeros = torch.zeros(most + 1, dtype=torch.uint8)
    fields = ("values", "indices_low", "bit_17")
    one = torch.zeros(1, 1, 1, dtype=torch.bool)
    payloads = {
        "zstd": bytes(most + 1),
        "archive": deflated(dict.fromkeys(fields, zeros)),
        "strides": dict.fromkeys(fields, one.expand(1 << 10, 1, 1 << 10)),
        "calls": {"values": Zeros(1 << 40)},
    }
    for name, content in payloads.items():
        reason = "it holds" if name == "calls" else f"an iteration takes more than {most:,} bytes"
        with pytest.raises(UserError, match=f"damaged: {reason}"):
            imported(with_payload(tmp_path / name, content), model)


def test_iterations_of_ranks_are_held_up_to_a_limit(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was let go is read again."""
    cached = cache(tmp_path / "cache", 1, 4, 16)
    whole = list(read_scores(imported(cached, model)))
    tensors = SEQUENCE * 4 * K * (2 + 2 + 1)
    monkeypatch.setattr("qpipe.stages.exchange.megatron.MOST_HELD", 2 * tensors)
    shutil.rmtree(cached[1] / "scores")
    found = list(read_scores(imported(cached, model)))
    assert len(found) == len(whole) == SAMPLES
    for ours, theirs in zip(found, whole, strict=True):
        assert ours.topk_ids.tolist() == theirs.topk_ids.tolist()
