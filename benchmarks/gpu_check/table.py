"""The report of `scripts/gpu-check` as a table for people, of at most 60 lines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from medusa.errors import shortened

LINES = 60
WIDTH = 150


def table(data: Mapping[str, Any]) -> str:
    """The whole table."""
    machine, versions = data.get("machine", {}), data.get("machine", {}).get("versions", {})
    lines = [
        f"{machine.get('name')}, {machine.get('memory_GB')} GB, driver {machine.get('driver')}; "
        f"torch {versions.get('torch')}, transformers {versions.get('transformers')}, python {versions.get('python')}"
    ]
    parts = data["parts"]
    lines.append(
        "  ".join(f"{name}: {part['status']} ({part.get('seconds', 0):.0f} s)" for name, part in parts.items())
    )
    for name, part in parts.items():  # first, so that a table that is cut short tells them
        for error in part.get("errors", [])[:4]:
            lines.append(f"  ! {name}: {error['where']}: {error['type']}: {error['message']}")
    for name, part in parts.items():
        lines += _MAKERS[name](part.get("found") or {})
        lines += [f"  ({name}: {note})" for note in part.get("notes", [])[:3]]
        if left_out := part.get("left_out"):
            lines.append(f"  ({name}: no time for {', '.join(left_out)})")
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], f"... and {len(lines) - LINES + 1} lines more: see the report"]
    return "\n".join(shortened_line(line) for line in lines)


def shortened_line(line: str) -> str:
    """A line as it is, or cut."""
    indent = line[: len(line) - len(line.lstrip())]
    return line if len(line) <= WIDTH else indent + shortened(line, WIDTH - len(indent))


def _correctness(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for model in ("random", "default"):
        for dtype, drafters in found.get(model, {}).items():
            if isinstance(drafters, dict):
                same = _listed(drafters, lambda counts: f"{counts['identical']}/{counts['texts']}")
                lines.append(f"  {model} model, {dtype}: texts as plain: {same}")
    return lines


def _tests(found: Mapping[str, Any]) -> list[str]:
    return [f"  {name}: exit {tests['exit']}, {tests['passed']} passed" for name, tests in found.items()]


def _times(found: Mapping[str, Any]) -> list[str]:
    lines = []
    if rates := found.get("rates"):
        shown = {name: value for name, value in rates.items() if name != "read_GB_per_second"}
        lines.append("  " + _listed(shown))
    lines.append("  shape, heads     ms of a step with N nodes (ratio to 1; share of the memory limit)")
    for name, shape in found.items():
        lines += _steps(name, shape)
        if "generate" in shape:
            host = shape.get("trained", {}).get("host_loop_ms", {})
            lines.append(
                f"       transformers' generate {shape['generate']['tokens_per_second']} tokens/s, our plain "
                f"{shape.get('plain_to_generate')}x of it; loop on the host "
                + ", ".join(f"{nodes}: {ms['median']:.2f} ms" for nodes, ms in host.items())
            )
    for name, rows in found.get("expected_speedups", {}).items():
        speedups = ", ".join(f"{row['speedup']}x at {row['tokens_per_step']}" for row in rows)
        overhead = rows[0]["overhead"]
        lines.append(f"  {name} computed, t(64)/t(1) = {overhead}: {speedups} tokens a step (published for 7B)")
    return lines


def _steps(name: str, shape: Mapping[str, Any]) -> list[str]:
    lines = []
    for kind in ("trained", "narrow", "original"):
        steps = shape.get(kind, {}).get("steps", {})
        cells = [
            f"{nodes}: {step['ms']['median']:.2f} ({step.get('to_one', 1)}; {step.get('share_of_limit', 0):.0%})"
            for nodes, step in sorted(steps.items(), key=lambda item: int(item[0]))
        ]
        if cells:
            lines.append(f"  {name:4} {kind:9} " + "  ".join(cells))
    return lines


def _bits(found: Mapping[str, Any]) -> list[str]:
    return [
        line
        for name, of in found.items()
        for line in (
            [_rates(name, drafter, counts) for drafter, counts in _drafters(of)]
            if name.startswith("int")
            else _steps(f"{name} in 8 bits,", of)
        )
    ]


def _compiled(found: Mapping[str, Any]) -> list[str]:
    texts = [_rates("compiled", name, counts) for name, counts in _drafters(found.get("model", {}))]
    return texts + [
        f"  {name} compiled: "
        + ", ".join(f"{nodes}: {step['ms']['median']:.2f} ms" for nodes, step in shape["steps"].items())
        for name, shape in found.items()
        if "steps" in shape
    ]


def _attention(found: Mapping[str, Any]) -> list[str]:
    return [
        f"  {name}, {nodes}, {length}, us: " + "  ".join(f"{way} {_way(measured)}" for way, measured in ways.items())
        for name, shape in found.items()
        for nodes, places in shape.items()
        for length, ways in places.items()
    ]


def _way(measured: Mapping[str, Any]) -> str:
    if "us" not in measured:
        return "refused"
    return f"{measured['us']['median']:.1f}{'' if measured['agrees'] else ' (differs!)'}"


def _model(found: Mapping[str, Any]) -> list[str]:
    lines = [
        f"{_rates(kind, name, counts)} ({counts['decoder']})"
        for kind in ("greedy", "sampled", "float32")
        for name, counts in _drafters(found.get(kind, {}))
    ]
    if baselines := found.get("baselines"):
        lines.append("  " + _listed(baselines))
    for size, loads in found.get("batches", {}).items():
        rates = _listed(loads, lambda load: f"{load['tokens_per_second']:.0f} ({load['to_plain']}x)")
        lines.append(f"  batch of {size}, tokens/s: {rates}")
    return lines


def _drafters(texts: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The counts of each drafter, without what is said of all together."""
    return [(name, counts) for name, counts in texts.items() if isinstance(counts, dict)]


def _rates(kind: str, name: str, counts: Mapping[str, Any]) -> str:
    return (
        f"  {kind:8} {name:6} {counts['tokens_per_second']:8.1f} tokens/s {counts['tokens_per_step']:6.2f} a step "
        f"{counts['to_plain']}x plain, {counts['identical']}/{counts['texts']} texts as plain"
    )


def _training(found: Mapping[str, Any]) -> list[str]:
    return [
        f"  {name}: {run['answer_tokens_per_second']} tokens/s of answers written, heads learn from "
        f"{run['positions_per_second']:.0f} positions/s; seconds: {run['stage_seconds']}"
        for name, run in found.items()
    ]


def _profile(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, step in found.items():
        longest = ", ".join(f"{k['name'][:24]} {k['us']:.0f}/{k['calls']:.0f}" for k in step["longest"][:4])
        lines.append(f"  {name}: {step['kernels']:.0f} kernels, {step['us']:.0f} us; longest (us/calls): {longest}")
    return lines


def _listed(values: Mapping[str, Any], shown: Callable[[Any], str] = str) -> str:
    return ", ".join(f"{name} {shown(value)}" for name, value in values.items())


_MAKERS = {
    "bits": _bits,
    "profile": _profile,
    "training": _training,
    "correctness": _correctness,
    "tests": _tests,
    "times": _times,
    "compiled": _compiled,
    "attention": _attention,
    "model": _model,
    "batches": _model,
}
