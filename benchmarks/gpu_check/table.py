"""The report of `scripts/gpu-check` as a table for people, of at most 60 lines."""

from __future__ import annotations

from collections.abc import Mapping
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
        made = _MAKERS.get(name, _nothing)(part.get("found") or {})
        lines += made
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


def _nothing(found: Mapping[str, Any]) -> list[str]:
    return []


def _correctness(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for of in ("random", "default"):
        for dtype, drafters in found.get(of, {}).items():
            if isinstance(drafters, dict):
                told = ", ".join(f"{name} {c['identical']}/{c['texts']}" for name, c in drafters.items())
                lines.append(f"  {of} model, {dtype}: texts as plain: {told}")
    if tests := found.get("tests"):
        lines.append(f"  the step's own tests: exit {tests['exit']}, {tests['passed']} passed")
    return lines


def _times(found: Mapping[str, Any]) -> list[str]:
    lines = []
    if rates := found.get("rates"):
        lines.append(
            "  " + ", ".join(f"{name} {value}" for name, value in rates.items() if name != "read_GB_per_second")
        )
    lines.append("  shape, heads     ms of a step with N nodes (ratio to 1; share of the memory limit)")
    for name, of in found.items():
        for kind in ("trained", "narrow", "original"):
            steps = of.get(kind, {}).get("steps", {}) if isinstance(of, dict) else {}
            cells = [
                f"{n}: {s['ms']['median']:.2f} ({s.get('to_one', 1)}; {s.get('share_of_limit', 0):.0%})"
                for n, s in sorted(steps.items(), key=lambda item: int(item[0]))
            ]
            if cells:
                lines.append(f"  {name:4} {kind:9} " + "  ".join(cells))
        if isinstance(of, dict) and "generate" in of:
            host = of.get("trained", {}).get("host_loop_ms", {})
            lines.append(
                f"       transformers' generate {of['generate']['tokens_per_second']} tokens/s, our plain "
                f"{of.get('plain_to_generate')}x of it; loop on the host "
                + ", ".join(f"{n}: {ms['median']:.2f} ms" for n, ms in host.items())
            )
    for name, rows in found.get("expected_speedups", {}).items():
        told = ", ".join(f"{row['speedup']}x at {row['tokens_per_step']}" for row in rows)
        lines.append(f"  {name} computed, t(64)/t(1) = {rows[0]['overhead']}: {told} tokens a step (published for 7B)")
    return lines


def _compiled(found: Mapping[str, Any]) -> list[str]:
    texts = [
        f"  compiled {name:6} {of['tokens_per_second']:8.1f} tokens/s {of['tokens_per_step']:6.2f} a step "
        f"{of['to_plain']}x plain, {of['identical']}/{of['texts']} texts as plain"
        for name, of in found.get("model", {}).items()
        if isinstance(of, dict)
    ]
    return texts + [
        f"  {name} compiled: " + ", ".join(f"{n}: {s['ms']['median']:.2f} ms" for n, s in of["steps"].items())
        for name, of in found.items()
        if "steps" in of
    ]


def _attention(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, of in found.items():
        for nodes, places in of.items():
            for length, ways in places.items():
                told = "  ".join(f"{way} {_way(w)}" for way, w in ways.items())
                lines.append(f"  {name}, {nodes}, {length}, us: {told}")
    return lines


def _way(measured: Mapping[str, Any]) -> str:
    if "us" not in measured:
        return "refused"
    return f"{measured['us']['median']:.1f}{'' if measured['agrees'] else ' (differs!)'}"


def _model(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for kind in ("greedy", "sampled", "float32"):
        for name, of in found.get(kind, {}).items():
            if isinstance(of, dict):
                lines.append(
                    f"  {kind:8} {name:6} {of['tokens_per_second']:8.1f} tokens/s {of['tokens_per_step']:6.2f} a step "
                    f"{of['to_plain']}x plain, {of['identical']}/{of['texts']} texts as plain ({of['decoder']})"
                )
    if baselines := found.get("baselines"):
        lines.append("  " + ", ".join(f"{name} {value}" for name, value in baselines.items()))
    for size, of in found.get("batches", {}).items():
        told = ", ".join(f"{name} {load['tokens_per_second']:.0f} ({load['to_plain']}x)" for name, load in of.items())
        lines.append(f"  batch of {size}, tokens/s: {told}")
    return lines


def _training(found: Mapping[str, Any]) -> list[str]:
    return [
        f"  {name}: {of['answer_tokens_per_second']} tokens/s of answers written, heads learn from "
        f"{of['positions_per_second']:.0f} positions/s; seconds: {of['stage_seconds']}"
        for name, of in found.items()
    ]


def _profile(found: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, of in found.items():
        told = ", ".join(f"{k['name'][:24]} {k['us']:.0f}/{k['calls']:.0f}" for k in of["longest"][:4])
        lines.append(f"  {name}: {of['kernels']:.0f} kernels, {of['us']:.0f} us; longest (us/calls): {told}")
    return lines


_MAKERS = {
    "profile": _profile,
    "training": _training,
    "correctness": _correctness,
    "times": _times,
    "compiled": _compiled,
    "attention": _attention,
    "model": _model,
    "batches": _model,
}
