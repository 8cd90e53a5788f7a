"""Commands that exchange heads with others: `medusa import`, `medusa export`, `medusa push`, `medusa pull`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from medusa.cli.options import AsJson, with_options
from medusa.settings import Target
from medusa.terminal import notice

Force = Annotated[bool, typer.Option("--force", help="Replace what such a command wrote there before.")]


@with_options
def import_(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Directory or file of weights (.safetensors, .pt).")],
    model: Annotated[
        str | None,
        typer.Option(help="The model that the heads belong to.", show_default="PATH, where it holds a whole model"),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Save the heads here.", show_default="NAME-heads")
    ] = None,
    tree: Annotated[
        str | None,
        typer.Option(
            metavar="FILE[:NAME]",
            help="medusa_choices, in JSON or Python; NAME where the file holds several.",
            show_default="the checkpoint's, if it has one",
        ),
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Take over heads that another project trained: FasterDecoding, TGI, TensorRT-LLM, vLLM."""
    from medusa.interop.importing import import_heads

    found = import_heads(path, model, out, tree=tree, force=force)
    if as_json:
        print(json.dumps(found.facts()))
        return
    print(f"Read {', '.join(found.files)} ({found.layout}):")
    print(
        f"{found.num_heads} heads of {_counted(found.num_layers, 'layer')}, hidden size {found.hidden_size}, "
        f"vocabulary {found.vocab_size}, {found.dtype}; LM heads: {found.lm_heads}; "
        + (f"a tree of {found.tree_nodes} nodes." if found.tree_nodes else "no tree.")
    )
    for note in found.notes:
        notice(f"Note: {note}.")
    print(f"The heads are in {found.heads}. Try:")
    print(f'    medusa generate "Why is the sky blue?" --model {model or path} --heads {found.heads}')
    print(f"    medusa calibrate --model {model or path} --heads {found.heads}    # measures the tree that fits them")


@with_options
def export(
    heads: Annotated[str, typer.Argument(metavar="HEADS", help="A directory of heads, or the name of shipped ones.")],
    to: Annotated[Target, typer.Option(help="Who is to run them.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The new directory.")],
    model: Annotated[
        str | None, typer.Option(help="The model that they belong to.", show_default="the one that they name")
    ] = None,
    shared_lm_head: Annotated[
        bool,
        typer.Option("--shared-lm-head", help="vllm and tgi: do not copy the model's LM head for each head."),
    ] = False,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write heads for another engine, with a model card."""
    from medusa.interop.exporting import export_heads

    made = export_heads(heads, to, out, model=model, shared_lm_head=shared_lm_head, force=force)
    if as_json:
        print(json.dumps(made.facts()))
        return
    print(
        f"{made.num_heads} heads of {_counted(made.num_layers, 'layer')} for {', '.join(made.serves)} in "
        f"{made.directory} ({made.size_bytes / 1e6:.1f} MB, {made.dtype}; LM heads: {made.lm_heads})."
    )
    for note in made.notes:
        notice(f"Note: {note}.")
    print(f"How to run them stands in {made.directory / 'README.md'}.")


@with_options
def push(
    heads: Annotated[str, typer.Argument(metavar="HEADS", help="Heads, or what medusa export wrote.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A repository of the Hub.")],
    model: Annotated[
        str | None, typer.Option(help="Hub id of the model they belong to.", show_default="the one that they name")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a repository that only you can see.")] = False,
) -> None:
    """Share heads on the Hub, with a model card; transformers runs them from there."""
    from medusa.interop import hub

    print(f"The heads are at {hub.push(heads, repository, model=model, private=private)}.")
    print(f'    model.generate(**inputs, custom_generate="{repository}", trust_remote_code=True)')


@with_options
def pull(
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A repository of the Hub.")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The new directory.", show_default="NAME")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.", show_default="the newest")] = None,
    force: Force = False,
) -> None:
    """Fetch heads from the Hub: those of Medusa run as they are, others are for medusa import."""
    from medusa.interop import hub

    found = hub.pull(repository, out, revision=revision, force=force)
    print(f"{found.num_heads} heads ({found.layout}) are in {found.directory}. Try:")
    if found.layout == "Medusa":
        print(f'    medusa generate "Why is the sky blue?" --model MODEL --heads {found.directory}')
    else:
        print(f"    medusa import {found.directory} --model MODEL")


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def add_to(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command("import")(import_)
    for command in (export, push, pull):
        app.command()(command)
