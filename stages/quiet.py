"""Keeps the libraries' chatter out of the commands' output; their errors stay."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Raise the log levels of torch, transformers and vLLM, unless the environment sets them.

    Must run before any of them is imported.
    """
    for name, value in {
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "TRANSFORMERS_VERBOSITY": "error",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "TOKENIZERS_PARALLELISM": "true",
    }.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
