"""torch.compile for the layers of a model."""

from typing import Any

from .heads import causal_model

NOT_COMPILED = "the layers are not compiled: --compile usually makes the steps of a GPU faster"


def compile_layers(model: Any) -> None:
    """Compile the decoder layers of a model, each on its own, when they first run.

    All layers share one graph, so the compilation takes as long as that of one layer. Its shapes
    are dynamic: packs of other lengths do not compile again.
    """
    blocks = set(causal_model(model)._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in blocks:
            module.compile(dynamic=True)
