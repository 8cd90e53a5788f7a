"""The CPU engine of Medusa, as `medusa.engines.native` uses it. See the README beside this package's sources."""

from medusa_native._engine import (
    CHUNK,
    KEPT,
    MAX_NODES,
    PACKED_KINDS,
    SPAN,
    Drafting,
    Engine,
    Heads,
    Packed,
    Rule,
    Text,
    Times,
    choose,
    read_bandwidth,
    sample,
    usable_isas,
)

__all__ = [
    "CHUNK",
    "KEPT",
    "MAX_NODES",
    "PACKED_KINDS",
    "SPAN",
    "Drafting",
    "Engine",
    "Heads",
    "Packed",
    "Rule",
    "Text",
    "Times",
    "choose",
    "read_bandwidth",
    "sample",
    "usable_isas",
]
