"""The server scorer against a real vLLM server on this machine, with the real small model."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from qpipe.pipeline import read_scores
from qpipe.pipeline.folders.manifest import read_manifest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / ".cache" / "SmolLM2-135M-Instruct"
QPIPE = Path(sys.executable).with_name("qpipe")
MAX_LENGTH = 200
pytestmark = pytest.mark.slow


def qpipe(*arguments: object) -> subprocess.CompletedProcess[str]:
    words = [str(argument) for argument in arguments]
    return subprocess.run([QPIPE, *words], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a vLLM server; it takes about a minute to start."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # `vllm serve` by its module: the CPU build lacks the metadata that the command asks for
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(MODEL),
             "--served-model-name", "smol", "--dtype", "float32", "--enforce-eager",
             "--max-model-len", str(MAX_LENGTH + 1), "--max-num-batched-tokens", "512",
             "--max-logprobs", "-1", "--host", "127.0.0.1", "--port", str(port)]  # fmt: skip
    environment = os.environ | {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "TORCH_COMPILE_DISABLE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    folder = tmp_path_factory.mktemp("server")
    with (
        open(folder / "log", "w") as log,
        subprocess.Popen(words, env=environment, stdout=log, stderr=log, cwd=folder) as process,
    ):
        url = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + 300
            while not answers(url):
                assert process.poll() is None, (folder / "log").read_text()[-3000:]
                assert time.monotonic() < deadline, (folder / "log").read_text()[-3000:]
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return answer.status == 200
    except OSError:
        return False


@pytest.fixture(scope="module")
def score(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    """A command that lacks --engine and --out."""
    lines = (ROOT / "data" / "arithmetic.jsonl").read_text().splitlines()[:12]
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    long = {"prompt": "Count.", "completion": " ".join(map(str, range(40)))}
    file.write_text("\n".join([*lines, json.dumps(long)]) + "\n")
    return ("score", "--model", MODEL, "--demonstrations", file, "--top-k", 24, "--shard-size", 5,
            "--max-length", MAX_LENGTH, "--supervise", "all")  # fmt: skip


def test_scores_are_those_of_transformers(
    server: str, score: tuple[object, ...], tmp_path: Path
) -> None:
    for engine, options in (
        ("server", ("--server-url", f"{server}/v1", "--server-requests", 4, "--dtype", "float32")),
        ("transformers", ()),
    ):
        done = qpipe(*score, "--engine", engine, *options, "--out", tmp_path / engine)
        assert done.returncode == 0, done.stderr
    positions = 0
    for one, other in zip(
        read_scores(tmp_path / "server"), read_scores(tmp_path / "transformers"), strict=True
    ):
        np.testing.assert_array_equal(one.input_ids, other.input_ids)
        np.testing.assert_array_equal(one.positions, other.positions)
        np.testing.assert_allclose(one.observed_log_probs, other.observed_log_probs, atol=2e-4)
        np.testing.assert_allclose(one.topk_log_probs, other.topk_log_probs, atol=2e-4)
        np.testing.assert_allclose(one.tail_mass, other.tail_mass, atol=2e-4)
        positions += len(one.positions)
    assert positions > 500
    settings = read_manifest(tmp_path / "server").settings
    assert (settings["engine"], settings["dtype"]) == ("server", "float32")
    assert (settings["server_model"], settings["weights_hash"]) == ("smol", None)


def test_a_server_for_shorter_examples_is_refused(
    server: str, score: tuple[object, ...], tmp_path: Path
) -> None:
    done = qpipe(*score, "--max-length", MAX_LENGTH + 1, "--engine", "server", "--server-url",
                 server, "--out", tmp_path / "out")  # fmt: skip
    assert done.returncode == 2
    assert f"start it with --max-model-len {MAX_LENGTH + 2}" in done.stderr


def test_a_model_of_another_vocabulary_is_refused(
    server: str, score: tuple[object, ...], tiny_model: Path, tmp_path: Path
) -> None:
    done = qpipe(*score, "--model", tiny_model, "--max-length", 100, "--engine", "server",
                 "--server-url", server, "--out", tmp_path / "out")  # fmt: skip
    assert done.returncode == 2
    assert "its tokenizer is another one than that of --model tiny" in done.stderr
