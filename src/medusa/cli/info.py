"""`medusa info`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from medusa.cli.options import AsJson, load_model, with_options
from medusa.settings import EngineSettings
from medusa.terminal import notice

if TYPE_CHECKING:
    from medusa.engines.times import Profile


@with_options
def info(
    profile: Annotated[
        bool, typer.Option("--profile", help="Measure passes of 1 to 32 tokens, beside the limit of memory.")
    ] = False,
    as_json: AsJson = False,
    *,
    engine: EngineSettings,
) -> None:
    """Show what would run: the model, its heads, the backend and why."""
    lm = load_model(engine)
    facts = lm.describe()
    if profile:
        from medusa.engines.times import profile as measure

        if sys.stderr.isatty():
            notice("Measuring ...")
        facts["profile"] = _profile_facts(measure(lm.backend))
    if as_json:
        print(json.dumps(facts, default=str))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _flatten(facts):
        table.add_row(Text(name), Text(value))
    Console(highlight=False).print(table)


def _flatten(facts: dict[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Rows of a table: {"heads": {"kind": "shared"}} -> [("heads kind", "shared")]."""
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        label = f"{prefix}{name}".replace("_", " ")
        if isinstance(value, dict):
            if all(isinstance(v, float) for v in value.values()):  # a line of a table, not a section
                rows.append((label, ", ".join(f"{v:g} {k.replace('_', ' ')}" for k, v in value.items())))
            else:
                rows.extend(_flatten(value, f"{label} "))
        else:
            rows.append((label, "none" if value is None else str(value)))
    return rows


def _profile_facts(profile: Profile) -> dict[str, object]:
    """Milliseconds for each number of tokens, beside one token's and what reading the weights takes."""
    one, limit = profile.seconds[1], profile.limit_seconds
    facts: dict[str, object] = {"context": profile.context}
    if limit is not None and profile.bytes and profile.bandwidth:
        facts["weights_MB"] = round(profile.bytes / 1e6, 1)
        facts["read_bandwidth_GB/s"] = round(profile.bandwidth / 1e9, 1)
        facts["limit_ms"] = round(1e3 * limit, 2)
    for size, seconds in profile.seconds.items():
        facts[f"{size}_tokens"] = {
            "ms": round(1e3 * seconds, 2),
            "of_one_token": round(seconds / one, 2),
            **({"of_the_limit": round(seconds / limit, 2)} if limit else {}),
        }
    return facts


def add_to(app: typer.Typer) -> None:
    """Adds the command."""
    app.command()(info)
