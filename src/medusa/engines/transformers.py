"""Any decoder-only Hugging Face model as a `Backend`, unmodified: tree attention by mask and position ids.

What makes it work on a model that knows nothing of trees:

- a 4-D additive mask, which transformers passes through as it is; one for each kind of layer (full, sliding window);
- explicit position ids, length + depth, so that siblings share a position;
- a cache of our own (`kv_cache.py`), to which rows of different lengths are written in place.

At load a self-check compares the logits of a small tree with those of its paths run alone.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from medusa.engines.compiled_layers import compile_layers
from medusa.engines.kv_cache import Cursor, DeviceCursor, SlotCache
from medusa.engines.masks import MaskMaker, Masks
from medusa.engines.protocol import (
    DEFAULT_MAX_LENGTH,
    MAX_NODES,
    PlainTree,
    TokenTree,
    check_feature_layers,
    check_max_length,
    check_room,
    check_slots,
)
from medusa.engines.topology import topology
from medusa.engines.tree_attention import use_grouped_attention
from medusa.errors import MedusaError, UsageError, shortened
from medusa.heads.module import BaseWeights

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFILL_CHUNK = 512
BUCKET = 64  # attention runs over the used length, rounded up to this
COMPILED_NODES = 4  # compiled trees have a multiple of this many nodes

_RECURRENT = ("mamba", "rwkv", "jamba", "recurrent_gemma", "falcon_h1", "xlstm", "bamba", "zamba", "granitemoehybrid")
_ALIBI = ("bloom", "mpt")


class SelfCheckError(MedusaError):
    """Tree attention and sequential decoding disagree: the model does not honour masks and positions."""


class TransformersBackend:
    """Runs `model` with `num_slots` slots.

    Args:
        model: a causal language model in eval mode. It is not changed, but for its attention implementation where
            that cannot take a mask (flash attention).
        max_length: positions per slot; None takes the model's context (at most 32,768).
        feature_layers: hidden states that the heads read beside the final one (see HeadsConfig).
        compile: compile each decoder layer for `verify` with torch.compile.

    Raises:
        MedusaError: the architecture cannot decode trees, or the self-check fails.
    """

    name = "transformers"
    max_nodes = MAX_NODES
    same_bits = False  # the width of a pass changes how sums are rounded

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        num_slots: int = 1,
        max_length: int | None = None,
        feature_layers: Sequence[int] = (),
        compile: bool = False,
        self_check: bool = True,
    ) -> None:
        check_slots(num_slots)
        config = model.config.get_text_config()
        _refuse_unsupported(model, config)
        self.model = model
        self.num_slots = num_slots
        self.num_layers: int = config.num_hidden_layers
        self.hidden_size: int = config.hidden_size
        lm_head = model.get_output_embeddings()
        self.vocab_size: int = lm_head.weight.shape[0]
        self.max_length = check_max_length(max_length, _context(config))
        check_feature_layers(feature_layers, self.num_layers)
        self.feature_layers = tuple(feature_layers)
        self.masks = MaskMaker(config, model.dtype)
        self._lm_head = lm_head
        self._embedding: Tensor = cast(Tensor, model.get_input_embeddings().weight)
        self.device: torch.device = self._embedding.device
        self.cache = SlotCache(self.num_layers, num_slots, self.max_length + MAX_NODES)  # the nodes of a tree
        self._lengths = [0] * num_slots
        if getattr(config, "_attn_implementation", "") not in ("sdpa", "eager"):
            try:  # flash and flex attention take no custom mask
                model.set_attn_implementation("sdpa")
            except ValueError:  # soft-capping, for one
                model.set_attn_implementation("eager")
        if self.device.type == "cuda":
            use_grouped_attention(model)
        self.compiled = compile
        self.padding = COMPILED_NODES if compile else 1
        if self_check:
            check_tree_attention(self)
        if compile:
            compile_layers(model, self.cache)

    # --- the protocol -------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def extend(self, slot: int, token_ids: Sequence[int], every: bool = False) -> tuple[Tensor, Tensor]:
        held = self._lengths[slot]
        check_room(token_ids, held, self.max_length)
        rows = []
        try:
            for start in range(0, len(token_ids), PREFILL_CHUNK):
                chunk = token_ids[start : start + PREFILL_CHUNK]
                count = len(chunk)
                depths = np.arange(count)[None]
                visible = np.tril(np.ones((1, count, count), dtype=np.bool_))
                logits, features = self._forward([slot], torch.tensor([chunk]), depths, visible, extends=True)
                self._lengths[slot] += count
                rows.append(features[0] if every else features[0, -1])
        except BaseException:  # also Ctrl-C in a long text: a part of it must not stay
            self._lengths[slot] = held
            raise
        return logits[0, -1], torch.cat(rows) if every else rows[-1].clone()

    @torch.inference_mode()
    def verify(self, slots: Sequence[int], drafts: Sequence[TokenTree]) -> tuple[Tensor, Tensor]:
        size = max(len(draft.tokens) for draft in drafts)
        if size > self.max_nodes:
            raise UsageError(f"a draft may have at most {self.max_nodes} nodes, not {size}")
        if self.compiled and size > 1:  # few shapes, so few graphs: nodes in excess see only themselves
            size = -(-size // COMPILED_NODES) * COMPILED_NODES
        tokens = torch.zeros(len(drafts), size, dtype=torch.int64)
        depths = np.zeros((len(drafts), size), dtype=np.int64)
        visible = np.broadcast_to(np.eye(size, dtype=np.bool_), (len(drafts), size, size)).copy()
        for b, draft in enumerate(drafts):
            shape, n = topology(draft.parents), len(draft.tokens)
            if self._lengths[slots[b]] + int(shape.depths.max()) >= self.max_length:
                raise UsageError(f"the draft reaches past the context of {self.max_length} tokens")
            tokens[b, :n] = torch.tensor(draft.tokens)
            depths[b, :n] = shape.depths
            visible[b, :n, :n] = shape.mask
        return self._forward(slots, tokens, depths, visible)

    @torch.inference_mode()
    def keep(self, slots: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        for slot, path in zip(slots, paths, strict=True):
            self.cache.keep(slot, self._lengths[slot], path)
            self._lengths[slot] += len(path)

    @torch.inference_mode()
    def copy(self, source: int, target: int, length: int) -> None:
        for slot in (source, target):
            if not 0 <= slot < self.num_slots:
                raise UsageError(f"there is no slot {slot}")
        held = self._lengths[source]
        if not 0 <= length <= held:
            raise UsageError(f"slot {source} holds {held} tokens: {length} of them cannot be copied")
        if source != target:
            self.cache.copy(source, target, length)
        self._lengths[target] = length

    def release(self, slot: int) -> None:
        """Empties a slot. All slots lie in one buffer, which stays: `capacity` positions for each, which are 1,024 or
        less than twice the longest text so far, at most `max_length` and a tree. `resize` gives it back."""
        self._lengths[slot] = 0

    def length(self, slot: int) -> int:
        return self._lengths[slot]

    def base_weights(self) -> BaseWeights:
        if self._embedding.is_meta or self._lm_head.weight.is_meta:
            raise MedusaError(
                "heads need the embeddings and LM head in memory, but they are offloaded: use --heads none"
            )
        return BaseWeights(self._embedding, self._lm_head.weight)

    # --- a pass that waits for nothing: see `device/step.py` ------------------------------------------------------

    @property
    def on_gpu(self) -> bool:
        """Whether all of the model is on one CUDA device."""
        return self.device.type == "cuda" and {p.device for p in self.model.parameters()} == {self.device}

    @property
    def capacity(self) -> int:
        """Places of each slot now. When it changes the cache has moved, and what was captured before is void."""
        return self.cache.capacity

    def reserve(self, places: int) -> None:
        """Makes room for so many places in every slot, and puts the caches of all layers into one piece."""
        before = self.capacity
        self.cache.reserve(places)
        try:
            self.cache.stack()  # for a moment it is there twice
        except BaseException:
            self.cache.shrink(before)
            raise

    def resize(self, num_slots: int) -> None:
        """Empties all slots and gives their memory back; from now on there are `num_slots`."""
        check_slots(num_slots)
        self.num_slots, self._lengths = num_slots, [0] * num_slots
        self.cache.clear(num_slots)

    def set_length(self, slot: int, length: int) -> None:
        """What the device has kept of a slot."""
        self._lengths[slot] = length

    def device_pass(
        self, tokens: Tensor, positions: Tensor, masks: Masks, cursor: DeviceCursor
    ) -> tuple[Tensor, Tensor]:
        """Logits [B, N, V] and features [B, N, F*H] of tokens [B, N], to whose places the cache must have grown."""
        self.cache.cursor = cursor
        return self._call(tokens, positions, masks)

    @torch.inference_mode()
    def read_texts(self, tokens: Tensor) -> list[Tensor]:
        """The parts of the features of whole texts [B, T], filled up on the right with any token: hidden states
        [B, T, H], one of each feature layer and the LM head's input last. Without a cache, as the model itself does."""
        with capture_input(self._lm_head, slice(1)) as captured:
            out = self.model(input_ids=tokens, use_cache=False, output_hidden_states=bool(self.feature_layers))
        return [*(out.hidden_states[i] for i in self.feature_layers), captured[0]]

    # --- one forward pass -----------------------------------------------------------------------------------------

    def _forward(
        self,
        slots: Sequence[int],
        tokens: Tensor,  # [B, N]
        depths: np.ndarray,  # [B, N]
        visible: np.ndarray,  # [B, N, N]
        *,
        extends: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Logits and features [B, N, ...] of N new tokens per row; where it `extends`, logits of the last one only."""
        lengths = [self._lengths[slot] for slot in slots]
        count = tokens.shape[1]
        needed = max(lengths) + count
        self.cache.reserve(needed)
        static = self.compiled and not extends
        bucket = 1 << max(8, (needed - 1).bit_length()) if static else -(-needed // BUCKET) * BUCKET
        used = min(bucket, self.cache.capacity)
        self.cache.cursor = Cursor(slots, lengths, count, used, static=static)
        positions = torch.from_numpy(np.asarray(lengths)[:, None] + depths)
        masks = self.masks.make(lengths, depths, visible, used, self.device)
        logits = slice(-1, None) if extends else None
        return self._call(tokens.to(self.device), positions.to(self.device), masks, logits)

    def _call(
        self, tokens: Tensor, positions: Tensor, masks: Masks, logits: slice | None = None
    ) -> tuple[Tensor, Tensor]:
        with capture_input(self._lm_head, logits) as captured:
            out = self.model(
                input_ids=tokens,
                attention_mask=masks,
                position_ids=positions,
                past_key_values=self.cache,
                use_cache=True,
                output_hidden_states=bool(self.feature_layers),
            )
        final = captured[0]
        if not self.feature_layers:
            return out.logits, final
        middle = [out.hidden_states[i].to(final.device) for i in self.feature_layers]
        return out.logits, torch.cat([*middle, final], dim=-1)


def accepts_logits_to_keep(model: PreTrainedModel) -> bool:
    """Whether a pass can be told which positions' logits are wanted."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


@contextlib.contextmanager
def capture_input(module: nn.Module, given: slice | None = None) -> Iterator[list[Tensor]]:
    """The input [B, N, H] of `module` during a forward pass: the hidden state that the LM head reads, in any
    architecture. With `given` the module itself gets those of the N positions alone, where nobody wants the logits of
    the others."""
    captured: list[Tensor] = []

    def hook_in(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        captured.append(args[0])
        return None if given is None else (args[0][:, given], *args[1:])

    hook = module.register_forward_pre_hook(hook_in)
    try:
        yield captured
    finally:
        hook.remove()


def _context(config: Any) -> int:
    """How many positions can be decoded losslessly.

    Long-context RoPE (Phi-3) rotates all positions of a pass by other factors as soon as one lies past the original
    context, so that a drafted node would change the logits of its ancestors: decoding stays below.
    """
    context: int = getattr(config, "max_position_embeddings", None) or DEFAULT_MAX_LENGTH
    rope = getattr(config, "rope_parameters", None) or {}
    original = getattr(config, "original_max_position_embeddings", None) or rope.get("original_max_position_embeddings")
    return min(context, original) if rope.get("rope_type") == "longrope" and original else context


def _refuse_unsupported(model: PreTrainedModel, config: Any) -> None:
    name = getattr(config, "model_type", type(model).__name__)
    if getattr(model.config, "is_encoder_decoder", False):
        raise MedusaError(f"{name} is an encoder-decoder model: Medusa needs a decoder-only causal language model")
    if name in _ALIBI or getattr(config, "alibi", False):
        raise MedusaError(f"{name} uses ALiBi, whose biases follow the place in the cache: a tree cannot be verified")
    kinds = set(getattr(config, "layer_types", None) or ())
    if name.startswith(_RECURRENT) or getattr(model, "_is_stateful", False) or any("linear" in k for k in kinds):
        raise MedusaError(f"{name} has recurrent layers, whose state cannot branch: a tree cannot be verified")
    if other := kinds - {"full_attention", "sliding_attention"}:
        raise MedusaError(f"{name} has attention layers of a kind not supported yet: {', '.join(sorted(other))}")
    if model.get_output_embeddings() is None:
        raise MedusaError(f"{name} has no LM head: load it as a causal language model")


def check_tree_attention(backend: TransformersBackend) -> None:
    """The self-check: a tree in one pass against its paths alone. Raises SelfCheckError: they differ, or the model
    fails in whatever way (but for want of memory): it is not decoded."""
    try:
        _compare_paths(backend)
    except (MedusaError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each model fails in its own way on masks, positions or a cache that it does not know
        if "allocate memory" in str(error):  # torch has no type of its own for this on the CPU
            raise
        name, reason = type(backend.model).__name__, shortened(error, 120) or type(error).__name__
        raise SelfCheckError(f"{name} cannot verify a tree: its self-check failed ({reason})") from error


def _compare_paths(backend: TransformersBackend) -> None:
    """Compares a small tree in one pass with each of its paths run alone, without cache, by the model itself. Windows
    of attention are narrowed meanwhile, so that they show in so short a text. Raises SelfCheckError: they differ by
    more than rounding, so decoding would not be lossless."""
    vocab = backend.vocab_size
    prompt = [(7 * i + 3) % vocab for i in range(6)]
    draft = PlainTree(tuple((11 * i + 5) % vocab for i in range(6)), (-1, 0, 0, 1, 1, 4))
    limit, worst = backend.max_length, 0.0
    backend.max_length = len(prompt) + len(draft.tokens)  # longer than some limits
    with _narrow_window(backend):
        try:
            backend.release(0)
            backend.extend(0, prompt)
            logits, _ = backend.verify([0], [draft])
        finally:
            backend.max_length = limit
        for path in ((0, 2), (0, 1, 3), (0, 1, 4, 5)):
            ids = torch.tensor([[*prompt, *(draft.tokens[i] for i in path)]], device=backend.device)
            with torch.inference_mode():
                alone = backend.model(input_ids=ids, use_cache=False).logits[0, len(prompt) :].float()
            tree = logits[0, list(path)].float().to(alone.device)
            worst = max(worst, float((tree - alone).abs().max() / alone.std().clamp_min(1e-6)))
    backend.release(0)
    if not worst < (1e-2 if backend.model.dtype == torch.float32 else 0.5):
        windows = " or the sliding_window of its configuration" if backend.masks.window else ""
        raise SelfCheckError(
            f"{type(backend.model).__name__} does not honour tree attention{windows} (logits differ by {worst:.2g} "
            "standard deviations): it cannot be decoded losslessly with Medusa"
        )


@contextlib.contextmanager
def _narrow_window(backend: TransformersBackend) -> Iterator[None]:
    """Windows of 4 positions, for us and for the model, where there are any. A model whose class takes no note of the
    setting then differs: what transformers writes with such a one depends on its cache, so there is no right text."""
    masks, config = backend.masks, backend.model.config.get_text_config()
    window = masks.window
    if not window:
        yield
        return
    masks.window = config.sliding_window = min(window, 4)
    try:
        yield
    finally:
        masks.window = config.sliding_window = window
