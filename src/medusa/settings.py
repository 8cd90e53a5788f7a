"""Every setting, once: its name, type, default, what it does and what it may be.

The options of the command line (cli/options.py), the arguments of `medusa.load`, the sections of run.yaml
(training/config.py) and the errors about them are made of these dataclasses. A bad value raises UsageError where one of
them is built. Bounds go by the names that pydantic reads from the metadata of a dataclass's field, so it checks the
same ones. This file imports nothing heavy: `medusa --help` reads it.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
import secrets
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, Field, dataclass, field, fields, replace
from typing import Any, Literal, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

from medusa.errors import UsageError

BackendName = Literal["auto", "transformers", "native"]
Dtype = Literal["float32", "bfloat16", "int8", "int4"]
DrafterName = Literal["union", "heads", "ngram", "none"]
TreeName = Literal["auto", "dynamic", "static"]
AcceptanceRule = Literal["exact", "typical"]
HeadsKind = Literal["residual", "sequential", "recurrent"]
HeadsWeights = Literal["bfloat16", "int8"]  # int8: matrices in groups of 64, see `heads/int8.py`
Target = Literal["vllm", "tgi", "tensorrt-llm", "fasterdecoding", "hf"]  # who is to run exported heads

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")

_BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "above"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "below"),
}


def setting(default: Any, help: str, **facts: Any) -> Any:
    """A field of a dataclass of settings.

    Args:
        help: one line, of `--help`.
        facts: any of
            ge, gt, le, lt: bounds; None, where it is the default, is always good.
            good: a function of the value, for what bounds cannot say.
            rule: what a value must be, in words, where the bounds themselves read badly.
            more: what the documentation of a function adds to the help.
            unset: what None stands for, or an empty tuple.
            metavar: what the command line calls a value.
            option: the option's name, where it is another one; None: the command line has none.
            alias: the name in run.yaml, where it is another one.
    """
    return field(default=default, metadata={"help": help, **facts})


def check(settings: Any, where: str = "") -> None:
    """Raises UsageError for the first bad value, in a sentence that begins with `where`."""
    for name, (declared, hint) in typed_fields(type(settings)).items():  # type: ignore[arg-type]  # classes are hashable
        value, facts, known = getattr(settings, name), declared.metadata, choices(hint)
        if value is None and declared.default is None:
            continue
        bounds = {bound: facts[bound] for bound in _BOUNDS if bound in facts}
        try:
            good = all(_BOUNDS[bound][0](value, limit) for bound, limit in bounds.items())
            good = good and (not known or value in known) and facts.get("good", lambda value: True)(value)
        except TypeError:  # it is of a kind that has no bounds
            good = False
        if not good and known and "rule" not in facts:
            raise UsageError(f"{where}unknown {name} {value}: use one of {', '.join(known)}")
        if not good:
            rule = " and ".join(f"{_BOUNDS[bound][1]} {limit:g}" for bound, limit in bounds.items())
            raise UsageError(f"{where}{name} must be {facts.get('rule', rule)}, not {value}")


@functools.cache
def typed_fields(settings: Any) -> dict[str, tuple[Field[Any], Any]]:
    """Name -> field and type, of a dataclass."""
    hints = get_type_hints(settings)
    return {f.name: (f, hints[f.name]) for f in fields(settings)}


def choices(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) is Literal else ()


def values(settings: Any, of: Any = None) -> dict[str, Any]:
    """Name -> value, as arguments of a function; of those settings alone that `of`, a dataclass, has."""
    return {f.name: getattr(settings, f.name) for f in fields(of or settings)}


def takes(settings: Callable[P, S]) -> Callable[[Callable[[S], T]], Callable[P, T]]:
    """Lets a function of settings be called with the settings themselves, as keyword arguments. For type checkers,
    `help()` and editors these are its parameters; {settings} in its docstring becomes a list of them."""
    typed, of_settings = typed_fields(settings), inspect.signature(settings).parameters

    def decorate(function: Callable[[S], T]) -> Callable[P, T]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            try:
                made = settings(*args, **kwargs)
            except TypeError as error:  # an unknown name, say
                raise TypeError(function.__name__ + str(error).partition(".__init__")[2]) from None
            return function(made)

        call.__signature__ = inspect.signature(function).replace(  # type: ignore[attr-defined]
            parameters=[of_settings[name].replace(annotation=hint) for name, (_, hint) in typed.items()]
        )
        lines = (_described(declared, hint) for declared, hint in typed.values())
        call.__doc__ = (function.__doc__ or "").replace("{settings}", "\n".join(lines).lstrip())
        return call

    return decorate


def _described(f: Field[Any], hint: Any) -> str:
    """One argument in a docstring."""
    known, facts = ", ".join(map(str, choices(hint))), f.metadata
    unset = f"None is {facts['unset']}." if f.default is None and "unset" in facts else ""
    text = " ".join(filter(None, [f"{f.name}:", known and f"{known}.", facts["help"], facts.get("more"), unset]))
    return textwrap.fill(text, 120, initial_indent=" " * 8, subsequent_indent=" " * 12, break_on_hyphens=False)


# --- what runs a model ------------------------------------------------------------------------------------------------


class Settings:
    """Checked where they are built."""

    __slots__ = ()

    def __post_init__(self) -> None:
        check(self)


# A class of two others has first the fields of the second, then those of the first, then its own: so they are shown.


@dataclass(frozen=True)
class ModelSettings:
    """What is loaded."""

    model: str = setting("smollm2-135m", "Short name, Hub id, directory or GGUF file of a model.")
    _: KW_ONLY
    heads: str = setting("auto", "Medusa heads; auto takes the ones shipped for the model.", metavar="NAME|PATH|none")


@dataclass(frozen=True, slots=True, kw_only=True)
class BackendSettings(Settings):
    """What runs the model."""

    backend: BackendName = setting(
        "auto",
        "What runs the model; auto takes the fastest.",
        more="native is a CPU engine for models of the Llama kind, and auto takes it where it can.",
    )
    dtype: Dtype = setting("bfloat16", "Number format of the weights; int4 is for native.")
    device: str = setting("cpu", "cpu, cuda, cuda:1, ...; auto spreads the model.")
    threads: int | None = setting(None, "CPU threads.", unset="all cores", ge=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings(BackendSettings, ModelSettings):
    """What to load, and who drafts: arguments of `medusa.load`."""

    nodes: int | Literal["auto"] = setting(
        "auto",
        "Most tokens verified in one step (size of the draft tree); auto takes what pays.",
        more="The root counts. auto goes by the times of passes on this machine, which are measured once (about 3 "
        "seconds) and kept in the cache.",
        metavar="auto|N",
    )
    compile: bool = setting(False, "Use torch.compile: slow start, faster steps.")
    drafter: DrafterName = setting("union", "Who proposes tokens; none decodes plainly.")
    tree: TreeName = setting(
        "auto",
        "Draft tree of the heads: grown at each step, or fixed; auto is fixed on a GPU.",
        more="A static tree is saved with the heads; on a GPU a whole step is then captured as one graph.",
    )
    num_slots: int = setting(1, "How many texts can be decoded at once.", ge=1, option=None)
    max_length: int | None = setting(None, "Positions per slot.", unset="the model's context", ge=1, option=None)
    feature_layers: Sequence[int] = setting(
        (), "Hidden states to deliver beside the final one, for training; heads name theirs.", option=None
    )
    progress: bool = setting(True, "Show at a terminal how far loading is.", option=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingEngine(BackendSettings):
    """What runs the frozen model. A quantised model gives heads for that model as it will run."""

    slots: int | None = setting(None, "Conversations side by side.", unset="24; 1,024 on a GPU", ge=1)


# --- how it decodes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling(Settings):
    """How the next token is chosen. The default is greedy.

    epsilon and delta are the thresholds of typical acceptance; `exact` is lossless and needs none.
    """

    temperature: float = setting(
        0.0,
        "0 is greedy.",
        good=lambda value: value == 0 or 1e-6 <= value < math.inf,
        rule="0 (greedy) or at least 1e-6",
    )
    top_p: float = setting(
        1.0, "Sample from the likeliest tokens of this total.", gt=0, le=1, rule="above 0 and at most 1 (off)"
    )
    top_k: int = setting(0, "Sample from the likeliest K tokens; 0 is all.", ge=0, rule="0 (off) or more")
    min_p: float = setting(
        0.0, "Drop tokens below this share of the likeliest one.", ge=0, lt=1, rule="at least 0 (off) and below 1"
    )
    repetition_penalty: float = setting(
        1.0, "Above 1, used tokens become less likely.", gt=0, lt=math.inf, rule="above 0 (1 is off)"
    )
    presence_penalty: float = setting(
        0.0, "Above 0, tokens that were said become less likely.", ge=-2, le=2, rule="from -2 to 2 (0 is off)"
    )
    frequency_penalty: float = setting(
        0.0, "The same for each time they were said.", ge=-2, le=2, rule="from -2 to 2 (0 is off)"
    )
    logit_bias: tuple[tuple[int, float], ...] = setting(
        (),
        "(token, what is added to its logit), ...",
        good=lambda value: all(len(pair) == 2 and abs(pair[1]) <= 100 for pair in value),
        rule="pairs of a token and a number from -100 to 100",
        option=None,
    )
    seed: int | None = setting(
        None, "The same seed gives the same text.", unset="random", ge=0, lt=2**64, rule="from 0 to 2**64 - 1"
    )
    acceptance: AcceptanceRule = setting(
        "exact", "exact keeps the model's distribution; typical is faster.", rule="exact or typical"
    )
    epsilon: float = setting(0.09, "Threshold of typical acceptance.", ge=0, le=1, rule="from 0 to 1")
    delta: float = setting(0.3, "Entropy factor of typical acceptance.", ge=0, lt=math.inf, rule="0 or more")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def adjusts(self) -> bool:
        """Whether logits are changed before a token is chosen, by what the text holds or by a bias."""
        return bool(self.repetition_penalty != 1 or self.adjusts_output)

    @property
    def adjusts_output(self) -> bool:
        """The same, but for the repetition penalty."""
        return bool(self.presence_penalty or self.frequency_penalty or self.logit_bias)

    @property
    def lossy(self) -> bool:
        """Whether what is drafted decides what is said."""
        return not self.greedy and self.acceptance == "typical"

    def seeded(self) -> Sampling:
        """The same, with a seed drawn from the system where none was given."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(63))


@dataclass(frozen=True, kw_only=True)
class LengthSettings:
    """How far to decode."""

    max_new_tokens: int = setting(256, "Most tokens in one answer.", ge=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerSettings(Sampling, LengthSettings):
    """How one answer is decoded: arguments of `LanguageModel.stream`."""


# --- text to learn from -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversationSettings(Settings):
    """The shape of conversations that a model writes."""

    seed: int = setting(0, "The same seed gives the same text.", ge=0, lt=2**63, rule="from 0 to 2**63 - 1")
    turns: int = setting(3, "Most user turns in a conversation.", ge=1)
    max_user_tokens: int = setting(96, "Most tokens in a user's turn.", ge=1, option=None)
    max_answer_tokens: int = setting(320, "Most tokens in an answer.", ge=1)
    temperatures: tuple[float, ...] = setting(
        (0.0, 0.0, 0.7),  # conversation n takes them in turn
        "Of answers; repeat it for a mix.",
        unset="0, 0 and 0.7 in turn",
        good=bool,
        rule="one temperature or more",
        option="temperature",
    )
    user_temperature: float = setting(1.0, "Of the users' turns.", option=None)
    top_p: float = setting(0.95, "Sample from the likeliest tokens of this total.")

    def __post_init__(self) -> None:
        check(self)
        for temperature in (*self.temperatures, self.user_temperature):
            Sampling(temperature=temperature, top_p=self.top_p)

    def shape(self) -> dict[str, Any]:
        """The settings that a row depends on, as JSON has them: not how many there are to be, nor where they come
        from."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values(self, ConversationSettings).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillSettings(ConversationSettings):
    """What is written."""

    tokens: int = setting(300_000, "Tokens of answers to write.", ge=1)


@dataclass(frozen=True, kw_only=True)
class SourceSettings:
    """Where the training text comes from: `data`, or what the model writes (see training/distill.py)."""

    data: tuple[str, ...] = setting(
        (), "Learn from this text; may be repeated.", unset="the model's own", metavar="FILE|HUB-ID"
    )
    prompts: str | None = setting(
        None, "Let the model answer these prompts.", unset="it invents them", metavar="FILE|HUB-ID"
    )
    tokens: int | None = setting(None, "Tokens of answers to write.", unset="300000, fewer for few steps", ge=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSettings(ConversationSettings, SourceSettings):
    """The text that heads learn from."""

    held_out: float = setting(0.05, "Share of the conversations that measures the heads.", gt=0, le=0.5)
    max_length: int = setting(2048, "Most tokens of a conversation; a longer one is cut.", ge=16)
    seconds: float | None = setting(None, "Of writing, after which it ends with what there is.", gt=0)

    def distilled(self) -> DistillSettings:
        """What the model is to write. `tokens` are spelt out by now."""
        return DistillSettings(**{name: getattr(self, name) for name in DistillSettings.__dataclass_fields__})


# --- heads, and how they are trained ----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsShape(Settings):
    """What heads are, whatever the model (see `HeadsConfig` for the rest)."""

    kind: HeadsKind = setting("recurrent", "What a head is made of.")
    num_heads: int = setting(4, "How many tokens are guessed.", ge=1, le=16)
    num_layers: int = setting(1, "Blocks of a head.", ge=1)
    tie_lm_head: bool = setting(True, "Heads end in the model's own LM head.")
    weights: HeadsWeights = setting("bfloat16", "What the file holds them in.")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsSettings(HeadsShape):
    """Heads to be made; None takes what suits the model."""

    draft_vocab: int | None = setting(
        None, "How many tokens a head can propose; 0 is the whole vocabulary.", unset="at most 8,192", ge=0
    )
    mlp_width: int | None = setting(None, "Width of a head's MLP.", unset="twice the hidden size", ge=0)
    feature_layers: tuple[int, ...] | None = setting(
        None, "Hidden states to read beside the final one.", unset="those a third and two thirds of the way up"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimiserSettings(Settings):
    """The training itself; see training/trainer.py."""

    epochs: int = setting(3, "How often the text is read.", ge=1)
    max_steps: int | None = setting(None, "End after so many steps.", ge=1)
    # What a run learns then depends on its speed.
    seconds: float | None = setting(None, "End after so long; the learning rate falls to zero by then.", gt=0)
    batch_size: int = setting(512, "Positions in a step, over all processes.", ge=1)
    learning_rate: float = setting(1e-3, "At its greatest.", gt=0)
    weight_decay: float = setting(0.01, "Of AdamW.", ge=0)
    warmup: float = setting(0.05, "Share of the steps in which the rate rises.", ge=0, lt=1)
    clip: float = setting(1.0, "Greatest norm of the gradient.", gt=0)
    lambda_: float = setting(0.8, "Head k weighs lambda ** k.", alias="lambda", gt=0, le=1)
    distillation: float = setting(0.0, "Share of KL to the model's own distribution in the loss.", ge=0, le=1)
    overlap: float = setting(
        0.0, "In the KL's place, the more the greater, the share by which drafts would be rejected; 0 is off.", ge=0
    )
    # See training/precision.py. run.yaml keeps "auto", so that the run may go on on another machine; the config of the
    # heads tells what it was.
    precision: Literal["auto", "bfloat16", "float32"] = setting(
        "auto", "auto is bfloat16 where the machine has instructions for it, else float32."
    )
    cache_features: bool = setting(True, "Compute hidden states once and keep them on disk, or anew in each epoch.")
    eval_every: int | None = setting(None, "Steps between evaluations.", unset="an epoch", ge=1)
    patience: int = setting(0, "Evaluations without gain that end the training; 0 is off.", ge=0)
    save_every: int = setting(200, "Steps between checkpoints.", ge=1)
    seed: int = setting(0, "Of weights and order.", ge=0, lt=2**32)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings(Settings):
    """Training the base too, by adapters, once the heads stand (Medusa-2; see training/lora.py)."""

    rank: int = setting(16, "Of the adapters.", ge=1)
    alpha: float = setting(32.0, "Of the adapters.", gt=0)
    epochs: int = setting(1, "How often the text is read.", ge=1)
    max_steps: int | None = setting(None, "End after so many steps.", ge=1)
    batch_size: int = setting(8, "Conversations in a step.", ge=1)
    learning_rate: float = setting(1e-4, "Of the adapters.", gt=0)
    heads_learning_rate: float = setting(2e-4, "Of the heads.", gt=0)
    heads_weight: float = setting(0.2, "Of the heads' loss beside the model's own.", ge=0)
    warmup: float = setting(0.1, "Share of the steps in which that weight and the rates rise.", ge=0, lt=1)
    base_loss: Literal["kl", "ce"] = setting("kl", "To the frozen model, or the cross-entropy of the text.")
    merge: bool = setting(True, "Save the whole model with the adapters merged in, or the adapter alone.")
