"""What the loss takes alone: memory, and on a GPU time, beside the dense one and Liger's kernel.

    python tests/benchmarks/loss.py

4096 supervised positions, width 896, vocabulary 151,936, support 32; the forward and the backward
pass. On a GPU in bfloat16, elsewhere in float32. Each loss has a process of its own, which this
file is as well when it is given the loss's name:

- fused: qpipe's, a few rows at a time;
- plain: qpipe's reference, on all logits at once;
- dense: the cross-entropy of torch on all logits, for the observed tokens alone;
- compiled: the same under `torch.compile`, on a GPU alone;
- liger: Liger's fused linear cross-entropy, where it is installed and there is a GPU.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from statistics import median

import torch
from qpipe.pipeline.methods import choose
from qpipe.stages.commands.tables import print_table
from qpipe.tests.benchmarks.figures import Figure, faster, publish
from qpipe.trainer.data.batch import SparseTargets
from qpipe.trainer.loss.fused import fused_loss
from qpipe.trainer.loss.head import Head
from qpipe.trainer.loss.objective import Objective
from torch import Tensor
from torch.nn.functional import cross_entropy

POSITIONS, VOCAB_SIZE, WIDTH, SUPPORT = 4096, 151_936, 896, 32
RUNS = 9  # timed, after three that warm up
ON_GPU = torch.cuda.is_available()


def main() -> None:
    """Measure each in turn, then print."""
    names = ["dense", "plain", "fused"]
    if ON_GPU:
        names += ["compiled", *(["liger"] if find_spec("liger_kernel") else [])]
    mib, seconds = {}, {}
    for name in names:
        mib[name], seconds[name] = in_own_process(name)
    print_table(
        [
            ("loss", "peak MiB", "of the dense", "median ms"),
            *(
                (name, f"{mib[name]:,.0f}", f"{mib[name] / mib['dense']:.2f}", milliseconds(times))
                for name, times in seconds.items()
            ),
        ]
    )
    what = f"the loss, {POSITIONS:,} positions, vocabulary {VOCAB_SIZE:,}"
    rivals = [name for name in ("dense", "compiled", "liger") if name in mib]
    figures = [smaller(f"memory of {what}", mib["fused"], name, mib[name]) for name in rivals]
    if ON_GPU:
        ours = seconds["fused"]
        figures += [faster(what, ours, n, seconds[n], POSITIONS, "positions") for n in rivals]
    publish(figures)


def in_own_process(name: str) -> tuple[float, list[float]]:
    """A loss's peak in MiB and its seconds."""
    command = [sys.executable, __file__, name]
    said = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    peak, seconds = json.loads(said.splitlines()[-1])
    return peak, seconds


def measure(name: str) -> None:
    """Print what a loss takes, in this process."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    hidden = torch.randn(POSITIONS, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB_SIZE, WIDTH, dtype=dtype).mul_(0.02).requires_grad_()
    loss = losses(random_targets())[name]

    def once() -> None:
        hidden.grad = weight.grad = None
        loss(hidden, weight).backward()
        if ON_GPU:
            torch.cuda.synchronize()

    before = peak_kib()
    once()
    peak = (peak_kib() - before) / 1024
    print(json.dumps([peak, timed(once) if ON_GPU else []]))


def random_targets() -> SparseTargets:
    """Even ones, the observed token among them."""
    observed = torch.randint(0, VOCAB_SIZE, (POSITIONS,))
    ids = torch.randint(0, VOCAB_SIZE, (POSITIONS, SUPPORT))
    ids[:, 0] = observed
    return SparseTargets(
        observed_ids=observed,
        example_of=torch.zeros(POSITIONS, dtype=torch.long),
        trust=torch.full((POSITIONS,), 0.9),
        weights=torch.ones(POSITIONS),
        support_ids=ids,
        support_mask=torch.ones(POSITIONS, SUPPORT, dtype=torch.bool),
        support_probs=torch.full((POSITIONS, SUPPORT), 0.98 / SUPPORT),
        tail_mass=torch.full((POSITIONS,), 0.02),
    )


def losses(targets: SparseTargets) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """Each loss by its name, of hidden states [N, D] and a head's weight [V, D]."""
    objective = Objective(choose("sft+kl"), "student", "base")

    def dense(hidden: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy((hidden @ weight.T).float(), targets.observed_ids)

    def liger(hidden: Tensor, weight: Tensor) -> Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets.observed_ids)

    return {
        "dense": dense,
        "plain": lambda hidden, weight: objective(Head(weight).logits(hidden), targets).sum,
        "fused": lambda hidden, weight: fused_loss(hidden, Head(weight), targets, objective).sum,
        "compiled": torch.compile(dense),
        "liger": liger,
    }


def timed(once: Callable[[], None]) -> list[float]:
    """The seconds of each run."""
    seconds = []
    for _ in range(3 + RUNS):
        start = time.perf_counter()
        once()
        seconds.append(time.perf_counter() - start)
    return seconds[3:]


def peak_kib() -> int:
    """Of this process alone: getrusage remembers the one that started it."""
    if ON_GPU:
        return torch.cuda.max_memory_allocated() // 1024
    with open("/proc/self/status") as status:
        return int(status.read().split("VmHWM:")[1].split()[0])


def smaller(what: str, ours: float, name: str, theirs: float) -> Figure:
    """How many times less memory ours takes, in MiB."""
    ratio = theirs / ours
    return Figure(what, f"{ours:,.0f} MiB", f"{name}: {theirs:,.0f} MiB", ratio, ratio, ratio)


def milliseconds(seconds: list[float]) -> str:
    """Their median."""
    return f"{median(seconds) * 1e3:.1f}" if seconds else "-"


if __name__ == "__main__":
    if len(sys.argv) == 1:
        main()
    else:
        if ON_GPU:
            torch.set_default_device("cuda")
        measure(sys.argv[1])
