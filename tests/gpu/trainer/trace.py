"""One step under the profiler: waits of the host, kernels by time; the trace is kept."""

from functools import partial
from typing import Any

from qpipe.trainer.data.batch import packed_batch

from .measure import DEVICE, OUT, synchronize, tried
from .steps import our_stepper
from .work import make_steps


def trace() -> None:
    """One step under the profiler: waits of the host, kernels by time; the trace is kept."""
    for compiled in (True, False):
        tried("trace", "compiled" if compiled else "eager", partial(traced_step, compiled))


def traced_step(compiled: bool) -> dict[str, Any]:
    from torch.profiler import ProfilerActivity, profile

    stepper = our_stepper("0.6B", "sft+kl", compiled)
    batches = [packed_batch(examples) for examples in make_steps(2)]
    for number in range(6):
        stepper.step(number + 1, [batches[number % 2].to(DEVICE)], 1e-6)
    ready = batches[0].to(DEVICE)
    synchronize()
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if DEVICE.type == "cuda" else []
    with profile(activities=activities) as profiled:
        stepper.step(7, [ready], 1e-6)
        synchronize()
    events = profiled.key_averages()
    waits = {
        event.key: event.count
        for event in events
        if "Synchronize" in event.key or event.key in ("aten::item", "aten::_local_scalar_dense")
    }
    kernels = sorted(events, key=lambda event: -event.self_device_time_total)[:14]
    for event in kernels:
        print(
            f"    {event.self_device_time_total / 1e3:8.2f} ms {event.count:5} x {event.key[:90]}"
        )
    profiled.export_chrome_trace(str(OUT / f"step-{'compiled' if compiled else 'eager'}.json.gz"))
    total = sum(event.self_device_time_total for event in events) / 1e3
    return {"waits": waits, "GPU ms": round(total, 1)}
