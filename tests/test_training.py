"""Training: rows, loss, resuming, what is frozen. The loss is held against a double loop, rows against the model."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st

from medusa.engines.transformers import TransformersBackend
from medusa.errors import MedusaError, UsageError
from medusa.heads.config import HeadsConfig
from medusa.heads.module import BaseWeights, Heads
from medusa.settings import OptimiserSettings
from medusa.training.accuracy import DEEPEST, Accuracy, best_paths, ranks
from medusa.training.config import TrainConfig, load_config
from medusa.training.data import Example
from medusa.training.features import (
    ABSENT,
    Batch,
    LiveFeatures,
    Table,
    count_rows,
    joined,
    longest_answer,
    read_rows,
)
from medusa.training.objective import draft_labels, head_weights, losses, teacher_logits
from medusa.training.precision import training_dtype
from medusa.training.stored_features import FeatureCache, FeatureStore
from medusa.training.trainer import CHECKPOINT, InterruptedTrainingError, Progress, Trainer, schedule
from tiny_models import VOCAB, make_model, plain_logits

K = 3


def backend(**options: Any) -> TransformersBackend:
    return TransformersBackend(make_model(), feature_layers=(1,), **options)


def examples(count: int = 12, seed: int = 0) -> list[Example]:
    """Texts of 30 to 60 tokens with two answers each, the first of which is short."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        ids = torch.randint(3, VOCAB, (30 + 30 * i // count,), generator=generator).tolist()
        found.append(Example(tuple(ids), ((5, 7 + i % 4), (14, len(ids))), f"text {i}"))
    return found


def make_heads(draft_vocab: int = 0, **options: Any) -> Heads:
    model = make_model()
    base = BaseWeights(model.get_input_embeddings().weight, model.get_output_embeddings().weight)
    config = HeadsConfig(
        hidden_size=32,
        vocab_size=VOCAB,
        num_heads=K,
        draft_vocab=draft_vocab,
        **{"kind": "recurrent", "mlp_width": 24, "feature_layers": (1,), **options},
    )
    torch.manual_seed(0)
    heads = Heads(config, base, torch.arange(0, 2 * draft_vocab, 2) if draft_vocab else None)
    with torch.no_grad():  # off zero, where every head says what the model says
        for parameter in heads.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return heads


# --- rows -------------------------------------------------------------------------------------------------------------


def test_rows_hold_the_features_before_each_root_and_the_tokens_after_it() -> None:
    example = Example((10, 11, 12, 13, 14, 15, 16, 17), ((3, 6), (7, 8)), "")
    features, roots, left = read_rows(backend(), example)
    assert roots.tolist() == [13, 14, 15, 17]
    assert left.tolist() == [3, 2, 1, 1]
    whole = backend().extend(0, example.token_ids, every=True)[1]
    assert torch.equal(features, whole[[2, 3, 4, 6]].bfloat16())
    batch = joined([(features, roots, left)]).take(torch.arange(4), K, 32, finals=True)
    assert batch.tokens.tolist() == [
        [13, 14, 15, ABSENT],
        [14, 15, ABSENT, ABSENT],
        [15, ABSENT, ABSENT, ABSENT],
        [17, ABSENT, ABSENT, ABSENT],
    ]
    assert batch.finals is not None
    # The model's own features where head k's token is decided: one row further for each head.
    assert torch.equal(batch.finals[0, 0], whole[3, -32:].bfloat16())
    assert torch.equal(batch.finals[0, 1], whole[4, -32:].bfloat16())


def test_final_features_are_the_input_of_the_models_lm_head() -> None:
    ids = list(range(20, 50))
    found = backend().extend(0, ids, every=True)[1][:, -32:]
    model = make_model()
    with torch.no_grad():
        logits = F.linear(found, model.get_output_embeddings().weight)
    assert torch.allclose(logits, plain_logits(model, ids), atol=1e-4)


def test_reading_equals_prefilling_every_prefix() -> None:
    ids = [5, 9, 100, 40, 7, 7, 3]
    found = backend().extend(0, ids, every=True)[1]
    for end in range(1, len(ids) + 1):
        _, features = backend().extend(0, ids[:end])
        assert torch.allclose(found[end - 1], features, atol=1e-5)


def test_a_text_that_begins_with_an_answer_has_no_row_before_it() -> None:
    example = Example((10, 11, 12), ((0, 3),), "")
    features, roots, left = read_rows(backend(), example)
    assert roots.tolist() == [11, 12]
    assert left.tolist() == [2, 1]
    assert len(features) == count_rows(example, 100) == 2
    assert count_rows(Example((10,), ((0, 1),), ""), 100) == 0
    assert len(read_rows(backend(), Example((10,), ((0, 1),), ""))[1]) == 0


def test_every_row_comes_once_an_epoch_in_an_order_of_its_own(tmp_path: Path) -> None:
    cache = FeatureCache.build(tmp_path / "cache", backend(), examples(), {})
    live = LiveFeatures(backend(), examples())
    assert cache.num_rows == live.num_rows == sum(count_rows(e, 256) for e in examples())
    for rows in (cache, live):
        orders = []
        for epoch in range(2):
            batches = list(rows.batches(K, 1, seed=3, epoch=epoch, finals=True))
            keys = [(tuple(b.tokens[0].tolist()), b.features[0].sum().item()) for b in batches]
            orders.append(keys)
            assert len(keys) == rows.num_rows
        assert orders[0] != orders[1]
        assert sorted(orders[0]) == sorted(orders[1])
        again = list(rows.batches(K, 1, seed=3, epoch=1, start=17))
        assert [tuple(b.tokens[0].tolist()) for b in again] == [tokens for tokens, _ in orders[1][17:]]


def test_rows_that_are_not_kept_are_taken_a_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shuffled copy of all of them would take as much memory again."""
    taken, take = [], Table.take

    def counted(table: Table, rows: torch.Tensor, *arguments: Any) -> Any:
        taken.append(len(rows))
        return take(table, rows, *arguments)

    monkeypatch.setattr(Table, "take", counted)
    monkeypatch.setattr("medusa.training.features.LIVE_EXAMPLES", 3)
    live = LiveFeatures(backend(), examples())
    batches = list(live.batches(K, 7, seed=0, epoch=0, finals=True))
    assert {len(batch.tokens) for batch in batches} == {7}
    assert len(batches) == live.num_rows // 7
    assert max(taken) == 7 < min(live._counts) * 3
    assert 1 in taken or min(taken) < 7  # the rest of one part, which the next one fills up


def test_batches_from_many_chunks_equal_those_from_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the order of their rows, whatever the order of the texts in the chunks."""
    whole = FeatureCache.build(tmp_path / "one", backend(), examples(), {})
    monkeypatch.setattr("medusa.training.stored_features.CHUNK_ROWS", 50)
    FeatureCache.build(tmp_path / "many", backend(), examples()[::-3], {})
    parts = FeatureCache.build(tmp_path / "many", backend(), examples(), {})
    assert len(list((tmp_path / "many").glob("chunk-*"))) > 4
    for a, b in zip(
        whole.batches(K, 16, seed=0, epoch=0, finals=True),
        parts.batches(K, 16, seed=0, epoch=0, finals=True),
        strict=True,
    ):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.features, b.features)
        assert a.finals is not None
        assert b.finals is not None
        there = a.tokens[:, 1:] != ABSENT  # past the end of an answer nothing is meant
        assert torch.equal(a.finals[there], b.finals[there])


def test_a_store_goes_on_where_it_was_killed_and_notices_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medusa.training.stored_features.CHUNK_ROWS", 50)
    read: list[int] = []

    class Counting(TransformersBackend):
        def extend(self, slot: int, token_ids: Sequence[int], every: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
            read.append(len(token_ids))
            if len(read) == 7:
                raise KeyboardInterrupt
            return super().extend(slot, token_ids, every)

    runner = Counting(make_model(), feature_layers=(1,))
    with pytest.raises(KeyboardInterrupt):
        FeatureCache.build(tmp_path, runner, examples(), {})
    done = len(list(tmp_path.glob("chunk-*.safetensors")))
    assert done >= 2
    FeatureCache.build(tmp_path, runner, examples(), {})
    assert len(read) < 7 + len(examples())  # what lies in whole chunks was not read again
    before = len(read)
    FeatureCache.build(tmp_path, runner, [*examples(), Example((5,), ((0, 1),), "")], {})
    assert len(read) == before
    FeatureCache.build(tmp_path, runner, [*examples(), *examples(3, seed=1)], {})
    assert len(read) == before + 3  # what was there stays
    FeatureCache.build(tmp_path, runner, examples(), {"dtype": "int8"})
    assert len(read) == before + 3 + len(examples())


def test_a_store_that_lacks_a_text_says_so(tmp_path: Path) -> None:
    FeatureCache.build(tmp_path, backend(), examples(), {})
    with pytest.raises(MedusaError, match="lacks a text"):
        FeatureCache(FeatureStore(tmp_path), examples(3, seed=9), 32)
    next(tmp_path.glob("chunk-*")).write_bytes(b"rubbish")
    with pytest.raises(MedusaError, match=r"chunk-00000.safetensors is damaged \(.*\): delete its directory"):
        FeatureStore(tmp_path)


def test_a_full_disk_is_one_clear_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("medusa.training.stored_features.save_file", full)
    with pytest.raises(MedusaError, match=r"No space left on device.*make room, or set training.cache_features=false"):
        FeatureCache.build(tmp_path, backend(), examples(), {})
    assert not list(tmp_path.glob("*.partial"))


# --- the loss ---------------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 0.3, 1.0]), st.sampled_from([0, 40]), st.sampled_from([0.0, 2.0]))
def test_the_loss_is_that_of_a_double_loop(seed: int, distillation: float, draft_vocab: int, overlap: float) -> None:
    torch.manual_seed(seed)
    heads = make_heads(draft_vocab)
    rows = draft_vocab or VOCAB
    lm_head = heads.lm_head
    tokens = torch.randint(0, VOCAB, (6, 1 + K))
    for i in range(6):
        if (gone := torch.randint(1, 2 + K, ()).item()) <= K:
            tokens[i, gone:] = ABSENT
    batch = Batch(torch.randn(6, 64), tokens, torch.randn(6, K, 32))
    assert batch.finals is not None
    with torch.no_grad():
        logits = heads(batch.features, tokens[:, :-1].clamp_min(0))
    teacher = teacher_logits(batch.finals, lm_head)
    found = losses(logits, draft_labels(heads, tokens[:, 1:]), teacher, distillation, overlap)
    ids = list(range(VOCAB)) if heads.draft_ids is None else heads.draft_ids.tolist()
    for k in range(K):
        entropies, divergences, commons = [], [], []
        for i in range(6):
            token = int(tokens[i, k + 1])
            if token not in ids:
                continue
            z = [float(x) for x in logits[k][i]]
            log_q = [x - max(z) - math.log(sum(math.exp(y - max(z)) for y in z)) for x in z]
            final = batch.finals[i, k].tolist()
            own = [sum(a * b for a, b in zip(final, row, strict=True)) for row in lm_head.tolist()]
            log_p = [x - max(own) - math.log(sum(math.exp(y - max(own)) for y in own)) for x in own]
            divergences.append(sum(math.exp(p) * (p - q) for p, q in zip(log_p, log_q, strict=True)))
            commons.append(sum(math.exp(min(p, q)) for p, q in zip(log_p, log_q, strict=True)))
            entropies.append(-log_q[ids.index(token)])
        count = len(commons)
        share = math.exp(-overlap * sum(commons) / max(1, count))
        away = share * sum(divergences) + (1 - share) * (count - sum(commons))
        total = (1 - distillation) * sum(entropies) + distillation * away
        assert int(found.counts[k]) == count
        assert float(found.sums[k]) == pytest.approx(total, rel=1e-3, abs=1e-3)
    assert len(logits[0][0]) == rows


def test_heads_weigh_lambda_to_the_k() -> None:
    assert head_weights(3, 0.5).tolist() == [0.5, 0.25, 0.125]


# --- accuracy ---------------------------------------------------------------------------------------------------------


def test_ranks_are_the_places_of_the_true_tokens() -> None:
    heads = make_heads(40)
    tokens = torch.tensor([[2, 4, 6, 8], [10, 11, 12, 14], [3, 5, ABSENT, ABSENT]])
    features = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    found = ranks(heads, [Batch(features, tokens, None)])
    assert found.shape == (2, K)  # the third answer is too short
    with torch.no_grad():
        logits = heads(features[:2], tokens[:2, :-1])
    assert found[1, 0] == DEEPEST  # 11 is not in the draft vocabulary
    for i, k in ((0, 0), (0, 1), (0, 2), (1, 1), (1, 2)):
        label = int(tokens[i, k + 1]) // 2
        order = logits[k][i].argsort(descending=True, stable=True).tolist()
        assert found[i, k] == order.index(label)


def test_heads_are_measured_in_the_precision_of_their_weights_whatever_the_features_are_kept_in() -> None:
    heads = make_heads()
    features = torch.randn(200, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    tokens = torch.randint(0, VOCAB, (200, 1 + K), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = torch.stack(heads(features.float(), tokens[:, :-1]), 1)  # [200, K, V]
    order = logits.argsort(descending=True, stable=True)
    expected = (order == tokens[:, 1:, None]).int().argmax(-1).clamp_max(DEEPEST)
    assert torch.equal(ranks(heads, [Batch(features, tokens, None)]), expected)


class SameLogits(Heads):
    """Of whose logits all are equal, or none is a number."""

    value = 0.0

    def forward(self, features: torch.Tensor, tokens: torch.Tensor) -> list[torch.Tensor]:
        return [torch.full((len(tokens), self.lm_head_rows), self.value) for _ in range(K)]


def test_of_equal_logits_the_smaller_id_comes_first() -> None:
    heads = make_heads()
    heads.__class__ = SameLogits
    tokens = torch.tensor([[9, 0, 3, 63], [9, 64, 1, 100]])
    found = ranks(heads, [Batch(torch.zeros(2, 64), tokens, None)])
    assert found.tolist() == [[0, 3, 63], [DEEPEST, 1, DEEPEST]]


def test_heads_that_say_no_numbers_are_never_right(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = make_heads()
    heads.__class__ = SameLogits
    monkeypatch.setattr(SameLogits, "value", math.nan)
    found = ranks(heads, [Batch(torch.zeros(1, 64), torch.tensor([[9, 0, 3, 63]]), None)])
    assert found.tolist() == [[DEEPEST] * K]


def test_there_is_no_accuracy_of_nothing() -> None:
    with pytest.raises(MedusaError, match=f"every answer is shorter than {K + 1} tokens"):
        Accuracy.of(torch.empty(0, K, dtype=torch.int64))


def test_the_longest_answer_is_that_which_can_be_guessed() -> None:
    text = [Example(tuple(range(20)), ((0, 4), (6, 8)), ""), Example(tuple(range(20)), ((15, 20),), "")]
    assert longest_answer(text[:1], 100) == 3  # before its first token there is nothing to guess it from
    assert longest_answer(text, 100) == 5
    assert longest_answer(text, 17) == 3
    assert longest_answer([], 100) == 0
    for example in text:
        tokens = (
            joined([read_rows(backend(), example)]).take(torch.arange(count_rows(example, 100)), 4, 32, False).tokens
        )
        assert bool((tokens >= 0).all(1).any()) == (longest_answer([example], 100) > 4)


@given(st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=60), st.integers(2, 12))
def test_no_tree_of_that_size_expects_more(table: list[list[int]], nodes: int) -> None:
    best = dict(best_paths(table, nodes))
    assert all(path[:-1] in best or len(path) == 1 for path in best)  # every path has its prefix
    counts = {
        path: sum(tuple(row[: len(path)]) == path for row in table) / len(table)
        for path in {tuple(row[:depth]) for row in table for depth in (1, 2, 3)}
    }
    assert sum(best.values()) == pytest.approx(sum(sorted(counts.values(), reverse=True)[: nodes - 1]), abs=1e-3)


def test_accuracy_counts_the_best_n() -> None:
    accuracy = Accuracy.of(torch.tensor([[0, 0, 0], [0, 6, 0], [9, 0, 0], [DEEPEST, 0, 0]]))
    assert accuracy.top == {1: (0.5, 0.75, 1.0), 5: (0.5, 0.75, 1.0), 10: (0.75, 1.0, 1.0)}
    assert accuracy.expected_tokens(1) == 1
    assert accuracy.expected_tokens(2) == 1.5
    assert accuracy.expected_tokens(64) == pytest.approx(1 + (2 + 2 + 2) / 4 + 3 / 4)


# --- the trainer ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[FeatureCache, FeatureCache]:
    path = tmp_path_factory.mktemp("features")
    return (
        FeatureCache.build(path / "train", backend(), examples(), {}),
        FeatureCache.build(path / "held-out", backend(), examples(3, seed=9), {}),
    )


def trainer(
    caches: tuple[FeatureCache, FeatureCache],
    directory: Path,
    *,
    heads: Heads | None = None,
    tell: Callable[[Progress], None] = lambda progress: None,
    facts: dict[str, Any] | None = None,
    **options: Any,
) -> Trainer:
    config = OptimiserSettings(**{"batch_size": 32, "epochs": 3, "save_every": 4, "learning_rate": 3e-3, **options})
    heads = heads or make_heads()
    return Trainer(
        heads,
        heads.lm_head,
        *caches,
        config,
        directory,
        accelerator=Accelerator(cpu=True),
        facts=facts or {},
        on_progress=tell,
    )


def test_training_lowers_the_loss_and_changes_nothing_but_heads(
    caches: tuple[FeatureCache, FeatureCache], tmp_path: Path
) -> None:
    first: list[tuple[float, ...]] = []
    heads = make_heads()
    frozen = {name: tensor.clone() for name, tensor in heads.named_buffers()}
    before = {name: parameter.clone() for name, parameter in heads.named_parameters()}
    run = trainer(caches, tmp_path, heads=heads, tell=lambda p: first.append(p.losses), epochs=12)
    run.run()
    assert sum(map(sum, first[-5:])) < 0.8 * sum(map(sum, first[:5]))
    for name, tensor in heads.named_buffers():
        assert torch.equal(tensor, frozen[name]), name
    assert all(not torch.equal(parameter, before[name]) for name, parameter in heads.named_parameters())
    assert not any(buffer.requires_grad for buffer in heads.buffers())


@pytest.mark.parametrize("distillation", [0.0, 1.0])
def test_a_killed_training_ends_with_the_same_weights(
    caches: tuple[FeatureCache, FeatureCache], tmp_path: Path, distillation: float
) -> None:
    whole = trainer(caches, tmp_path / "whole", distillation=distillation)
    whole.run()

    class Killed(BaseException):
        pass

    deaths = {6, 9, 17, 31}
    steps: list[int] = []

    def tell(progress: Progress) -> None:
        steps.append(progress.step)
        if progress.step in deaths:
            deaths.discard(progress.step)
            raise Killed

    while True:
        run = trainer(caches, tmp_path / "killed", tell=tell, distillation=distillation)
        run.resume()
        try:
            run.run()
            break
        except Killed:
            pass
    assert not deaths
    assert run.state.step == whole.state.step == steps[-1]
    for (name, a), (_, b) in zip(whole.heads.state_dict().items(), run.heads.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert run.state.history == whole.state.history


def test_a_signal_saves_before_it_stops(caches: tuple[FeatureCache, FeatureCache], tmp_path: Path) -> None:
    def tell(progress: Progress) -> None:
        if progress.step == 6:  # between two checkpoints
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(InterruptedTrainingError, match=r"stopped at step 7 of \d+; run the same command again with"):
        trainer(caches, tmp_path, tell=tell).run()
    again = trainer(caches, tmp_path)
    assert again.resume()
    assert again.state.step == 7
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_checkpoint(
    caches: tuple[FeatureCache, FeatureCache], tmp_path: Path
) -> None:
    run = trainer(caches, tmp_path)

    def spoil(progress: Progress) -> None:
        if progress.step == 6:
            with torch.no_grad():
                run.heads.project.weight[0, 0] = math.nan

    run._on_progress = spoil
    with pytest.raises(MedusaError, match="not a number at step 7"):
        run.run()
    again = trainer(caches, tmp_path)
    again.resume()
    assert again.state.step == 4
    assert all(torch.isfinite(parameter).all() for parameter in again.heads.parameters())
    spoilt = again.heads.project.weight
    with torch.no_grad():
        spoilt[0, 0] = math.nan
    again.save()  # as a run that diverges may
    third = trainer(caches, tmp_path)
    third.resume()
    with pytest.raises(
        MedusaError, match=r"at step 5, the first after .*checkpoint.pt: its weights are spoilt; delete it"
    ):
        third.run()


def test_a_gradient_that_is_no_number_never_reaches_the_weights(
    caches: tuple[FeatureCache, FeatureCache], tmp_path: Path
) -> None:
    """Though the loss of that step is one."""
    run = trainer(caches, tmp_path, save_every=1)

    def spoil(progress: Progress) -> None:
        if progress.step == 6:
            run.heads.project.weight.register_hook(lambda gradient: gradient * math.inf)

    run._on_progress = spoil
    with pytest.raises(MedusaError, match="not a number at step 7: what was saved before is kept; go on with --resume"):
        run.run()
    assert all(torch.isfinite(parameter).all() for parameter in run.heads.parameters())
    again = trainer(caches, tmp_path)
    assert again.resume()
    assert again.state.step == 6


def test_a_training_goes_on_with_other_settings_of_the_optimiser(
    caches: tuple[FeatureCache, FeatureCache], tmp_path: Path
) -> None:
    first = trainer(caches, tmp_path, epochs=1)
    first.run()
    again = trainer(caches, tmp_path, epochs=1)
    again.resume()
    assert (
        again.standing()
        == f"all {first.steps} steps are done: more training.epochs (or training.max_steps) would go on"
    )
    rates: list[float] = []
    changed: dict[str, Any] = {"epochs": 2, "learning_rate": 1e-4, "weight_decay": 0.5, "warmup": 0.0}
    further = trainer(caches, tmp_path, tell=lambda p: rates.append(p.learning_rate), **changed)
    assert further.resume()
    assert further.standing() == f"going on after step {first.steps}"
    further.run()
    assert further.state.step == further.steps == 2 * first.steps
    assert rates == pytest.approx([1e-4 * schedule(s, further.steps, 0.0) for s in range(first.steps, further.steps)])
    assert [group["weight_decay"] for group in further._optimizer.param_groups] == [0.5]


def test_early_stopping_can_be_put_off(caches: tuple[FeatureCache, FeatureCache], tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 50, "eval_every": 2, "learning_rate": 0.5}
    first = trainer(caches, tmp_path, patience=1, **options)
    first.run()
    again = trainer(caches, tmp_path, patience=1, **options)
    again.resume()
    assert "early stopping has ended the training" in again.standing()
    more = trainer(caches, tmp_path, patience=2, **options)
    more.resume()
    more.run()
    assert more.state.step > first.state.step


@pytest.mark.parametrize("fast", [True, False])
def test_the_precision_follows_the_machine(
    fast: bool, caches: tuple[FeatureCache, FeatureCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: fast)
    assert OptimiserSettings().precision == "auto"
    run = trainer(caches, tmp_path, max_steps=2)
    assert run.precision == ("bfloat16" if fast else "float32")
    run.run()
    expected = trainer(caches, tmp_path / "named", max_steps=2, precision=run.precision)
    expected.run()
    assert all(torch.equal(a, b) for a, b in zip(run.heads.parameters(), expected.heads.parameters(), strict=True))
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: not fast)
    elsewhere = trainer(caches, tmp_path, max_steps=3)  # on another machine it goes on, and says in what
    assert elsewhere.resume()
    assert elsewhere.standing() == f"going on after step 2, in {elsewhere.precision}; it was {run.precision} until here"
    assert elsewhere.precision != run.precision
    assert training_dtype("auto", torch.device("meta")) == torch.float32


def test_early_stopping_ends_with_the_best_weights(caches: tuple[FeatureCache, FeatureCache], tmp_path: Path) -> None:
    run = trainer(caches, tmp_path, epochs=50, eval_every=2, patience=2, learning_rate=0.5)
    run.run()
    assert run.state.step < run.steps
    best = max(entry["tokens_per_step"]["16"] for entry in run.state.history)
    assert run.state.history[-1]["tokens_per_step"]["16"] < best
    held = ranks(run.heads, caches[1].in_order(K, 64))
    assert Accuracy.of(held).facts()["tokens_per_step"]["16"] == best  # type: ignore[index]


def test_checkpoints_of_other_runs_and_damaged_ones_are_refused(
    caches: tuple[FeatureCache, FeatureCache], tmp_path: Path
) -> None:
    assert not trainer(caches, tmp_path).resume()
    trainer(caches, tmp_path, max_steps=2, facts={"text": "a"}).run()
    with pytest.raises(UsageError, match="belongs to a run with another text"):
        trainer(caches, tmp_path, facts={"text": "b"}).resume()
    heads = {"num_heads": 4, "kind": "recurrent"}
    trainer(caches, tmp_path / "heads", max_steps=2, facts={"heads": heads}).run()
    with pytest.raises(UsageError, match=r"belongs to a run with heads.num_heads=4, not 5"):
        trainer(caches, tmp_path / "heads", facts={"heads": {**heads, "num_heads": 5}}).resume()
    # An older version wrote more facts, and not all of these.
    assert trainer(caches, tmp_path / "heads", facts={"heads.kind": "recurrent", "engine.dtype": "int8"}).resume()
    with pytest.raises(MedusaError, match=r"is of another version of Medusa .*: delete it to begin again"):
        trainer(caches, tmp_path, facts={"text": "a"}, heads=make_heads(mlp_width=20)).resume()
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(MedusaError, match="is damaged"):
        trainer(caches, tmp_path, facts={"text": "a"}).resume()


def test_the_learning_rate_warms_up_and_falls_by_a_cosine(
    caches: tuple[FeatureCache, FeatureCache], tmp_path: Path
) -> None:
    rates: list[float] = []
    run = trainer(caches, tmp_path, tell=lambda p: rates.append(p.learning_rate), max_steps=20, warmup=0.2)
    run.run()
    assert len(rates) == 20
    assert rates[:4] == pytest.approx([3e-3 * i / 4 for i in range(1, 5)])
    assert rates[4] == pytest.approx(3e-3)
    assert rates[12] == pytest.approx(1.5e-3)
    assert rates[4:] == sorted(rates[4:], reverse=True)


def test_live_features_train_like_cached_ones(tmp_path: Path, caches: tuple[FeatureCache, FeatureCache]) -> None:
    """With all rows in each step, where their order no longer matters, the weights differ by rounding only."""
    options: dict[str, Any] = {
        "epochs": 12,
        "batch_size": caches[0].num_rows,
        "precision": "float32",
        "distillation": 0.5,
    }
    live = trainer((LiveFeatures(backend(), examples()), caches[1]), tmp_path, **options)  # type: ignore[arg-type]
    live.run()
    cached = trainer(caches, tmp_path / "cached", **options)
    cached.run()
    assert live.state.step == cached.state.step == 12
    pairs = list(zip(live.heads.parameters(), cached.heads.parameters(), make_heads().parameters(), strict=True))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b, _ in pairs)
    assert all((a - start).abs().max() > 5e-3 for a, _, start in pairs)


# --- the configuration ------------------------------------------------------------------------------------------------


def test_a_run_file_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    config = load_config(None, {"model": "m", "text.tokens": 5}, ["training.lambda=0.9", "heads.feature_layers=[1, 2]"])
    assert config.training.lambda_ == 0.9
    assert config.heads.feature_layers == (1, 2)
    path = tmp_path / "run.yaml"
    path.write_text(config.dump())
    assert load_config(path, {}) == config
    assert load_config(path, {"text.tokens": None}, ["text.tokens=7"]).text.tokens == 7


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("training.epoch=2", "unknown setting training.epoch"),
        ("epochs=2", "unknown setting epochs"),
        ("training.epochs=0", "training.epochs: input should be greater than or equal to 1, not 0"),
        ("training.epochs", "'training.epochs' is not a setting: write section.key=value"),
        ("training.learning_rate=.nan", "training.learning_rate: "),
        ("training.precision=half", "training.precision: "),
        ("training.seed=-1", "training.seed: "),
        ("heads.kind=big", "heads.kind: "),
        ("training.epochs=[", "not valid YAML"),
    ],
)
def test_bad_settings_are_one_clear_sentence(assignment: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_config(None, {"model": "m"}, [assignment])
    assert message in str(caught.value)


def test_a_value_is_not_a_section() -> None:
    with pytest.raises(UsageError, match="model is not a section of settings"):
        load_config(None, {}, ["model=m", "model.name=x"])


@pytest.mark.parametrize("text", ["- a\n", "a: [\n", "nonsense: 1\n"])
def test_bad_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(UsageError):
        load_config(path, {})
    with pytest.raises(UsageError, match="cannot read"):
        load_config(tmp_path / "none.yaml", {})


def test_few_steps_ask_for_no_more_text_than_they_read() -> None:
    assert load_config(None, {}).text.tokens == 300_000
    assert load_config(None, {"training.max_steps": 20}).text.tokens == math.ceil(1.05 * 20 * 512 / 0.95)
    assert load_config(None, {"training.max_steps": 20, "text.tokens": 5}).text.tokens == 5


def test_the_defaults_are_a_valid_run() -> None:
    assert TrainConfig().training.lambda_ == 0.8
