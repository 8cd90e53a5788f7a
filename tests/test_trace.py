"""`medusa trace`: from chunks to steps, to text, to JSON and to a picture."""

from __future__ import annotations

import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import medusa
from helpers import RandomTreeDrafter, ToyBackend, ToyModel
from medusa.api import Chunk, Stats
from medusa.cli import main
from medusa.decoding.draft import MODEL, Draft
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.scheduler import decode
from medusa.decoding.stepper import Phases, Step
from medusa.errors import MedusaError, UsageError
from medusa.evaluation.trace import Trace, lines, token_texts, trace, visible
from medusa.evaluation.trace_picture import _panel, check_picture, draw_trace, drawable
from test_text import METASPACE
from tiny_models import byte_ids, make_tokenizer

TOKENIZER = make_tokenizer()
ANSI = re.compile(r"\x1b\[\d*m")


def ids(text: str) -> tuple[int, ...]:
    return tuple(byte_ids(text.encode()))


def chunks_of(steps: Sequence[Step]) -> list[Chunk]:
    """Chunks as `LanguageModel.stream` gives them; each step takes 10 ms."""
    chunks, stats = [], Stats(prompt_tokens=5, ttft_seconds=0.02)
    for step in steps:
        decoded = step.draft is not None
        stats = replace(
            stats,
            new_tokens=stats.new_tokens + len(step.tokens),
            steps=stats.steps + decoded,
            decode_seconds=stats.decode_seconds + 0.01 * decoded,
        )
        spans = tuple((TOKENIZER.decode([t]), s) for t, s in zip(step.tokens, step.sources, strict=True))
        text = "".join(piece for piece, _ in spans)
        chunks.append(Chunk(text, spans, step.tokens, stats, step.finish_reason, step))
    return chunks


FIRST = Step(ids("H"), (MODEL,), None)
TREE = Step(
    ids("el "),
    ("heads", "ngram", MODEL),
    None,
    Draft(ids("He$l\n"), (-1, 0, 0, 1, 1), (1.0, 0.3, 0.625, 0.21, 0.05), (MODEL, "heads", "ngram", "ngram", "heads")),
    path=(0, 1, 3),
    phases=Phases(0.001, 0.007, 0.0005, 0.0005),
)
PLAIN = Step(ids("!"), (MODEL,), "length", Draft(ids(" ")), path=(0,), phases=Phases(0, 0.009, 0, 0))


@pytest.fixture(name="found")
def found_fixture() -> Trace:
    return trace(chunks_of([FIRST, TREE, PLAIN]), TOKENIZER)


def toy_trace(seed: int) -> tuple[Trace, list[Step]]:
    model = ToyModel(seed=seed)
    decoder = ReferenceStepper(ToyBackend(model), RandomTreeDrafter(model, seed, right=0.7), 14)
    steps = list(decode(decoder, [1, 2, 3], max_new_tokens=30))
    return trace(chunks_of(steps), TOKENIZER), steps


# --- from chunks ------------------------------------------------------------------------------------------------------


def test_a_step_knows_its_tree_and_what_it_gave(found: Trace) -> None:
    step = found.steps[0]
    assert [node.text for node in step.nodes] == ["H", "e", "$", "l", "\n"]
    assert [node.parent for node in step.nodes] == [-1, 0, 0, 1, 1]
    assert [node.depth for node in step.nodes] == [0, 1, 1, 2, 2]
    assert [node.source for node in step.nodes] == [MODEL, "heads", "ngram", "ngram", "heads"]
    assert [node.accepted for node in step.nodes] == [True, True, False, True, False]
    assert [(token.text, token.source) for token in step.tokens] == [("e", "heads"), ("l", "ngram"), (" ", MODEL)]
    assert step.accepted == {"heads": 1, "ngram": 1}
    assert step.ms == pytest.approx({"draft": 1, "verify": 7, "accept": 0.5, "keep": 0.5, "text": 1, "total": 10})


def test_a_trace_knows_its_text(found: Trace) -> None:
    assert found.first is not None
    assert found.first.text == "H"
    assert found.text == "Hel !"
    assert (found.tokens_per_step, found.finish_reason) == (2.0, "length")
    assert found.by_depth() == {"heads": [(1, 1), (0, 1)], "ngram": [(0, 1), (1, 1)]}


@pytest.mark.parametrize("seed", range(8))
def test_what_is_marked_as_accepted_is_the_path(seed: int) -> None:
    found, steps = toy_trace(seed)
    assert len(found.steps) == len(steps) - 1
    assert found.first is not None
    roots = [found.first.token, *(traced.tokens[-1].token for traced in found.steps)]
    for root, traced, step in zip(roots, found.steps, steps[1:], strict=False):
        assert step.draft is not None
        assert tuple(i for i, node in enumerate(traced.nodes) if node.accepted) == step.path
        assert tuple(node.token for node in traced.nodes) == step.draft.tokens
        assert traced.nodes[0].token == root, "a step goes on from the last token of the step before"
        on_path = [traced.nodes[i].token for i in traced.path[1:]]
        assert [token.token for token in traced.tokens] == [*on_path, step.tokens[-1]]
    accepted = sum(a for pairs in found.by_depth().values() for a, _ in pairs)
    assert accepted == sum(len(step.path) - 1 for step in steps[1:]) > 0


def test_a_text_that_a_stop_string_cuts(found: Trace) -> None:
    first, tree, _ = chunks_of([FIRST, TREE, PLAIN])
    found = trace([first, replace(tree, token_ids=ids("e"), finish_reason="stop")], TOKENIZER)
    step = found.steps[0]
    assert [token.text for token in step.tokens] == ["e"]
    assert step.own is None
    assert "2 accepted (heads 1, ngram 1) = 2 tokens, 1 used because the text ends, 10.0 ms" in step.summary()
    assert "\u2192" not in "\n".join(list(lines(found))[3:8]), "the model's own token is not shown as gained"


def test_nothing_came() -> None:
    found = trace([], TOKENIZER)
    assert (found.first, found.steps, found.text, found.tokens_per_step) == (None, (), "", 0.0)
    assert found.facts()["finish_reason"] == "interrupted"
    assert list(lines(found))


# --- tokens as text ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("word", "word"),
        (" word", "\u00b7word"),
        ("\n\n", "\\n\\n"),
        ("\t", "\\t"),
        ("\\n", "\\\\n"),
        ("\x1b[2J", "\\x1b[2J"),
        ("\u202e", "\\u202e"),
        ("\u00e9\u4e2d", "\u00e9\u4e2d"),
        ("\ufffd", "\ufffd#7"),
        ("", "empty#7"),
        ("-" * 40, "-" * 31 + "\u2026"),
    ],
)
def test_a_token_is_shown_in_one_line(text: str, shown: str) -> None:
    assert visible(text, 7) == shown


def test_tokens_keep_the_space_before_a_word() -> None:
    text_of = token_texts(METASPACE)
    (token,) = METASPACE.convert_tokens_to_ids(["\u2581b"])
    assert METASPACE.decode([token]) == "b", "alone, the tokenizer drops it"
    assert text_of(token) == " b"


def test_parts_of_characters_and_special_tokens_have_a_text() -> None:
    text_of = token_texts(TOKENIZER)
    assert [text_of(token) for token in byte_ids("\u00e9".encode())] == ["\ufffd", "\ufffd"]
    assert text_of(2) == "<|end|>"


# --- as text ----------------------------------------------------------------------------------------------------------


def test_the_lines_of_a_trace(found: Trace) -> None:
    assert list(lines(found)) == [
        "prompt: 5 tokens read, first token H, 20.0 ms",
        "\u2713 accepted, \u00d7 rejected, \u2192 decided by the model; "
        "% is the estimate of its drafter that the whole path is right",
        "",
        "H",
        "\u251c\u2500 \u00d7 $         62.5 %  ngram",
        "\u2514\u2500 \u2713 e         30.0 %  heads",
        "   \u251c\u2500 \u2713 l      21.0 %  ngram",
        "   \u2502  \u2514\u2500 \u2192 \u00b7           model",
        "   \u2514\u2500 \u00d7 \\n      5.0 %  heads",
        "step 1: 5 nodes, 2 accepted (heads 1, ngram 1) + 1 from the model = 3 tokens, "
        "10.0 ms (draft 1.0, verify 7.0, accept 0.5, keep 0.5, text 1.0)",
        "",
        "\u00b7",
        "\u2514\u2500 \u2192 !           model",
        "step 2: 1 node, 0 accepted + 1 from the model = 1 token, "
        "10.0 ms (draft 0.0, verify 9.0, accept 0.0, keep 0.0, text 1.0)",
        "",
        "text by who proposed it ([heads], {ngram}, plain: the model):",
        "H[e]{l} !",
        "",
        "5 tokens in 2 steps = 2.0 tokens per step, 200 tokens/s, first token after 0.0 s",
        "accepted of drafted nodes, by depth:",
        "           1    2  all",
        "  heads  1/1  0/1  1/2",
        "  ngram  0/1  1/1  1/2",
    ]


def test_colour_adds_escape_codes_and_leaves_the_trees_alone(found: Trace) -> None:
    plain, coloured = list(lines(found)), list(lines(found, colour=True))
    assert [ANSI.sub("", line) for line in coloured][:15] == plain[:15]
    assert "\x1b" not in "".join(plain)
    assert "\x1b[1m\x1b[32m\u2713 e" in coloured[5]
    assert "\x1b[2m\u00d7 $" in coloured[4]
    assert "H\x1b[32me\x1b[0m\x1b[36ml\x1b[0m !" in coloured


def test_only_the_first_steps_are_shown(found: Trace) -> None:
    text = "\n".join(lines(found, steps=1))
    assert "step 1:" in text
    assert "step 2:" not in text
    assert "1 more step not shown; --steps 0 shows all" in text
    assert list(lines(found, steps=0)) == list(lines(found, steps=2))


def test_control_characters_of_the_text_are_escaped(found: Trace) -> None:
    found = replace(found, spans=(("a\x1b[2Jb\nc", "heads"),))
    assert "[a\\x1b[2Jb\nc]" in list(lines(found))


def test_facts_are_json(found: Trace) -> None:
    facts = json.loads(json.dumps(found.facts()))
    assert set(facts) == {"first", "steps", "tokens_per_step", "text", "finish_reason"}
    assert (facts["text"], facts["tokens_per_step"], facts["first"]["text"]) == ("Hel !", 2.0, "H")
    step = facts["steps"][0]
    assert set(step) == {"number", "nodes", "path", "tokens", "ms"}
    assert step["path"] == [0, 1, 3]
    assert step["nodes"][4] == {
        "token": ids("\n")[0], "text": "\n", "parent": 1, "depth": 2, "probability": 0.05, "source": "heads",
        "accepted": False,
    }  # fmt: skip


# --- as a picture -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["trace.svg", "trace.PNG"])
def test_a_picture_of_awkward_tokens(name: str, tmp_path: Path) -> None:
    awkward = {"H": "$x_{$", "e": "\u4e2d\U00013000", "$": "$\\frac$", "l": "\ufffd", "\n": "a\x00b"}
    found = trace(chunks_of([FIRST, TREE, PLAIN]), TOKENIZER)
    nodes = tuple(replace(node, text=awkward[node.text]) for node in found.steps[0].nodes)
    # Missing glyphs and mathematics that cannot be parsed would be warnings or errors.
    draw_trace(replace(found, steps=(replace(found.steps[0], nodes=nodes), found.steps[1])), tmp_path / name)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [name]
    assert (tmp_path / name).stat().st_size > 1000


def test_what_a_font_lacks_becomes_a_box() -> None:
    assert drawable("a$\u00b7\u00e9\u2026\u4e2d\U00013000") == "a$\u00b7\u00e9\u2026\u25a1\u25a1"


@pytest.mark.parametrize("seed", range(5))
def test_no_two_boxes_of_a_panel_overlap(seed: int) -> None:
    found, _ = toy_trace(seed)
    for step in found.steps:
        panel = _panel(step)
        assert len(panel.boxes) == len(step.nodes) + 1
        for one, other in itertools.combinations(panel.boxes, 2):
            beside = one.x + one.width <= other.x or other.x + other.width <= one.x
            assert beside or abs(one.y - other.y) >= 15
        assert all(box.x >= 0 and box.x + box.width <= panel.width for box in panel.boxes)
        assert all(0 < box.y < panel.height for box in panel.boxes)


def test_as_many_panels_as_asked_for(tmp_path: Path) -> None:
    found, _ = toy_trace(1)
    pictures = {}
    for steps in (1, 3, 0):
        path = tmp_path / f"{steps}.svg"
        draw_trace(found, path, steps=steps)
        # matplotlib names each text in a comment.
        pictures[steps] = len(re.findall(r"<!-- step \d+:", path.read_text()))
    assert pictures == {1: 1, 3: 3, 0: len(found.steps)}


def test_pictures_that_cannot_be(found: Trace, tmp_path: Path) -> None:
    for name in ("trace.pdf", "trace", "png"):
        with pytest.raises(UsageError, match=r"must end in \.svg or \.png"):
            check_picture(tmp_path / name)
    with pytest.raises(UsageError, match="no directory"):
        check_picture(tmp_path / "missing" / "trace.png")
    with pytest.raises(MedusaError, match="no step to draw"):
        draw_trace(replace(found, steps=()), tmp_path / "trace.png")


# --- the command ------------------------------------------------------------------------------------------------------


class Stub:
    """Says TREE and PLAIN, or raises `error` after the first."""

    tokenizer = TOKENIZER

    def __init__(self) -> None:
        self.loads: list[dict[str, Any]] = []
        self.settings: dict[str, Any] = {}
        self.error: BaseException | None = None

    def load(self, **arguments: Any) -> Stub:
        self.loads.append(arguments)
        return self

    def stream(self, prompt: str, **settings: Any) -> Iterator[Chunk]:
        self.settings = settings
        yield from chunks_of([FIRST, TREE])
        if self.error is not None:
            raise self.error
        yield chunks_of([FIRST, TREE, PLAIN])[-1]


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(name="stub")
def stub_fixture(monkeypatch: pytest.MonkeyPatch) -> Stub:
    stub = Stub()
    monkeypatch.setitem(vars(medusa), "load", stub.load)
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    return stub


@pytest.fixture(name="run")
def run_fixture(stub: Stub, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit_info:
            main(["trace", *arguments])
        sys.stdout.flush()
        out, err = capsys.readouterr()
        assert isinstance(exit_info.value.code, int)
        return exit_info.value.code, out, err

    return run


def test_the_command_prints_the_lines(run: Run, stub: Stub, found: Trace, monkeypatch: pytest.MonkeyPatch) -> None:
    code, out, err = run("hi", "--drafter", "ngram", "--max-new-tokens", "5", "--seed", "3")
    assert (code, out.splitlines(), err) == (0, list(lines(found)), "")
    assert (stub.loads[0]["drafter"], stub.settings["max_new_tokens"], stub.settings["seed"]) == ("ngram", 5, 3)
    assert "step 2:" not in run("hi", "--steps", "1")[1]
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert run("hi")[1].splitlines() == list(lines(found, colour=True))


def test_the_command_prints_one_line_of_json_with_all_steps(run: Run, found: Trace) -> None:
    code, out, err = run("hi", "--json", "--steps", "1")
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert json.loads(out) == json.loads(json.dumps(found.facts()))


def test_the_command_draws(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "trace.svg"
    code, _, err = run("hi", "--out", str(path))
    assert (code, err) == (0, f"The picture is in {path}.\n")
    assert path.read_text().count("<!-- step") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["hi", "--out", "trace.pdf"], "cannot draw trace.pdf: the name must end in .svg or .png"),
        (["hi", "--out", "missing/trace.png"], "cannot draw missing/trace.png: there is no directory missing"),
        (["hi", "--steps", "-1"], "Invalid value for '--steps'"),
        (["hi", "--temperature", "-1"], "temperature must be"),
        ([""], "the prompt is empty"),
        ([], "Missing argument"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2_before_anything_loads(
    run: Run, stub: Stub, arguments: list[str], message: str
) -> None:
    code, out, err = run(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith(f"Error: {message}")
    assert not stub.loads


def test_ctrl_c_shows_the_steps_so_far(run: Run, stub: Stub) -> None:
    stub.error = KeyboardInterrupt()
    code, out, _ = run("hi")
    assert code == 130
    assert "step 1:" in out
    code, out, _ = run("hi", "--json")
    assert (code, json.loads(out)["finish_reason"]) == (130, "interrupted")


@pytest.mark.real
@pytest.mark.xdist_group("real")
def test_a_real_answer_with_and_without_drafts(tmp_path: Path) -> None:
    lm = medusa.load(progress=False, nodes=8)
    prompt, tokens = "List three fruits.", 16
    found = trace(lm.stream(prompt, max_new_tokens=tokens), lm.tokenizer)
    plain = trace(lm.stream(prompt, max_new_tokens=tokens, stepper=lm.make_stepper("none")), lm.tokenizer)
    assert found.text == plain.text == lm.generate(prompt, max_new_tokens=tokens).text
    assert found.tokens_per_step > plain.tokens_per_step == 1.0
    assert all(len(step.nodes) == 1 for step in plain.steps)
    assert found.first is not None
    assert "".join([found.first.text, *(token.text for step in found.steps for token in step.tokens)]) == found.text
    draw_trace(plain, tmp_path / "plain.png")
