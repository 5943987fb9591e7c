"""Models and tokenizers from a folder or the hub, with errors a user can act on."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...pipeline.errors import UserError, one_line, require_utf8
from ...pipeline.folders.provenance import tokenizer_hash, weights_hash

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

MERGE = (  # the way out for adapters
    "merge it into its base first: "
    "AutoPeftModelForCausalLM.from_pretrained(…).merge_and_unload().save_pretrained(…)"
)


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model's files on this machine, and what they hold besides the weights."""

    name: str  # as the user gave it; a folder's own name for a path
    revision: str | None
    folder: Path
    config: Any  # transformers' configuration
    tokenizer: "PreTrainedTokenizerFast"

    @property
    def origin(self) -> str:
        """The absolute path of a local model, or the name on the hub."""
        folder = self.folder.resolve()
        return str(folder) if folder.name == self.name else self.name

    @property
    def vocab_size(self) -> int:
        """The number of logits, which may exceed the tokenizer's vocabulary."""
        return self.config.get_text_config().vocab_size

    @property
    def max_length(self) -> int:
        """The longest sequence the model was made for, in tokens."""
        return getattr(self.config.get_text_config(), "max_position_embeddings", None) or 2**20

    @property
    def tokenizer_hash(self) -> str:
        """The hash of the tokenizer's behaviour."""
        return tokenizer_hash(self.tokenizer)

    def weights_hash(self) -> str:
        """The hash of the weights and configuration; reads them all."""
        return weights_hash(self.folder)


def find_model(
    model: str, revision: str | None = None, weights: bool = True, local: bool = False
) -> ModelFiles:
    """Locate a model and read its configuration and tokenizer; never runs code of the model.

    `model` is a folder, or a name on the hub, which is downloaded once to the hub's cache, with or
    without its weights; with `local`, for a name that the user did not give, nothing is downloaded.
    Raises UserError where it is missing or cannot be read.
    """
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

    folder, name = _locate(model, revision, weights, local)
    if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        raise UserError(f"model {model}: is an adapter, not a model: {MERGE}")
    if not (folder / "config.json").exists():
        raise UserError(f"model {model}: no config.json in it: give a Hugging Face model folder")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # damaged files raise errors of many libraries
        raise UserError(f"model {model}: cannot be read: {one_line(error)}") from error
    _refuse_sizes(model, config.get_text_config())
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise UserError(
            f"model {model}: its tokenizer is a {type(tokenizer).__name__}, which does not "
            "return the offsets of tokens: save a fast tokenizer (tokenizer.json) in the folder"
        )
    _refuse_empty(model, folder, tokenizer)
    return ModelFiles(name, revision, folder, config, tokenizer)


def _refuse_sizes(model: str, config: Any) -> None:
    """Raises UserError for dimensions that no model has, which transformers does not refuse."""
    for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
        size = getattr(config, name, None)
        if isinstance(size, int) and size < 1:
            raise UserError(f"model {model}: config.json has {name} {size}: fetch the model again")


def _refuse_empty(model: str, folder: Path, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Raises UserError where the files of a vocabulary are missing.

    transformers then makes a tokenizer of special tokens alone, which loses every text.
    """
    names = type(tokenizer).vocab_files_names
    own = [names[kind] for kind in ("vocab_file", "merges_file") if kind in names]
    missing = [name for name in own if not (folder / name).exists()]
    is_there = (folder / "tokenizer.json").exists() or (own and not missing)
    others = any(any(folder.glob(kind)) for kind in ("*.model", "*.tiktoken", "tekken.json"))
    is_empty = len(tokenizer.get_vocab()) <= len(tokenizer.get_added_vocab()) + 1
    if is_empty or not (is_there or others):
        raise UserError(
            f"model {model}: its tokenizer has no vocabulary: {' and '.join(missing) or 'the file'}"
            " of it is missing or empty, and so is tokenizer.json: fetch the model again"
        )


def load_model(files: ModelFiles, dtype: "torch.dtype") -> Any:
    """The model, its weights in `dtype`, on the CPU.

    Raises UserError where the weights are missing, damaged, incomplete, or not of a causal language
    model: the library would fill missing weights with random numbers.
    """
    return load_reported(files, dtype)[0]


def load_reported(files: ModelFiles, dtype: "torch.dtype") -> tuple[Any, set[str]]:
    """As `load_model`, with the names of tensors that loading reports as left out."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    # no fused attention of transformers caps its scores; only the eager one computes this model
    is_capped = getattr(files.config.get_text_config(), "attn_logit_softcapping", None)
    attention = {"attn_implementation": "eager"} if is_capped else {}
    try:
        loaded: Any = _class_of(files).from_pretrained(
            files.folder,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=False,
            **attention,
        )
    except Exception as error:  # damaged or quantised: each library has its own
        raise UserError(f"model {files.name}: cannot be loaded: {one_line(error)}") from error
    model, loading = loaded
    _refuse_incomplete(files, loading)
    return model, {*map(str, loading["unexpected_keys"])}


def _class_of(files: ModelFiles) -> Any:
    """The auto class that loads the class that a checkpoint names, and thus all of its parts."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    named = set(files.config.architectures or ())
    is_vision_language = named & {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
    return AutoModelForImageTextToText if is_vision_language else AutoModelForCausalLM


def load_scoring_model(files: ModelFiles, dtype: "torch.dtype") -> Any:
    """The model in evaluation mode on the first GPU, or on the CPU without one.

    Raises UserError as `load_model` does, where it does not fit on the GPU, and where it is not
    causal.
    """
    import torch

    from .causality import check_causal

    model = load_model(files, dtype).eval()
    try:
        model = model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"model {files.name}: does not fit on the GPU in {str(dtype).removeprefix('torch.')}: "
            "free memory there, or use the CPU (CUDA_VISIBLE_DEVICES= before the command); to "
            "score, --engine vllm shares a model out by --tensor-parallel-size"
        ) from error
    check_causal(files.name, model)
    return model


def check_weights(files: ModelFiles) -> None:
    """Raises UserError for incomplete weights, as far as their names show it.

    Called for engines that would fill the missing ones with random numbers.
    """
    if getattr(files.config, "quantization_config", None) is not None:
        return  # its weights have other names
    try:
        loaded: Any = _class_of(files).from_pretrained(
            files.folder, device_map="meta", output_loading_info=True, trust_remote_code=False
        )
    except Exception:  # an architecture of the engine alone, or the engine reports the error
        return
    _refuse_incomplete(files, loaded[1])


def _refuse_incomplete(files: ModelFiles, loading: dict[str, Any]) -> None:
    incomplete = sorted(map(str, [*loading["missing_keys"], *loading["mismatched_keys"]]))
    if incomplete:
        raise UserError(
            f"model {files.name}: {len(incomplete)} weights are missing or of another shape, "
            f"{incomplete[0]} among them: fetch the model again"
        )


def _locate(model: str, revision: str | None, weights: bool, local: bool) -> tuple[Path, str]:
    path = Path(model)
    if not model:
        raise UserError("--model is empty: give a model folder, or a name on the hub")
    if path.is_dir():
        require_utf8("model", path.resolve().name)
        return path, path.resolve().name
    if path.is_file():
        raise UserError(f"model {model}: is a file: give the folder it is in")
    if path.exists() or model.startswith(("/", "./", "../", "~")) or model.count("/") > 1:
        raise UserError(f"model {model}: no such folder: give one, or a name on the hub")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.model", "*.txt", "*.jinja"]
    if weights:
        patterns.append("*.safetensors")
    try:
        snapshot = snapshot_download(
            model, revision=revision, allow_patterns=patterns, local_files_only=local
        )
    except Exception as error:
        # the hub's client raises errors of many libraries: bad name, no network, no access, ...
        raise UserError(
            f"model {model}: no such folder here, and the hub cannot supply it: {one_line(error)}"
        ) from error
    return Path(snapshot), model
