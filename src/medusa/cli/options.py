"""Options that commands share, and what every command does with them: read the prompt, load the model.

Options are made of the dataclasses in medusa/settings.py: one for each field of a command's parameter that is such a
dataclass, or one for a parameter that names a field (`Of`).
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import Field, dataclass
from pathlib import Path
from types import GenericAlias
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer

from medusa.errors import UsageError
from medusa.settings import EngineSettings, choices, typed_fields
from medusa.terminal import notice

if TYPE_CHECKING:
    from medusa.api import LanguageModel

AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead.")]


@dataclass(frozen=True, slots=True)
class Of:
    """Marks a parameter that stands for one field of a dataclass of settings: its option is explained and bounded as
    that is. Where it is not given, it is None, as in `Annotated[int | None, Of(TextSettings, "tokens")] = None`."""

    settings: type
    name: str


class Only:
    """Marks a parameter that is a dataclass of settings, of which a command has these as options, in this order."""

    def __init__(self, *names: str) -> None:
        self.names = names


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Show Typer a command's dataclass parameters as options, one per field; call it with the dataclasses. Options of
    the parameter `engine` are in the panel Engine of the help."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, tuple[Any, dict[str, str]]] = {}  # parameter -> dataclass, and option -> field
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind, *marks = get_args(hints[name]) if get_origin(hints[name]) is Annotated else (hints[name],)
        mark = marks[0] if marks else None
        if dataclasses.is_dataclass(kind):
            typed = typed_fields(kind)  # type: ignore[arg-type]
            names = mark.names if isinstance(mark, Only) else _options(kind)
            groups[name] = kind, {_option(typed[n][0]): n for n in names}
            for field, hint in (typed[n] for n in names):
                default = None if isinstance(field.default, tuple) else field.default
                parameters.append(_parameter(field, _option(field), hint, default, name.capitalize()))
        elif isinstance(mark, Of):
            field, _ = typed_fields(mark.settings)[mark.name]
            parameters.append(_parameter(field, name, kind, parameter.default))
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]))

    @functools.wraps(function)
    def command(**given: Any) -> None:
        for name, (group, fields) in groups.items():
            found = {field: given.pop(option) for option, field in fields.items()}
            given[name] = group(
                **{field: tuple(v) if isinstance(v, list) else v for field, v in found.items() if v not in (None, [])}
            )
        function(**given)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _option(field: Field[Any]) -> str:
    """The name of a setting's option; "" where the command line has none."""
    return field.metadata.get("option", field.name) or ""


def _options(settings: Any) -> list[str]:
    """Names of the settings that a command line can say."""
    return [name for name, (field, _) in typed_fields(settings).items() if _option(field)]


def _parameter(field: Field[Any], name: str, hint: Any, default: Any, panel: str | None = None) -> inspect.Parameter:
    """What Typer makes an option of."""
    facts, parts = field.metadata, (hint, *get_args(hint))
    how = {"help": facts["help"], "metavar": facts.get("metavar"), "rich_help_panel": panel}
    if default is None:
        how["show_default"] = facts.get("unset") or ("" if field.default is None else str(field.default)) or False
    if int in parts and "rule" not in facts:
        how |= {"min": facts.get("ge"), "max": facts.get("le")}
    if get_origin(hint) is tuple:
        hint = GenericAlias(list, parts[1:2]) | None
    elif any(choices(part) == ("auto",) for part in parts):  # or a number, which Typer has no type for
        hint, how["parser"] = Any, _number_or_auto
    option = typer.Option(*([f"--{name}"] if hint is bool else []), **how)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[hint, option])


def _number_or_auto(text: str) -> int | str:
    if text == "auto":
        return text
    if text.isascii() and text.isdecimal() and int(text) > 0:
        return int(text)
    raise typer.BadParameter(f"give auto or a whole number from 1, not {text}")


def options_of(settings: Any, names: Sequence[str] = ()) -> dict[str, Any]:
    """Name -> value of these settings, or of all that a command line can say."""
    return {name: getattr(settings, name) for name in names or _options(type(settings))}


def load_model(engine: EngineSettings, **more: Any) -> LanguageModel:
    """What `medusa.load` gives for the options (and more of its arguments), with a notice at a terminal."""
    import medusa

    progress = sys.stderr.isatty()
    if progress:
        notice(f"Loading {engine.model} ...")
    gc.disable()  # imports make a million objects that stay: looking for garbage among them takes a tenth of the start
    try:
        return medusa.load(**options_of(engine), **more, progress=progress)
    finally:
        gc.freeze()
        gc.enable()


def read_prompt(prompt: str | None, prompt_file: str | None, raw: bool) -> str:
    """Return the prompt from the argument, a file or the input; raises UsageError when there is none.

    The newline that ends a file or a pipe is dropped, unless `raw` asks for the text as it is.
    """
    if prompt is not None and prompt_file is not None:
        raise UsageError("give a PROMPT or a --prompt-file, not both")
    if prompt is None and prompt_file is None:
        if sys.stdin.isatty():
            raise UsageError('there is no prompt; try: medusa generate "Why is the sky blue?" (or --prompt-file FILE)')
        prompt = "-"
    if prompt_file is not None and prompt_file != "-":
        try:
            text = _decode(Path(prompt_file).read_bytes(), f"the prompt file {prompt_file}")
        except (OSError, ValueError) as error:
            if isinstance(error, UsageError):
                raise
            reason = error.strerror if isinstance(error, OSError) else error
            raise UsageError(f"cannot read the prompt file {prompt_file}: {reason}") from None
    elif prompt == "-" or prompt_file == "-":
        text = _decode(sys.stdin.buffer.read(), "the input")
    else:
        assert prompt is not None
        text = prompt
        check_text(text, "the prompt")
        raw = True  # nothing to drop
    if not raw:
        text = text.removesuffix("\n").removesuffix("\r")
    if not text.strip():
        raise UsageError("the prompt is empty")
    return text


def _decode(data: bytes, what: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UsageError(f"{what} is not UTF-8 text") from None


def check_text(text: str, what: str) -> None:
    """Raises UsageError: arguments that are not UTF-8 arrive with lone surrogates, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UsageError(f"{what} is not UTF-8 text") from None
