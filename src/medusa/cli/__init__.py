"""The command line: parses, calls a function you could call yourself, prints.

Heavy imports (torch, transformers) happen when a command needs them, so `medusa --help` stays fast.
Exit codes: 0 done, 1 something outside the call is wrong, 2 a wrong argument, 130 Ctrl-C.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer
from typer.core import TyperGroup

from medusa.cli import bench, demo, generate, info, interop, serve, trace, training
from medusa.errors import MedusaError, UsageError
from medusa.terminal import OUT_OF_MEMORY, is_out_of_memory

# UsageError of the click that Typer uses, its own or the package: Typer exports only this subclass.
_BAD_CALL: Any = typer.BadParameter.__mro__[1]


class _Commands(TyperGroup):
    """Turns the errors a user can cause into one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except UsageError as error:
            raise _fail(str(error), 2) from None
        except MedusaError as error:
            raise _fail(str(error), 1) from None
        except _BAD_CALL as error:  # an unknown option or value, which Typer would draw a box around
            message = error.format_message().replace("Value error, ", "").rstrip(".")
            raise _fail(f"{message}; see medusa {ctx.invoked_subcommand or ''} --help", 2) from None
        except BrokenPipeError:
            raise  # `| head` went away: Typer ends quietly
        except OSError as error:
            raise _fail(str(error), 1) from None
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise _fail(OUT_OF_MEMORY, 1) from None
            raise


def _fail(message: str, code: int) -> typer.Exit:
    print(f"Error: {' '.join(message.split())}", file=sys.stderr)
    return typer.Exit(code)


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import medusa

        print(f"medusa {medusa.__version__}")
        raise typer.Exit


@app.callback()
def _medusa(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Medusa: faster text from language models, with heads that draft and a model that verifies."""


for commands in (generate, serve, info, demo, bench, trace, training, interop):
    commands.add_to(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `medusa` command; always ends with SystemExit."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by the caller (`medusa ... >&-`)
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        _reconfigure(stream, errors="replace")  # a terminal that lacks a character shows ? instead
    if sys.platform == "win32" and not sys.stdout.isatty():
        _reconfigure(sys.stdout, encoding="utf-8")  # as what is read from a file or a pipe: nothing is lost
    if not sys.stdin.isatty():
        _reconfigure(sys.stdin, encoding="utf-8", errors="strict")
    app(args=arguments, prog_name="medusa")


def _reconfigure(stream: TextIO, **settings: str) -> None:
    """Change how a stream encodes, where it can (a replaced sys.stdout may be anything)."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(**settings)
