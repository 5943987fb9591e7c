"""Packed corpora of DistillKit: against an encoder that is written out here bit by bit."""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from numpy.typing import NDArray
from qpipe.pipeline import read_scores
from qpipe.pipeline.errors import UserError
from qpipe.pipeline.folders.manifest import read_manifest
from qpipe.stages.exchange.import_scores import import_scores
from qpipe.stages.exchange.settings import ImportSettings
from qpipe.stages.folders.verify import verify

VOCAB = 320  # of the tiny model
PLAIN = {"d": VOCAB, "k": 6, "exact_k": 6, "residual_bins": [], "delta_encoding": False}
SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.uint64()),
        "compressed_logprobs": pa.list_(pa.list_(pa.uint8())),
        "bytepacked_indices": pa.list_(pa.list_(pa.uint8())),
    }
)
CODES = {"float16": "<e", "float32": "<f", "float64": "<d"}


def number(value: float, kind: str) -> bytes:
    if kind == "bfloat16":
        return struct.pack("<f", value)[2:]
    return struct.pack(CODES[kind], value)


def bits(numbers: Sequence[int], width: int) -> bytes:
    text = "".join(f"{each:0{width}b}" for each in numbers)
    text += "0" * (-len(text) % 8)
    return bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8))


def coded(values: Sequence[float], config: dict[str, Any], coefficients: Sequence[float]) -> bytes:
    """The bytes of a position's values, of which the coefficients are given."""
    numbers = list(values)
    if config.get("delta_encoding", True):
        numbers = [numbers[0], *np.diff(numbers).tolist()]
    exact = config["exact_k"]
    content = b"".join(
        number(each, config.get("exact_dtype", "float32")) for each in numbers[:exact]
    )
    content += b"".join(number(each, config.get("term_dtype", "float32")) for each in coefficients)
    at = np.arange(len(numbers) - exact, dtype=float)
    if config.get("normalize_t"):
        at = at / max(at[-1], 1)
    fit = np.zeros(len(at))
    for term, factor in zip(config.get("polynomial_terms") or [], coefficients, strict=True):
        fit += factor * (getattr(np, term)(at) if isinstance(term, str) else at**term)
    rest = (np.array(numbers[exact:]) - fit).tolist()
    for bin in config["residual_bins"]:
        part, rest = rest[: bin["num_elements"]], rest[bin["num_elements"] :]
        width = bin["element_bits"]
        most = 1.0 if width == 1 else 2.0 ** (width - 1)
        scale = max(map(abs, part)) / most or 1.0
        low = 0 if width == 1 else -(2 ** (width - 1))
        high = 1 if width == 1 else 2 ** (width - 1) - 1
        whole = [min(max(round(each / scale), low), high) - low for each in part]
        content += number(scale, bin["scale_dtype"]) + bits(whole, width)
    return content


def corpus(
    folder: Path,
    config: dict[str, Any],
    rows: Sequence[tuple[list[int], NDArray[np.int64], NDArray[np.float64]]],
    coefficients: Sequence[float] = (),
) -> Path:
    """A file of rows of tokens, ids [T-1, k] and log-probabilities, and its settings beside it."""
    folder.mkdir()
    (folder / "compression_config.yaml").write_text(yaml.safe_dump(config))
    packed = [
        {
            "input_ids": tokens,
            "compressed_logprobs": [list(coded(each, config, coefficients)) for each in logs],
            "bytepacked_indices": [
                list(bits(each.tolist(), (config["d"] - 1).bit_length())) for each in ids
            ],
        }
        for tokens, ids, logs in rows
    ]
    pq.write_table(pa.Table.from_pylist(packed, SCHEMA), folder / "data_0.parquet")
    return folder / "data_0.parquet"


def a_row(k: int = 6, seed: int = 0, tokens: int = 9) -> Any:
    """Tokens, and at each position k ids with the next token among them, most probable first."""
    rng = np.random.default_rng(seed)
    input_ids = rng.integers(0, 256, tokens).tolist()
    ids = np.array([[each, *_others(rng, each, k - 1)] for each in input_ids[1:]])
    probs = np.sort(rng.dirichlet(np.ones(k + 1), tokens - 1)[:, :k], axis=1)[:, ::-1]
    return input_ids, rng.permuted(ids, axis=1), np.log(np.maximum(probs, 1e-4))


def _others(rng: Any, taken: int, count: int) -> list[int]:
    return rng.permutation([each for each in range(VOCAB) if each != taken])[:count].tolist()


def imported(path: Path, model: Path, out: Path, **options: Any) -> Path:
    import_scores(ImportSettings(path, "distillkit", str(model), out, **options))
    assert list(verify(out)) == []
    return out


@pytest.mark.parametrize(
    ("config", "coefficients", "error"),
    [
        (PLAIN, (), 1e-6),
        (PLAIN | {"d": 151936}, (), 1e-6),  # 18 bits an id
        (PLAIN | {"delta_encoding": True, "exact_dtype": "float64"}, (), 1e-6),
        (PLAIN | {"exact_dtype": "float16"}, (), 5e-3),
        (PLAIN | {"exact_dtype": "bfloat16"}, (), 4e-2),
        (
            PLAIN
            | {
                "exact_k": 2,
                "polynomial_terms": [0, 1, 2, "sqrt", "exp"],
                "residual_bins": [
                    {"scale_dtype": "float16", "element_bits": 12, "num_elements": 3},
                    {"scale_dtype": "float32", "element_bits": 17, "num_elements": 1},
                ],
            },
            (-3.0, -0.5, 0.01, -0.2, 0.001),
            1e-2,
        ),
        (
            PLAIN
            | {
                "exact_k": 1,
                "polynomial_terms": [0, 1],
                "normalize_t": True,
                "delta_encoding": True,
                "residual_bins": [
                    {"scale_dtype": "float64", "element_bits": 20, "num_elements": 5}
                ],
            },
            (-0.5, -0.25),
            1e-3,
        ),
    ],
    ids=["exact", "large vocabulary", "deltas", "float16", "bfloat16", "terms", "normalised"],
)
def test_every_part_of_the_code_is_read(
    config: dict[str, Any],
    coefficients: tuple[float, ...],
    error: float,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    rows = [a_row(seed=seed) for seed in range(3)]
    path = corpus(tmp_path / "corpus", config, rows, coefficients)
    found = list(read_scores(imported(path, tiny_model, tmp_path / "scores")))
    assert len(found) == 3
    for example, (tokens, ids, logs) in zip(found, rows, strict=True):
        assert example.input_ids.tolist() == tokens
        assert example.positions.tolist() == list(range(1, len(tokens)))
        assert example.counts.tolist() == [6] * len(ids)
        for at, (of_ids, of_logs) in enumerate(zip(ids, logs, strict=True)):
            part = slice(6 * at, 6 * at + 6)
            kept = dict(
                zip(
                    example.topk_ids[part].tolist(),
                    example.topk_log_probs[part].tolist(),
                    strict=True,
                )
            )
            wanted = dict(zip(of_ids.tolist(), of_logs.tolist(), strict=True))
            assert kept == pytest.approx(wanted, abs=error)
            assert example.observed_log_probs[at] == pytest.approx(
                wanted[tokens[at + 1]], abs=error
            )
            assert example.tail_mass[at] == pytest.approx(1 - np.exp(of_logs).sum(), abs=error)


def test_one_bit_residuals_are_the_scale_or_its_negative(tiny_model: Path, tmp_path: Path) -> None:
    bin = {"scale_dtype": "float32", "element_bits": 1, "num_elements": 5}
    config = PLAIN | {"exact_k": 1, "residual_bins": [bin]}
    tokens, ids, logs = a_row()
    path = corpus(tmp_path / "corpus", config, [(tokens, ids, logs)])
    table = pq.read_table(path).to_pylist()
    content = number(-0.5, "float32") + number(2.0, "float32") + bits([0, 0, 0, 0, 0], 1)
    table[0]["compressed_logprobs"] = [list(content)] * len(ids)
    pq.write_table(pa.Table.from_pylist(table, SCHEMA), path)
    (found,) = read_scores(imported(path, tiny_model, tmp_path / "scores"))
    np.testing.assert_allclose(
        np.exp(found.topk_log_probs[:6]),
        np.exp([-0.5, *[-2.0] * 5]) / np.exp([-0.5, *[-2.0] * 5]).sum(),
        rtol=1e-6,
    )


def test_a_sum_above_one_is_scaled_and_counted(tiny_model: Path, tmp_path: Path) -> None:
    tokens, ids, logs = a_row()
    logs = logs.copy()
    logs[2] = np.log([0.9, 0.5, 0.05, 0.03, 0.02, 0.01])
    path = corpus(tmp_path / "corpus", PLAIN, [(tokens, ids, logs)])
    folder = imported(path, tiny_model, tmp_path / "scores")
    (found,) = read_scores(folder)
    probs = np.exp(found.topk_log_probs[12:18])
    np.testing.assert_allclose(probs, np.exp(logs[2]) / 1.51, rtol=1e-5)
    assert found.tail_mass[2] == pytest.approx(0, abs=1e-6)
    assert read_manifest(folder).totals["sums"]["scaled"] == 1
    assert read_manifest(folder).settings["codec"]["k"] == 6


def test_what_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    path = corpus(tmp_path / "corpus", PLAIN, [a_row(), a_row(seed=1)])
    config = path.with_name("compression_config.yaml")

    def refusal(**options: Any) -> str:
        with pytest.raises(UserError) as refused:
            imported(path, tiny_model, tmp_path / "refused", **options)
        assert not (tmp_path / "refused").exists()
        return str(refused.value)

    kept = config.read_text()
    config.write_text("d: 320\nk: six\n")
    assert "not DistillKit's settings" in refusal()
    config.write_text(yaml.safe_dump(PLAIN | {"exact_k": 7}))
    assert "hold more than k 6 values" in refusal()
    config.unlink()
    assert f"{config} is missing" in refusal()
    elsewhere = tmp_path / "settings.yaml"
    elsewhere.write_text(kept)
    assert len(list(read_scores(imported(path, tiny_model, tmp_path / "in", codec=elsewhere)))) == 2


def test_rows_of_another_width_are_rejected(tiny_model: Path, tmp_path: Path) -> None:
    path = corpus(tmp_path / "corpus", PLAIN, [a_row(), a_row(seed=1)])
    table = pq.read_table(path).to_pylist()
    table[0]["compressed_logprobs"][3] = [1, 2, 3]
    pq.write_table(pa.Table.from_pylist(table, SCHEMA), path)
    folder = imported(path, tiny_model, tmp_path / "scores")
    (line,) = (folder / "rejects.jsonl").read_text().splitlines()
    reason = json.loads(line)["reason"]
    assert reason == "compressed_logprobs: a position has 3 bytes, by the settings 24"
