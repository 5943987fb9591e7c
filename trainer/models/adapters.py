"""LoRA (arXiv 2106.09685): which weights of a model get an adapter.

They are every linear layer but the head, and the experts of a mixture, which transformers stores
as one three-dimensional parameter. A layer whose weights the model uses without calling it cannot
carry an adapter: that is tried on a few tokens, and known of the mixers of Mamba, whose kernels
take the weights. Neither can layers that share their weights (Zamba 2): each would have an adapter
of its own, and merging would add all of them to the one weight.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from transformers.pytorch_utils import Conv1D

from ...pipeline.errors import UserError, one_line
from ...pipeline.storage.files import sha256_of_file
from ...pipeline.storage.json_files import read_json, refuse_misfits, sha256_of_json
from .files import MERGE

_IN_KERNELS = {"x_proj", "dt_proj", "out_proj"}  # of a mixer of Mamba
# layers of a mixture with fused experts that peft would take for its experts
_RENAMED = {"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"}
_TRIED_TOKENS = 8
_STORED = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True, slots=True)
class Adapters:
    """The rank of adapters, their alpha, and the last words of the names of their layers.

    Alpha is twice the rank by default; without names all layers get an adapter. `stored` is the
    adapter to begin with, if it is not a new one.
    """

    rank: int
    alpha: float | None = None
    targets: tuple[str, ...] = ()
    stored: Path | None = None


class _Stored(msgspec.Struct):
    """What is read of the file `adapter_config.json` of peft."""

    peft_type: Literal["LORA"]
    base_model_name_or_path: str
    r: int
    lora_alpha: float
    revision: str | None = None
    modules_to_save: None = None  # whole layers beside the adapters


@dataclass(frozen=True, slots=True)
class StoredAdapter:
    """An adapter in a folder and the model that it belongs to."""

    folder: Path
    base: str
    revision: str | None
    rank: int
    alpha: float

    def hash(self) -> str:
        """The hash of its weights and configuration."""
        return sha256_of_json({name: sha256_of_file(self.folder / name) for name in _STORED})


def stored_adapter(model: str) -> StoredAdapter | None:
    """The adapter in a folder; None if it is something else.

    Raises UserError for an adapter that cannot be trained further.
    """
    folder = Path(model)
    path = folder / _STORED[0]
    if not model or not path.is_file() or (folder / "config.json").exists():
        return None
    with refuse_misfits(path, "LoRA adapter alone", MERGE):
        found = msgspec.convert(read_json(path), _Stored)
    if not (folder / _STORED[1]).is_file():
        raise UserError(f"model {model}: an adapter without {_STORED[1]}: fetch it again")
    given = found.base_model_name_or_path, found.revision, found.r, found.lora_alpha
    return StoredAdapter(folder, *given)


def with_adapters(model: Any, adapters: Adapters) -> Any:
    """A model in which only adapters train. Raises UserError for a name that no layer has."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("--lora-rank needs peft: pip install 'qpipe[lora]'") from error
    if adapters.stored is not None:
        return _continued(model, adapters.stored)
    targets = adapters.targets
    layers, experts = _layers(model), _experts(model)
    _refuse_unknown(targets, {*map(_last, layers), *map(_last, experts)})
    chosen = [name for name in layers if not targets or _last(name) in targets]
    as_modules = {_last(name, 2) for name in chosen if not (experts and _last(name) in _RENAMED)}
    parameters = [f"{name}.weight" for name in chosen if _last(name, 2) not in as_modules]
    config = LoraConfig(
        r=adapters.rank,
        lora_alpha=adapters.alpha or 2 * adapters.rank,  # pyright: ignore[reportArgumentType]
        target_modules=sorted(as_modules),
        exclude_modules=[
            name
            for name, _ in _linear(model)
            if _last(name, 2) in as_modules and name not in chosen
        ],
        target_parameters=sorted(
            {_last(name, 2) for name in experts if not targets or _last(name) in targets}
            | {_last(name, 3) for name in parameters}
        ),
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _continued(model: Any, folder: Path) -> Any:
    """A model with a stored adapter. Raises UserError where the adapter does not fit it."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        adapted: Any = PeftModel.from_pretrained(model, folder, is_trainable=True)
        with safe_open(folder / _STORED[1], "pt") as file:
            others = {*file.keys()} ^ {*get_peft_model_state_dict(adapted)}
        if others:  # peft would leave them as they are
            raise ValueError(f"{min(others)} is in one of them alone")
    except Exception as error:  # damaged, or of another model: each library has its own errors
        raise UserError(
            f"model {folder}: the adapter does not fit its base: {one_line(error)}: give the "
            "adapter of this base"
        ) from error
    return adapted


def _layers(model: Any) -> list[str]:
    """The names of the linear layers that can carry an adapter."""
    head, modules = model.get_output_embeddings(), dict(model.named_modules())
    uses = Counter(layer.weight for _, layer in _linear(model))
    linear = [
        name
        for name, layer in _linear(model)
        if layer is not head
        and layer.weight.requires_grad
        and uses[layer.weight] == 1
        and not (_last(name) in _IN_KERNELS and hasattr(modules[name.rpartition(".")[0]], "D"))
    ]
    called = _called(model)
    return [name for name in linear if _kind(name) in called]


def _linear(model: Any) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D):
            yield name, module


def _experts(model: Any) -> list[str]:
    """The names of the parameters that hold the weights of all experts of a layer."""
    return [
        f"{name}.{each}"
        for name, module in model.named_modules()
        if "expert" in f"{name}{type(module).__name__}".lower()
        for each, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.requires_grad
    ]


@torch.no_grad()
def _called(model: Any) -> set[str]:
    """The kinds of linear layers that run as modules, in any of the model's layers and experts.

    Some inherit from a linear layer and return something else: routers, and layers that multiply in
    groups. They are left out.
    """
    called: set[str] = set()

    def note(name: str, layer: Any, output: Any) -> None:
        width = layer.nf if isinstance(layer, Conv1D) else layer.out_features
        if isinstance(output, torch.Tensor) and output.shape[-1] == width:
            called.add(_kind(name))

    hooks = [
        layer.register_forward_hook(lambda layer, _, output, name=name: note(name, layer, output))
        for name, layer in _linear(model)
    ]
    was_training = model.training
    model.eval()
    try:
        model(input_ids=torch.arange(_TRIED_TOKENS, device=model.device)[None], use_cache=False)
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    return called


def _kind(name: str) -> str:
    """A name without the numbers of layers and experts."""
    return re.sub(r"\d+", "*", name)


def _last(name: str, words: int = 1) -> str:
    return ".".join(name.split(".")[-words:])


def _refuse_unknown(targets: Sequence[str], known: set[str]) -> None:
    for target in targets:
        if target not in known:
            raise UserError(
                f"--lora-targets {target}: no layer of this name can carry an adapter: give some "
                f"of {', '.join(sorted(known))}"
            )
