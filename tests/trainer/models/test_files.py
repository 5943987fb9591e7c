"""Files of models that no model has."""

import json
import shutil
from pathlib import Path

import pytest
from qpipe.pipeline.errors import UserError
from qpipe.trainer.models.files import find_model


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_dimensions_of_zero_are_refused(tiny_model: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text()) | {name: 0}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"tiny: config.json has {name} 0: fetch the model again"):
        find_model(str(folder))
