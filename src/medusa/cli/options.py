"""Options that commands share, and what every command does with them: read the prompt, load the model.

A dataclass parameter of a command becomes one option per field.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from medusa.errors import UsageError
from medusa.terminal import notice

if TYPE_CHECKING:
    from medusa.api import LanguageModel

AsJson = Annotated[bool, typer.Option("--json", help="Print one line of JSON instead.")]


def _parse_nodes(text: str) -> int | str:
    if text == "auto":
        return text
    if text.isascii() and text.isdecimal() and int(text) > 0:
        return int(text)
    raise typer.BadParameter(f"give auto or a whole number from 1, not {text}")


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """What to load: keyword arguments of `medusa.load`, all but who drafts."""

    model: Annotated[
        str, typer.Option(help="Short name, Hub id or directory of a model.", rich_help_panel="Engine")
    ] = "smollm2-135m"
    heads: Annotated[
        str,
        typer.Option(
            metavar="NAME|PATH|none",
            help="Medusa heads; auto takes the ones shipped for the model.",
            rich_help_panel="Engine",
        ),
    ] = "auto"
    backend: Annotated[
        Literal["auto", "transformers", "native"],
        typer.Option(help="What runs the model; auto takes the fastest.", rich_help_panel="Engine"),
    ] = "auto"
    dtype: Annotated[
        Literal["float32", "bfloat16", "int8", "int4"],
        typer.Option(help="Number format of the weights; int4 is for native.", rich_help_panel="Engine"),
    ] = "bfloat16"
    device: Annotated[
        str,
        typer.Option(help="cpu, cuda, cuda:1, ...; auto spreads the model.", rich_help_panel="Engine"),
    ] = "cpu"
    threads: Annotated[
        int | None, typer.Option(help="CPU threads.", show_default="all cores", rich_help_panel="Engine")
    ] = None
    nodes: Annotated[
        Any,  # int | Literal["auto"], which Typer has no type for
        typer.Option(
            parser=_parse_nodes,
            metavar="auto|N",
            help="Most tokens verified in one step (size of the draft tree); auto takes what pays.",
            rich_help_panel="Engine",
        ),
    ] = "auto"
    compile: Annotated[
        bool,
        typer.Option("--compile", help="Use torch.compile: slow start, faster steps.", rich_help_panel="Engine"),
    ] = False


@dataclass(frozen=True, slots=True)
class EngineOptions(ModelOptions):
    """What to load, and who drafts."""

    drafter: Annotated[
        Literal["union", "heads", "ngram", "none"],
        typer.Option(help="Who proposes tokens; none decodes plainly.", rich_help_panel="Engine"),
    ] = "union"
    tree: Annotated[
        Literal["auto", "dynamic", "static"],
        typer.Option(
            help="Draft tree of the heads: grown at each step, or fixed; auto is fixed on a GPU.",
            rich_help_panel="Engine",
        ),
    ] = "auto"


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How to decode: keyword arguments of `LanguageModel.stream`."""

    max_new_tokens: Annotated[
        int, typer.Option(min=1, help="Most tokens in one answer.", rich_help_panel="Sampling")
    ] = 256
    temperature: Annotated[float, typer.Option(help="0 is greedy.", rich_help_panel="Sampling")] = 0.0
    top_p: Annotated[
        float,
        typer.Option(help="Sample from the likeliest tokens of this total.", rich_help_panel="Sampling"),
    ] = 1.0
    top_k: Annotated[
        int, typer.Option(help="Sample from the likeliest K tokens; 0 is all.", rich_help_panel="Sampling")
    ] = 0
    min_p: Annotated[
        float,
        typer.Option(help="Drop tokens below this share of the likeliest one.", rich_help_panel="Sampling"),
    ] = 0.0
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1, used tokens become less likely.", rich_help_panel="Sampling")
    ] = 1.0
    seed: Annotated[
        int | None,
        typer.Option(help="The same seed gives the same text.", show_default="random", rich_help_panel="Sampling"),
    ] = None
    acceptance: Annotated[
        Literal["exact", "typical"],
        typer.Option(help="exact keeps the model's distribution; typical is faster.", rich_help_panel="Sampling"),
    ] = "exact"
    epsilon: Annotated[float, typer.Option(help="Threshold of typical acceptance.", rich_help_panel="Sampling")] = 0.09
    delta: Annotated[float, typer.Option(help="Entropy factor of typical acceptance.", rich_help_panel="Sampling")] = (
        0.3
    )

    def checked(self) -> dict[str, Any]:
        """Return them as arguments of `stream`. Raises UsageError now, before seconds go into loading."""
        from medusa.decoding.sampling import Sampling

        arguments = dataclasses.asdict(self)
        Sampling(**{name: value for name, value in arguments.items() if name != "max_new_tokens"})
        return arguments


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Show Typer a command's dataclass parameters as options, one per field; call it with the dataclasses."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if dataclasses.is_dataclass(hint)}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(function).parameters.values():
        keyword = functools.partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
        group = groups.get(parameter.name)
        if group is None:
            parameters.append(keyword(parameter.name, default=parameter.default, annotation=hints[parameter.name]))
        else:
            types = get_type_hints(group, include_extras=True)
            parameters.extend(
                keyword(field.name, default=field.default, annotation=types[field.name])
                for field in dataclasses.fields(group)
            )

    @functools.wraps(function)
    def command(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in dataclasses.fields(group)})
        function(**values)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def load_model(engine: ModelOptions, **options: Any) -> LanguageModel:
    """What `medusa.load` gives for the options (and more of its arguments), with a notice at a terminal."""
    import medusa

    progress = sys.stderr.isatty()
    if progress:
        notice(f"Loading {engine.model} ...")
    gc.disable()  # imports make a million objects that stay: looking for garbage among them takes a tenth of the start
    try:
        return medusa.load(**dataclasses.asdict(engine), **options, progress=progress)
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
