"""By name: who drafts, with which tree and how many nodes; and the stepper that follows from it on a backend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, cast, get_args

from medusa.decoding.budget import NodeBudget
from medusa.decoding.draft import Drafter, NgramDrafter, NoDrafter, UnionDrafter
from medusa.decoding.reference import ReferenceStepper
from medusa.decoding.times import MachineTimes
from medusa.decoding.tree import Tree
from medusa.engines.protocol import MAX_NODES
from medusa.errors import UsageError
from medusa.settings import DrafterName, TreeName

if TYPE_CHECKING:
    from medusa.decoding.stepper import Stepper
    from medusa.engines.native import NativeBackend
    from medusa.engines.protocol import Backend
    from medusa.engines.transformers import TransformersBackend
    from medusa.heads.module import HeadsRunner

DRAFTERS: tuple[str, ...] = get_args(DrafterName)
TREES: tuple[str, ...] = get_args(TreeName)

Nodes = int | Literal["auto"]


def which_tree(tree: str, heads: HeadsRunner | None, backend: Backend) -> str:
    """What "auto" means here. Raises UsageError for an unknown tree."""
    if tree not in TREES:
        raise UsageError(f"unknown tree {tree}: use one of {', '.join(TREES)}")
    if tree != "auto":
        return tree
    fixed = heads is not None and bool(heads.config.tree)
    return "static" if fixed and on_one_gpu(backend) is not None else "dynamic"


def make_stepper(backend: Backend, drafter: Drafter, nodes: Nodes, times: MachineTimes) -> Stepper:
    """The stepper that comes with the backend, where it knows the drafter: on a GPU one whose steps are captured, on
    the native engine one that drafts and chooses there. Else the reference.

    Raises:
        UsageError: see `check_nodes`.
    """
    check_nodes(nodes)
    gpu = on_one_gpu(backend)
    if gpu is not None:
        from medusa.device.stepper import DeviceStepper, parts

        try:
            parts(drafter)
        except UsageError:  # a dynamic tree, or a drafter of the user's own
            pass
        else:
            return DeviceStepper(gpu, drafter, nodes)
    chosen = choose_nodes(nodes, drafter, times, backend)
    if backend.name == "native":
        from medusa.native_stepper import NativeStepper, knows

        if knows(drafter):
            return NativeStepper(cast("NativeBackend", backend), drafter, chosen)
    return ReferenceStepper(backend, drafter, chosen)


def on_one_gpu(backend: Backend) -> TransformersBackend | None:
    """The backend, if all of its model is on one GPU."""
    if backend.name != "transformers":
        return None
    there = cast("TransformersBackend", backend)
    return there if there.on_gpu else None


def make_drafter(name: str, heads: HeadsRunner | None, tree: str = "dynamic") -> Drafter:
    """The drafter called `name`. Without heads, union is the n-gram drafter alone.

    Raises:
        UsageError: an unknown drafter, heads wanted but not there, or a static tree that the heads lack.
    """
    from medusa.decoding.heads_drafter import HeadsDrafter

    if name == "none":
        return NoDrafter()
    if name == "ngram" or (name == "union" and heads is None):
        return NgramDrafter()
    if name not in DRAFTERS:
        raise UsageError(f"unknown drafter {name}: use one of {', '.join(DRAFTERS)}")
    if heads is None:
        raise UsageError("the drafter heads needs heads: give --heads NAME or PATH, or use --drafter ngram")
    if tree == "static" and not heads.config.tree:
        raise UsageError("these heads come without a static tree: use --tree dynamic")
    fixed = Tree.from_paths(dict(heads.config.tree)) if tree == "static" else None
    drafter = HeadsDrafter(heads, fixed)
    return drafter if name == "heads" else UnionDrafter(drafter, NgramDrafter())


def check_nodes(nodes: object) -> None:
    """Raises UsageError for what is neither "auto" nor a whole number from 1 that some backend takes."""
    if nodes != "auto" and (not isinstance(nodes, int) or isinstance(nodes, bool) or nodes < 1):
        raise UsageError(f"nodes must be auto or a whole number from 1 (the root counts), not {nodes}")
    if isinstance(nodes, int) and nodes > MAX_NODES:
        raise UsageError(f"nodes may be at most {MAX_NODES}, not {nodes}")


def choose_nodes(nodes: Nodes, drafter: Drafter, times: MachineTimes, backend: Backend) -> int | NodeBudget:
    """What a stepper takes for `nodes`. Times are asked for only where nodes are chosen by them, since it may take
    seconds. Raises UsageError, see `check_nodes`."""
    from medusa.decoding.heads_drafter import HeadsDrafter

    check_nodes(nodes)
    if nodes != "auto":
        return nodes
    if isinstance(drafter, NoDrafter):
        return 1
    parts = drafter.drafters if isinstance(drafter, UnionDrafter) else (drafter,)
    takes_time = any(isinstance(part, HeadsDrafter) for part in parts)
    return NodeBudget(times, free=not takes_time, max_nodes=backend.max_nodes, padding=backend.padding)
