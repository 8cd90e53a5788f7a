"""What heads are, in numbers: their configuration, and whether it fits a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, get_args

from medusa.errors import MedusaError, UsageError
from medusa.settings import HeadsKind, HeadsShape, check, setting

KINDS = get_args(HeadsKind)
_INSTEAD = "use heads trained for this model, or --heads none"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsConfig(HeadsShape):
    """All that is needed to rebuild the module, and to know whether it fits a model."""

    hidden_size: int = field(metadata={"ge": 1})
    vocab_size: int = field(metadata={"ge": 1})
    kind: HeadsKind = "residual"  # what files without a kind hold
    draft_vocab: int = 0  # how many tokens a head can propose; 0: all of them
    mlp_width: int = setting(0, "0: one linear layer with SiLU; else a gated MLP of this width.", ge=0)
    feature_layers: tuple[int, ...] = setting(  # i is the output of layer i
        (),
        "Hidden states read beside the final one.",
        good=lambda layers: all(i > 0 for i in layers),
        rule="layer numbers from 1",
    )
    base_model: str = ""
    vocab_hash: str = ""  # see `vocabulary_hash`
    tree: tuple[tuple[tuple[int, ...], float], ...] = ()  # (rank path, calibrated probability)
    training: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check(self, "heads: ")
        if not 0 <= self.draft_vocab <= self.vocab_size:
            raise UsageError(f"heads: draft_vocab must be from 0 to vocab_size, not {self.draft_vocab}")
        if self.kind == "recurrent" and self.num_layers != 1:
            raise UsageError("heads: a recurrent block has num_layers 1")

    @property
    def feature_size(self) -> int:
        """Width of the features a backend must deliver: H for each feature layer, and H for the final one."""
        return self.hidden_size * (1 + len(self.feature_layers))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HeadsConfig:
        values = {key: value for key, value in data.items() if key != "format"}
        if unknown := sorted(values.keys() - {f.name for f in fields(cls)}):
            raise UsageError(f"heads: unknown settings {', '.join(unknown)}")
        values["feature_layers"] = tuple(values.get("feature_layers", ()))
        values["tree"] = tuple((tuple(path), float(f)) for path, f in values.get("tree", ()))
        return cls(**values)


def vocabulary_hash(vocabulary: Mapping[str, int]) -> str:
    """A short digest of token -> id, the same for every copy of a tokenizer."""
    text = json.dumps(sorted(vocabulary.items(), key=lambda item: item[1]), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_vocabulary(config: HeadsConfig, vocab_hash: str) -> None:
    """Raises MedusaError where both hashes are known and differ: the heads belong to another tokenizer."""
    if vocab_hash and config.vocab_hash and vocab_hash != config.vocab_hash:
        model = config.base_model or "another model"
        raise MedusaError(f"these heads were trained for {model}, whose tokenizer is another: {_INSTEAD}")


def check_shape(config: HeadsConfig, vocab_size: int, hidden_size: int, num_layers: int | None = None) -> None:
    """Raises MedusaError where the heads belong to a model of another shape."""
    expected, actual = (config.vocab_size, config.hidden_size), (vocab_size, hidden_size)
    if expected != actual:
        raise MedusaError(
            f"these heads belong to a model with vocabulary and hidden size {expected}, not {actual}: {_INSTEAD}"
        )
    if num_layers is not None and any(i >= num_layers for i in config.feature_layers):
        layer = max(config.feature_layers)
        raise MedusaError(f"these heads read layer {layer}, but the model has {num_layers}: {_INSTEAD}")
