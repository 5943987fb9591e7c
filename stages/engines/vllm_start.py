"""Starts and stops a vLLM engine with room for prompt log-probabilities."""

import logging
import os
import sys
from typing import Any

from ...pipeline.errors import UserError, one_line
from ...pipeline.progress import say_once
from ...trainer.models.files import ModelFiles
from .settings import EngineSettings
from .supervised_rows.worker import RowsExtension
from .vllm_arrays import keeps_tensors
from .vllm_memory import CPU_KV_CACHE, MAX_SEQUENCES, EngineMemory
from .vllm_requests import Abilities

_MEMORY_WORDS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "bad_alloc",
    "free memory on device",  # less of it than vLLM's share
)
_NO_MORE = "initialization failed"  # the only message about an engine in another process


class EngineStoppedError(Exception):
    """Raised when the engine ended, probably out of memory: smaller steps may help."""


def start_engine(model: ModelFiles, settings: EngineSettings, memory: EngineMemory) -> Any:
    """Start a `vllm.LLM` with the weights of `model`.

    Raises EngineStoppedError if memory ran out, UserError if it cannot start for another reason.
    """
    _prepare_environment(settings, model.max_length)
    try:
        from vllm import LLM

        llm = LLM(
            model=str(model.folder),
            dtype=settings.dtype,
            hf_overrides={"head_dtype": "float32"} if settings.head_dtype == "float32" else {},
            max_model_len=settings.max_length + 1,  # a prompt needs one free position
            max_num_batched_tokens=memory.scheduled_tokens,
            max_num_seqs=min(MAX_SEQUENCES, memory.scheduled_tokens),
            max_logprobs=-1,
            logprobs_mode="raw_logprobs",
            tensor_parallel_size=settings.tensor_parallel_size,
            pipeline_parallel_size=settings.pipeline_parallel_size,
            gpu_memory_utilization=memory.utilization,
            # None: if vLLM holds it to be right for the model, that is, not for hybrid ones
            enable_prefix_caching=None if settings.reads_prefixes else False,
            worker_extension_cls=f"{RowsExtension.__module__}.{RowsExtension.__name__}",
            language_model_only=True,  # encoders of images would be loaded and tried out
            enforce_eager=True,  # only prefill is run
            use_tqdm_on_load=sys.stderr.isatty(),
            seed=0,
        )
        llm.collective_rpc("qpipe_fuse_layers")
        return llm
    except Exception as error:
        # vLLM raises many kinds, from bad configurations to memory
        if is_memory(error):
            raise EngineStoppedError(one_line(error)) from error
        raise UserError(
            f"vLLM cannot start with model {model.name}: {one_line(error)}: "
            "try --engine transformers, --head-dtype model, or a smaller --max-length"
        ) from error


def stop_engine(llm: Any) -> None:
    """Stop an engine, also one that failed, and free its memory.

    Any reference to `llm` or its engine keeps the weights of an engine in this process.
    """
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def abilities(llm: Any, settings: EngineSettings) -> Abilities:
    """What an engine can do, by asking it; installs the computation of supervised rows alone."""
    engine, keeps = llm.llm_engine, keeps_tensors()
    cache = engine.vllm_config.cache_config
    return Abilities(
        keeps_tensors=keeps,
        rows_alone=keeps and settings.rows_alone and _install_rows(llm, settings.top_k),
        block_size=cache.block_size if cache.enable_prefix_caching else 0,
    )


def _install_rows(llm: Any, top_k: int) -> bool:
    answers = llm.collective_rpc("qpipe_install_rows", args=(top_k,))
    reasons = [reason for reason in answers if reason]
    if reasons:
        say_once(f"log-probabilities of every token by vLLM itself, slower: {reasons[0]}")
    return not reasons


def is_memory(error: BaseException) -> bool:
    """Whether an engine's error means, or may mean, that memory ran out.

    Of an engine in another process only its end is visible.
    """
    import torch
    from vllm.v1.engine.exceptions import EngineDeadError

    if isinstance(error, MemoryError | torch.OutOfMemoryError | EngineDeadError):
        return True
    return says_no_more(str(error)) or _names_memory(str(error))


def says_no_more(message: str) -> bool:
    """Whether the error of an engine that did not start leaves the cause open."""
    return _NO_MORE in message.lower() and not _names_memory(message)


def _names_memory(message: str) -> bool:
    return any(words in message.lower() for words in _MEMORY_WORDS)


def _prepare_environment(settings: EngineSettings, model_limit: int) -> None:
    """Set options of vLLM that exist only as environment variables, unless the user set them."""
    import torch

    defaults = {}
    if settings.max_length + 1 > model_limit:
        # the free position is never computed, so the model's own limit still holds
        defaults["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    if torch.cuda.is_available():
        # CUDA fails in a forked process once its parent has initialised it
        defaults["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
        if settings.dtype == "float32":
            defaults["TRITON_F32_DEFAULT"] = "ieee"  # its attention would compute in TF32
    else:
        defaults |= {
            "VLLM_CPU_KVCACHE_SPACE": str(CPU_KV_CACHE),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # a worker process would bind to one core
        }
        # the first request would spend half a minute compiling
        torch._dynamo.config.disable = True
        logging.getLogger("torch._library.triton").setLevel(logging.ERROR)  # about triton
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
