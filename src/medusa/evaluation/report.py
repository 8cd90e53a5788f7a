"""What a benchmark says: a table for the terminal, report.json, report.md, charts, and one line of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medusa.evaluation.methods import PHASES, PLAIN
from medusa.evaluation.statistics import Figures, categories, figures
from medusa.files import write_whole

if TYPE_CHECKING:
    from rich.table import Table

Cells = list[list[str]]  # the header first


class Report:
    """Figures of every method, over all questions and by category."""

    def __init__(
        self,
        rows: Sequence[dict[str, Any]],
        methods: Sequence[str],
        settings: Mapping[str, Any],
        machine: Mapping[str, Any],
    ) -> None:
        self.methods = list(methods)
        self.settings, self.machine = dict(settings), dict(machine)
        self.rows = list(rows)
        self.overall: dict[str, Figures] = {name: figures(rows, name) for name in methods}
        self.by_category: dict[str, dict[str, Figures]] = {
            category: {name: figures(of_category, name) for name in methods}
            for category, of_category in categories(rows).items()
        }

    # --- for machines ---------------------------------------------------------------------------------------------

    def summary(self) -> dict[str, Any]:
        """The last line of `medusa bench`."""

        short = {
            name: {
                "tokens_per_second": rounded(measured.tokens_per_second, 2),
                "tokens_per_step": rounded(measured.tokens_per_step, 3),
                "overhead": rounded(measured.overhead, 3),
                "speedup": rounded(measured.speedup, 3),
                "identical": measured.identical,
                "total": measured.total,
            }
            for name, measured in self.overall.items()
        }
        return {"plain": short.pop(PLAIN), "methods": short, "machine": self.machine}

    def as_json(self) -> dict[str, Any]:
        """All that is known, as report.json holds it."""
        facts: dict[str, Any] = _finite(
            {
                **self.summary(),
                "settings": self.settings,
                "questions": len(self.rows),
                "overall": _as_dicts(self.overall),
                "categories": {name: _as_dicts(of_category) for name, of_category in self.by_category.items()},
            }
        )
        return facts

    # --- for people -----------------------------------------------------------------------------------------------

    def main_table(self) -> Cells:
        """Method by method."""
        columns = ["method", "tokens/s", "tokens/step", "ms/step", "overhead", "speed-up", "95%", "identical"]
        cells = [[*columns, "repeated", "first token", "memory"]]
        for name, measured in self.overall.items():
            row = [
                name,
                _number(measured.tokens_per_second, 1),
                _number(measured.tokens_per_step, 2),
                _number(measured.milliseconds_per_step, 1),
                _number(measured.overhead, 2),
                f"{_number(measured.speedup, 2)}x",
                "" if name == PLAIN else _interval(measured),
                f"{measured.identical}/{measured.total}",
                "" if measured.repetition is None else f"{100 * measured.repetition:.0f}%",
                f"{_number(1e3 * measured.ttft_seconds, 0)} ms",
                "" if measured.peak_bytes is None else f"{measured.peak_bytes / 1e6:.0f} MB",
            ]
            cells.append(row)
        return cells

    def category_table(self) -> Cells:
        """Tokens per step and speed-up by category; plain decoding is left out."""
        names = [name for name in self.methods if name != PLAIN]
        cells = [["category", *names]]
        for category, of_category in self.by_category.items():
            row = [category]
            for name in names:
                measured = of_category[name]
                steps = "" if measured.tokens_per_step is None else f"{_number(measured.tokens_per_step, 2)}, "
                interval = _interval(measured)
                row.append(f"{steps}{_number(measured.speedup, 2)}x" + (f" ({interval})" if interval else ""))
            cells.append(row)
        return cells

    def phase_table(self) -> Cells:
        """Where a step's milliseconds go."""
        phases_of = {name: measured.phases for name, measured in self.overall.items() if measured.phases is not None}
        rows = [[name, *(f"{phases[phase]:.2f}" for phase in PHASES)] for name, phases in phases_of.items()]
        return [["ms per step", *PHASES], *rows]

    def acceptance_table(self) -> Cells:
        """How often a draft was right up to each depth, of all steps; and what share of each drafter's nodes was."""
        depth = max((len(measured.reached) for measured in self.overall.values()), default=0)
        cells = [["accepted", *(f"{d} deep" for d in range(1, depth + 1)), "of their nodes"]]
        for name, measured in self.overall.items():
            if measured.reached:
                shares = [f"{share:.2f}" for share in measured.reached] + [""] * (depth - len(measured.reached))
                by_drafter = ", ".join(f"{drafter} {share:.2f}" for drafter, share in measured.accepted.items())
                cells.append([name, *shares, by_drafter])
        return cells

    def tables(self) -> dict[str, Cells]:
        """Title -> cells, without empty ones."""
        titled = {
            "All questions": self.main_table(),
            "By category: tokens per step, speed-up (95% interval)": self.category_table(),
            "Where the time of a step goes": self.phase_table(),
            "Acceptance: share of steps in which a draft was right so deep": self.acceptance_table(),
        }
        return {title: cells for title, cells in titled.items() if len(cells) > 1}

    def markdown(self) -> str:
        """report.md."""
        machine, settings = self.machine, self.settings
        lines = [
            f"# {settings.get('model')}: {len(self.rows)} questions",
            "",
            f"On {machine.get('processor')}, {machine.get('cores')} cores, {machine.get('memory_GB')} GB"
            + (f", {machine['gpu']}" if machine.get("gpu") else ", no GPU")
            + f"; {machine.get('system')}, {machine.get('instruction_set') or 'no native engine'}.",
            "",
            ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in settings.items() if value is not None)
            + ".",
            "",
            "Tokens per second leave the prefill out. Speed-up = tokens per step / overhead, against plain decoding on "
            "the same questions; its interval holds 95% of 2,000 bootstrap resamples of the questions. Identical "
            "counts answers equal to those of plain decoding, token for token; repeated is the share of tokens that "
            "end four in a row which stood in the answer before.",
        ]
        for title, cells in self.tables().items():
            lines += ["", f"## {title}", "", *markdown_table(cells)]
        return "\n".join(lines) + "\n"

    def write(self, out: Path, kind: str = "svg") -> list[Path]:
        """report.json, report.md and the charts in `out`; returns what was written. Raises MedusaError."""
        from medusa.evaluation.charts import draw_report

        write_whole(out / "report.json", json.dumps(self.as_json(), indent=1) + "\n")
        write_whole(out / "report.md", self.markdown())
        return [out / "report.json", out / "report.md", *draw_report(self, out, kind)]


def markdown_table(cells: Cells) -> list[str]:
    """Lines of a table: the first column to the left, the others to the right."""
    head, *rest = [[cell.replace("|", "\\|") for cell in line] for line in cells]
    rule = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(line)} |" for line in (head, rule, *rest)]


def rich_table(title: str, cells: Cells) -> Table:
    """The same for a terminal."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
    for i, name in enumerate(cells[0]):
        table.add_column(name, justify="right" if i else "left", header_style="dim", overflow="fold")
    for line in cells[1:]:
        table.add_row(*map(Text, line))
    return table


def _as_dicts(by_method: Mapping[str, Figures]) -> dict[str, Any]:
    return {name: asdict(measured) for name, measured in by_method.items()}


def _interval(measured: Figures) -> str:
    """Empty where there is none: of a single question."""
    low, high = measured.speedup_interval
    return f"{_number(low, 2)} to {_number(high, 2)}" if math.isfinite(low) else ""


def _number(value: float | None, digits: int) -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:,.{digits}f}"


def rounded(value: float | None, digits: int) -> float | None:
    """None for what is no number: JSON has none such."""
    return None if value is None or not math.isfinite(value) else round(value, digits)


def _finite(value: Any) -> Any:
    """The same without numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
