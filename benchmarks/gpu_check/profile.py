"""Where the time of a step on the device goes: kernels of a few replays of a step, by name."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from gpu_check.model import has_model, load
from gpu_check.report import Options, Part
from gpu_check.timing import free_memory
from medusa.decoding.draft import Drafter
from medusa.device.stepper import DeviceStepper

if TYPE_CHECKING:
    from medusa.engines.transformers import TransformersBackend

REPLAYS = 5
SHOWN = 12  # kernels


def profile_part(part: Part, options: Options) -> None:
    """A plain step and one of 64 nodes of the real model."""
    if not has_model(part, options):
        return
    lm = load(options)
    backend: Any = lm.backend
    context = 64 if options.tiny else 512
    for name, nodes in (("none", 1), ("union", 64)):
        drafter = lm.make_stepper(name, nodes=1).drafter
        part.measure(f"{nodes} nodes", partial(kernels, backend, drafter, nodes, context, options))
    free_memory(options.device)


def kernels(
    backend: TransformersBackend, drafter: Drafter, nodes: int, context: int, options: Options
) -> dict[str, Any]:
    """Microseconds and calls in one step: of all kernels, and of those that take longest."""
    from torch.profiler import ProfilerActivity, profile

    stepper = DeviceStepper(backend, drafter, nodes)
    stepper.time_step(1, nodes, context, 3)  # captured, and warm
    activity = ProfilerActivity.CUDA if options.cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiled:
        stepper.time_step(1, nodes, context, REPLAYS - 2)  # which runs two more to warm up
    rows = []
    for event in profiled.key_averages():
        total = event.self_device_time_total if options.cuda else event.self_cpu_time_total
        if total:
            rows.append((total / REPLAYS, event.count / REPLAYS, event.key))
    rows.sort(reverse=True)
    return {
        "us": round(sum(us for us, *_ in rows), 1),
        "kernels": round(sum(count for _, count, _ in rows), 1),
        "longest": [
            {"us": round(us, 1), "calls": round(count, 1), "name": name[:120]} for us, count, name in rows[:SHOWN]
        ],
    }
