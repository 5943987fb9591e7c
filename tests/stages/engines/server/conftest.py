"""A server, and the scores that it should give."""

import threading
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from qpipe.pipeline.format.records import ScoredExample
from qpipe.stages.engines.choose import make_scorer
from qpipe.stages.engines.settings import EngineSettings
from qpipe.trainer.models.files import ModelFiles, find_model

from .fake import EXAMPLES, Fake, Handler


@pytest.fixture(scope="session")
def files(tiny_model: Path) -> ModelFiles:
    return find_model(str(tiny_model))


@pytest.fixture(scope="session")
def model(tiny_model: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


@pytest.fixture
def fake(files: ModelFiles, model: Any) -> Iterator[Fake]:
    fake = Fake(files, model)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"fake": fake}))
    server.handle_error = lambda *_: None  # clients that gave up
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    fake.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield fake
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="session")
def expected(files: ModelFiles) -> Callable[[int], list[ScoredExample]]:
    scorer = make_scorer(files, EngineSettings("transformers", "float32", max_length=255))

    def scores(top_k: int) -> list[ScoredExample]:
        by_place = dict(scorer.score(EXAMPLES, top_k))
        return [by_place[place] for place in range(len(EXAMPLES))]

    return scores
