"""The command line against a stub model: options, exit codes, what goes to stdout and what to stderr."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import medusa
from medusa.api import Chunk, Stats
from medusa.cli import main
from medusa.decoding.stepper import Step
from medusa.errors import MedusaError, UsageError


class StubModel:
    """Says `script` (an exception in it is raised at that point) and notes how it was called."""

    name = "stub"

    stepper = "union"
    slots = backend = SimpleNamespace(max_length=100)

    def __init__(self) -> None:
        self.loads: list[dict[str, Any]] = []
        self.streams: list[tuple[Any, dict[str, Any]]] = []
        self.script: list[Any] = ["Hello", " world"]
        self.plain_script: list[Any] | None = None
        self.load_error: BaseException | None = None

    def load(self, **arguments: Any) -> StubModel:
        self.loads.append(arguments)
        if self.load_error is not None:
            raise self.load_error
        return self

    def make_stepper(self, drafter: str) -> str:
        return drafter

    def stream(self, prompt: Any, **settings: Any) -> Iterator[Chunk]:
        plain = settings.pop("stepper", self.stepper) == "none"
        self.streams.append((prompt, settings))
        seconds = 0.2 if plain else 0.1
        script = (plain and self.plain_script) or self.script
        for number, item in enumerate(script, 1):
            if not isinstance(item, str):
                raise item
            source = ("model", "heads", "ngram")[(number - 1) % 3]
            reason = "stop" if number == len(script) else None
            stats = Stats(5, 2 * number + 1, number, 0.25, seconds * number)
            step = Step((len(item), number), (source, source), reason)
            yield Chunk(item, ((item, source),), step.tokens, stats, reason, step)

    def generate(self, prompt: Any, **settings: Any) -> None:
        for _ in self.stream(prompt, **settings):
            pass

    def describe(self) -> dict[str, object]:
        return {"model": "stub [bold]", "heads": {"kind": "shared", "levels": 4}, "context": None}


class Terminal(io.TextIOWrapper):
    def isatty(self) -> bool:
        return True


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> StubModel:
    stub = StubModel()
    # Straight into the namespace: asking the package for `load` first would import torch.
    monkeypatch.setitem(vars(medusa), "load", stub.load)
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    return stub


@pytest.fixture
def run(model: StubModel, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command line; returns (exit code, stdout, stderr)."""

    def run(*arguments: str, stdin: bytes = b"", terminal: bool = False) -> tuple[int, str, str]:
        kind = Terminal if terminal else io.TextIOWrapper
        streams = {"stdin": io.BytesIO(stdin), "stdout": io.BytesIO(), "stderr": io.BytesIO()}
        with monkeypatch.context() as patch:
            for name, buffer in streams.items():
                # As Python opens them in the C locale, the hardest case.
                patch.setattr(sys, name, kind(buffer, encoding="utf-8", errors="surrogateescape"))
            with pytest.raises(SystemExit) as exit_info:
                main(arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            code = exit_info.value.code
            assert isinstance(code, int)
            return code, streams["stdout"].getvalue().decode(), streams["stderr"].getvalue().decode()

    return run


def test_generate_streams_text_to_stdout_and_statistics_to_stderr(run: Run, model: StubModel) -> None:
    code, out, err = run("generate", "hi")
    assert (code, out) == (0, "Hello world\n")
    assert err == "5 tokens in 2 steps = 2.0 tokens per step, 20 tokens/s, first token after 0.2 s\n"
    assert model.streams[0][0] == "hi"


def test_options_reach_load_and_stream(run: Run, model: StubModel) -> None:
    engine = (
        "--model m --heads h --drafter ngram --tree static --backend native --dtype int8 --device auto --threads 3 "
        "--nodes 7 --compile"
    )
    sampling = (
        "--temperature 0.7 --top-p 0.9 --top-k 40 --min-p 0.1 --repetition-penalty 1.1 "
        "--presence-penalty 0.5 --frequency-penalty -0.5 --seed 5 "
        "--acceptance typical --epsilon 0.1 --delta 0.2 --max-new-tokens 9 --raw --stop=a --stop=b"
    )
    code, _, _ = run("generate", "hi", *engine.split(), *sampling.split())
    assert code == 0
    assert model.loads == [
        {
            "model": "m",
            "heads": "h",
            "drafter": "ngram",
            "tree": "static",
            "backend": "native",
            "dtype": "int8",
            "device": "auto",
            "threads": 3,
            "nodes": 7,
            "compile": True,
            "progress": False,
        }
    ]
    assert model.streams[0][1] == {
        "raw": True,
        "stop": ["a", "b"],
        "max_new_tokens": 9,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": (),
        "seed": 5,
        "acceptance": "typical",
        "epsilon": 0.1,
        "delta": 0.2,
    }


def test_the_options_have_the_defaults_of_the_library(run: Run, model: StubModel) -> None:
    import inspect

    from medusa import api as generation
    from medusa.decoding.sampling import Sampling

    run("generate", "hi")
    stream = {**inspect.signature(generation.LanguageModel.stream).parameters, **inspect.signature(Sampling).parameters}
    for given, known in (
        (model.loads[0], inspect.signature(generation.load).parameters),
        (model.streams[0][1], stream),
    ):
        for name, value in given.items():
            assert name in known
            if name not in ("progress", "stop") and known[name].default is not inspect.Parameter.empty:
                assert value == known[name].default, name


def test_json_is_the_last_line_and_the_only_one(run: Run) -> None:
    code, out, err = run("generate", "hi", "--json")
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert json.loads(out) == {
        "text": "Hello world",
        "token_ids": [5, 1, 6, 2],
        "num_new_tokens": 4,
        "steps": 2,
        "tokens_per_step": 2.0,
        "decode_seconds": 0.2,
        "tokens_per_second": 20.0,
        "ttft_seconds": 0.25,
        "finish_reason": "stop",
    }


def test_prompt_from_a_file_or_the_input(run: Run, model: StubModel, tmp_path: Path) -> None:
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"\xef\xbb\xbfna\xc3\xafve\r\n")
    assert run("generate", "--prompt-file", str(path))[0] == 0
    assert run("generate", "-", stdin=b"two\nlines\n")[0] == 0
    assert run("generate", stdin=b"piped\n")[0] == 0
    assert run("generate", "--prompt-file", "-", "--raw", stdin=b"as it is\n")[0] == 0
    assert [prompt for prompt, _ in model.streams] == ["na\u00efve", "two\nlines", "piped", "as it is\n"]


@pytest.mark.parametrize(
    ("arguments", "stdin", "message"),
    [
        (["generate", ""], b"", "the prompt is empty"),
        (["generate", "  "], b"", "the prompt is empty"),
        (["generate"], b"\n", "the prompt is empty"),
        (["demo", ""], b"", "the prompt is empty"),
        (["generate", "-"], b"\xff", "the input is not UTF-8 text"),
        (["generate", "a\udcff"], b"", "the prompt is not UTF-8 text"),
        (["generate", "a", "--stop", "\udcff"], b"", "the text after --stop is not UTF-8 text"),
        (["chat", "--system", "a\udcff"], b"", "the system prompt is not UTF-8 text"),
        (["generate", "a", "--prompt-file", "b"], b"", "give a PROMPT or a --prompt-file, not both"),
        (
            ["generate", "--prompt-file", "missing.txt"],
            b"",
            "cannot read the prompt file missing.txt: No such",
        ),
        (["generate", "--prompt-file", "."], b"", "cannot read the prompt file .: "),
        (["generate", "--prompt-file", "a\0b"], b"", "cannot read the prompt file"),
        (["generate", "a", "--temperature", "-1"], b"", "temperature must be"),
        (["generate", "a", "--temperature", "nan"], b"", "temperature must be"),
        (["chat", "--top-p", "2"], b"", "top_p must be"),
        (["demo", "--min-p", "7"], b"", "min_p must be"),
        (["demo", "--drafter", "none"], b"", "the demo compares a drafter with none"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2_before_anything_loads(
    run: Run, model: StubModel, arguments: list[str], stdin: bytes, message: str
) -> None:
    code, out, err = run(*arguments, stdin=stdin)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"Error: {message}")
    assert not model.loads


def test_a_prompt_file_that_is_not_utf8(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "latin1.txt"
    path.write_bytes(b"na\xefve")
    assert run("generate", "--prompt-file", str(path)) == (
        2,
        "",
        f"Error: the prompt file {path} is not UTF-8 text\n",
    )


@pytest.mark.parametrize(
    ("arguments", "mentioned"),
    [
        (["nonsense"], "nonsense"),
        (["generate", "a", "--nonsense"], "--nonsense"),
        (["generate", "a", "b"], "b"),
        (["generate", "a", "--nodes", "many"], "--nodes"),
        (["chat", "--nodes", "0"], "give auto or a whole number from 1, not 0"),
        (["info", "--nodes", "-3"], "give auto or a whole number from 1, not -3"),
        (["demo", "--nodes", "1.5"], "give auto or a whole number from 1, not 1.5"),
        (["generate", "a", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "a", "--drafter", "magic"], "ngram"),
        (["generate", "a", "--backend", "magic"], "transformers"),
        (["info", "--dtype", "float64"], "bfloat16"),
        (["demo", "--acceptance", "magic"], "typical"),
    ],
)
def test_the_parser_s_errors_name_what_is_allowed(
    run: Run, model: StubModel, arguments: list[str], mentioned: str
) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert mentioned in err
    assert "Traceback" not in err
    assert not model.loads


def test_generate_without_a_prompt_at_a_terminal_says_what_to_do(run: Run) -> None:
    code, _, err = run("generate", terminal=True)
    assert code == 2
    assert err == 'Error: there is no prompt; try: medusa generate "Why is the sky blue?" (or --prompt-file FILE)\n'


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("no such heads"), 2, "Error: no such heads\n"),
        (MedusaError("the file\n is broken"), 1, "Error: the file is broken\n"),
        (OSError(28, "No space left on device"), 1, "Error: [Errno 28] No space left on device\n"),
        (MemoryError(), 1, "Error: not enough memory; "),
        (RuntimeError("CUDA out of memory. Tried to allocate 9 GiB"), 1, "Error: not enough memory; "),
        (
            RuntimeError("can't allocate memory: 9 bytes"),
            1,
            "Error: not enough memory; ",
        ),
        (KeyboardInterrupt(), 130, ""),
    ],
)
@pytest.mark.parametrize("command", [["generate", "hi"], ["chat"], ["info"], ["demo"]])
def test_exit_codes_when_loading_fails(
    run: Run, model: StubModel, command: list[str], error: BaseException, code: int, message: str
) -> None:
    model.load_error = error
    actual, out, err = run(*command)
    assert (actual, out) == (code, "")
    assert err.startswith(message)
    assert err.count("\n") <= 1


def test_an_error_while_streaming_has_the_exit_code_of_its_kind(run: Run, model: StubModel) -> None:
    model.script = ["Half", MedusaError("it broke")]
    assert run("generate", "hi")[0] == 1
    model.script = [UsageError("the prompt is longer than the context")]
    assert run("generate", "hi") == (2, "", "Error: the prompt is longer than the context\n")


def test_a_bug_keeps_its_traceback(model: StubModel) -> None:
    model.load_error = RuntimeError("shapes differ")
    with pytest.raises(RuntimeError, match="shapes"):
        main(["generate", "hi"])


def test_ctrl_c_keeps_the_text_so_far(run: Run, model: StubModel) -> None:
    model.script = ["Half", KeyboardInterrupt()]
    code, out, err = run("generate", "hi")
    assert (code, out) == (130, "Half\n")
    assert "interrupted" in err
    code, out, _ = run("generate", "hi", "--json")
    answer = json.loads(out)
    assert (code, answer["text"], answer["finish_reason"]) == (130, "Half", "interrupted")


def test_ctrl_c_before_the_first_token(run: Run, model: StubModel) -> None:
    model.script = [KeyboardInterrupt()]
    assert run("generate", "hi")[0] == 130
    code, out, _ = run("generate", "hi", "--json")
    answer = json.loads(out)
    assert (code, answer["num_new_tokens"], answer["ttft_seconds"]) == (130, 0, None)


def test_a_closed_pipe_is_silent(run: Run, model: StubModel) -> None:
    model.script = ["Half", BrokenPipeError(32, "Broken pipe")]
    assert run("generate", "hi")[2] == ""


@pytest.mark.parametrize("command", [["generate", "hi"], ["generate"], ["chat"]])
def test_closed_streams_are_no_crash(model: StubModel, monkeypatch: pytest.MonkeyPatch, command: list[str]) -> None:
    for name in ("stdin", "stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    with pytest.raises(SystemExit) as exit_info:
        main(command)
    for name in ("stdin", "stdout", "stderr"):
        getattr(sys, name).close()
    assert exit_info.value.code == (2 if command == ["generate"] else 0)


def test_show_drafts_colours_a_terminal_and_explains_itself(run: Run, model: StubModel) -> None:
    model.script = ["a", "b", "c"]
    code, out, err = run("generate", "hi", "--show-drafts", terminal=True)
    assert (code, out) == (0, "a\x1b[32mb\x1b[0m\x1b[36mc\x1b[0m\n")
    assert err.splitlines()[-1].startswith("\x1b[32mgreen: drafted by the heads\x1b[0m, ")


def test_a_pipe_gets_no_escape_codes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments in (["generate", "hi", "--show-drafts"], ["info"], ["demo"], ["generate", "--help"]):
        code, out, err = run(*arguments)
        assert code == 0
        assert "\x1b" not in out + err
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b[32m" in run("generate", "hi", "--show-drafts")[1]
    assert "\x1b" not in run("generate", "hi")[1]


def test_chat_takes_a_turn_a_line(run: Run, model: StubModel) -> None:
    code, out, err = run("chat", "--system", "S", "--seed", "3", stdin="h\u00e9\n/exit\nnever read\n".encode())
    assert (code, out, err) == (0, "Hello world\n", "")
    prompt, settings = model.streams[0]
    assert prompt == [{"role": "system", "content": "S"}, {"role": "user", "content": "h\u00e9"}]
    assert settings["seed"] == 3
    assert "stop" not in settings


def test_chat_input_that_is_not_utf8(run: Run) -> None:
    assert run("chat", stdin=b"\xff\n") == (2, "", "Error: the input is not UTF-8 text\n")


def test_info_as_a_table_and_as_json(run: Run, model: StubModel) -> None:
    code, out, _ = run("info", "--model", "m")
    assert code == 0
    assert out.split("\n")[0].split() == ["model", "stub", "[bold]"]
    assert "heads kind" in out
    assert "none" in out
    code, out, _ = run("info", "--json")
    assert (code, json.loads(out)) == (0, model.describe())


def test_demo_interleaves_and_ends_with_one_line_of_comparison(run: Run, model: StubModel) -> None:
    code, out, _ = run("demo", "--max-new-tokens", "32")
    assert code == 0
    assert "Hello world\n" in out
    assert out.splitlines()[-1] == (
        "Medusa: 2.00 tokens per step, 20.0 tokens/s; plain: 10.0 tokens/s; 2.00x faster, output identical."
    )
    prompts = [prompt for prompt, _ in model.streams]
    assert len(set(prompts)) == 3
    assert prompts[2:] == [p for p in dict.fromkeys(prompts) for _ in range(2)]
    assert [settings["max_new_tokens"] for _, settings in model.streams] == [16, 16] + [32] * 6
    assert {settings["seed"] for _, settings in model.streams} == {0}


def test_demo_says_honestly_that_it_is_slower_and_differs(run: Run, model: StubModel) -> None:
    model.plain_script = ["Hello", " there!"]
    code, out, _ = run("demo", "my prompt", "--acceptance", "typical", "--temperature", "1")
    assert code == 0
    assert out.startswith("> my prompt\n")
    assert out.splitlines()[-1].endswith("output differs in 1 of 1.")


def test_demo_can_be_stopped(run: Run, model: StubModel) -> None:
    model.plain_script = ["Hello", KeyboardInterrupt()]
    assert run("demo")[0] == 130


def test_version_needs_no_model(run: Run) -> None:
    assert run("--version") == (0, f"medusa {medusa.__version__}\n", "")


def test_no_command_shows_the_help(run: Run) -> None:
    code, out, err = run()
    assert code == 2
    assert "generate" in out + err


@pytest.mark.parametrize(
    "arguments", [["--help"], ["generate", "--help"], ["serve", "--help"], ["generate", "x", "--top-p", "7"]]
)
def test_help_and_early_errors_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom medusa.cli import main\n"
        f"try: main({arguments!r})\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'fastapi', 'starlette', 'uvicorn', 'prometheus_client'}\n"
        "print('heavy:', heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8")
    assert done.stdout.splitlines()[-1] == "heavy: set()"


@pytest.mark.parametrize(
    "arguments",
    ["generate hi --drafter foo", "generate hi --max-new-tokens 0", "generate hi --wrong", "chat --top-p x", "dance"],
)
def test_a_call_that_cannot_be_parsed_is_one_line_and_exit_code_2(run: Run, arguments: str) -> None:
    code, out, err = run(*arguments.split())
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")
    assert err.count("\n") == 1
    assert "--help" in err
