"""Megatron-LM's tars of log-probabilities: written here as a teacher run of several ranks does."""

import io
import json
import tarfile
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
from qpipe.stages.exchange.import_scores import import_scores
from qpipe.stages.exchange.settings import ImportSettings
from qpipe.stages.folders.verify import verify
from torch import Tensor

from ...conftest import make_tiny_model

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
    assert "format version 1, only" in refusal(cache(tmp_path / "old", 2, 2, 8, format_version=1))
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
