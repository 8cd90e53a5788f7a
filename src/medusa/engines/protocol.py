"""The protocol between decoding and what runs the model.

A backend has numbered slots, each with a KV cache and a length of its own, so one text, a batch and a server all use
the same calls:

    logits, features = backend.extend(slot, prompt)         # the prompt enters the cache, after what is there
    logits, features = backend.verify([slot], [draft])      # one pass over the tree; the cache holds N rows more
    backend.keep([slot], [path])                            # the accepted rows stay, the others are dropped
    backend.copy(slot, other, length)                       # the beginning of a text becomes that of another slot
    backend.release(slot)

Tensors come back on the device that computed them; logits may be a view that the backend's next call overwrites. V is
the vocabulary, H the hidden size, F the number of hidden states that the heads read (1 unless they ask for middle
layers).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from medusa.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from medusa.engines.topology import Parents
    from medusa.heads.module import BaseWeights


DEFAULT_MAX_LENGTH = 32768
MAX_NODES = 256  # of one tree, on every backend


class TokenTree(Protocol):
    """What a backend needs of a draft: N tokens and their parents, the root (parent -1) first."""

    @property
    def tokens(self) -> Sequence[int]: ...

    @property
    def parents(self) -> Parents: ...


class PlainTree(NamedTuple):
    """A TokenTree and nothing more: to check or to time a pass with."""

    tokens: tuple[int, ...]
    parents: Parents


class Backend(Protocol):
    """One loaded model. Not thread-safe: one thread owns it."""

    name: str
    num_slots: int
    max_length: int  # positions a slot can hold; a draft may not reach past it
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_nodes: int  # of one tree
    same_bits: bool  # the numbers of a node do not depend on what else is in its pass
    padding: int  # 0: a pass computes the nodes of its trees; else each row as many as the largest tree, or the next
    # multiple of this (the root alone is never padded): what `budget.py` prices

    def extend(self, slot: int, token_ids: Sequence[int], every: bool = False) -> tuple[Tensor, Tensor]:
        """Adds T tokens to the text of a slot, whatever it holds. Returns logits [V] and features [F*H] of the last
        token; with `every` the features [T, F*H] of all of them, from which heads learn, and those logits.

        Raises UsageError when there is no token or no room. Whatever is raised, Ctrl-C too, the slot holds the text
        that it held.
        """
        ...

    def verify(self, slots: Sequence[int], drafts: Sequence[TokenTree]) -> tuple[Tensor, Tensor]:
        """Runs B trees in one forward pass, each after the text of its slot; every node sees that text and its
        ancestors. Returns logits [B, N, V] and features [B, N, F*H], N the largest tree; rows past the end of a
        smaller tree mean nothing. The lengths of the slots do not change."""
        ...

    def keep(self, slots: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """After `verify` of the same slots: the nodes of each path (from the root on) join the text of the slot."""
        ...

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` tokens of a slot become the text of another: what follows has the bits that it would have
        after them in `source`, whose text stays. Where both are one slot, its text is cut short.

        Raises UsageError when there is no such slot, or it holds fewer tokens.
        """
        ...

    def release(self, slot: int) -> None:
        """Empties a slot. Some of its memory stays at hand for the next text: how much, each backend says."""
        ...

    def length(self, slot: int) -> int:
        """How many tokens a slot holds."""
        ...

    def base_weights(self) -> BaseWeights:
        """The embeddings and LM head that heads borrow."""
        ...


def check_max_length(max_length: int | None, context: int) -> int:
    """Positions of a slot: `max_length`, or the context but at most 32,768. UsageError: it is past the context."""
    if max_length is not None and not 1 <= max_length <= context:
        raise UsageError(f"max_length must be from 1 to the model's context of {context}, not {max_length}")
    return max_length or min(context, DEFAULT_MAX_LENGTH)


def check_slots(num_slots: int) -> None:
    """Raises UsageError for a backend without slots."""
    if num_slots < 1:
        raise UsageError("num_slots must be at least 1")


def check_feature_layers(feature_layers: Sequence[int], num_layers: int) -> None:
    """Raises UsageError for a layer that is not there, or whose output is the final hidden state."""
    if any(not 1 <= i < num_layers for i in feature_layers):
        raise UsageError(f"feature_layers must be from 1 to {num_layers - 1}")


def check_room(token_ids: Sequence[int], held: int, max_length: int) -> None:
    """Raises UsageError for no tokens, or for more than fit after the `held` tokens of a slot."""
    if not token_ids:
        raise UsageError("the text is empty: it needs at least one token")
    if (length := held + len(token_ids)) > max_length:
        raise UsageError(f"the text has {length} tokens, but the context holds {max_length}: shorten it")
