"""str-kernels tokens build | show | compare."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..tokens import SafetyTokens, compare_tokens
from .console import JSON_OPTION, Command, needs_integrations, print_json, progress, readable_errors

tokens = typer.Typer(help="Choose safety tokens, look at them, compare them.", no_args_is_help=True)
_MODEL_HELP = "'builtin', a folder, or a hub id."


@tokens.command(cls=Command)
def build(
    model: Annotated[str, typer.Argument(help=_MODEL_HELP)],
    way: Annotated[
        str,
        typer.Option(
            "--from",
            help="templates: tokens of refusal sentences. refusals: of the model's own refusals. "
            "contrast: those that distinguish its refusals from its other answers. openings: those "
            "of templates, and the likeliest first tokens of its other answers. random: a control.",
        ),
    ] = "templates",
    output: Annotated[Path, typer.Option(help="JSON file to make.")] = Path("safety_tokens.json"),
    harmful: Annotated[
        str | None, typer.Option(help="Harmful prompts: a set or a JSONL file; anchors if unset.")
    ] = None,
    harmless: Annotated[
        str | None, typer.Option(help="Harmless prompts, for contrast; anchors if unset.")
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            help="Largest number of tokens; 32 if unset, for openings as many as templates gives. "
            "For random, the exact number."
        ),
    ] = None,
    positions: Annotated[
        int | None,
        typer.Option(help="First tokens of an answer to use, 8 if unset; of a template, all."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of random; 0 if unset.")] = None,
    like: Annotated[
        Path | None, typer.Option(help="For random: draw as many as in this file, but none of it.")
    ] = None,
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="For random: training rows (JSONL) in which to match --like's frequency."
        ),
    ] = None,
    templates: Annotated[
        Path | None, typer.Option(help="Refusal templates, one per line, instead of the built-in.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Prompts at a time; 16 if unset.")] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    overwrite: Annotated[bool, typer.Option(help="Replace the output file.")] = False,
    as_json: JSON_OPTION = False,
) -> None:
    """Choose safety tokens for MODEL and write them, with a score each, to a file.

    Pass the file to finetune --safety-tokens. The anchors are prompts that come with the package;
    do not choose on the prompts that you count refusals on.
    """
    with readable_errors():
        with needs_integrations():
            from ..integrations.tokens import build_tokens
        with progress(quiet=as_json) as watch:
            built = build_tokens(
                model,
                way,
                output,
                overwrite=overwrite,
                dtype=dtype,
                watch=watch,
                harmful=harmful,
                harmless=harmless,
                count=count,
                positions=positions,
                seed=seed,
                like=like,
                corpus=corpus,
                templates=templates,
                batch_size=batch_size,
            )
    if as_json:
        print_json({"file": str(output), **_described(built)})
    else:
        _show(built)
        Console().print(f"Written to {escape(str(output))}", soft_wrap=True, highlight=False)


@tokens.command(cls=Command)
def show(
    file: Annotated[Path, typer.Argument(help="A safety_tokens.json.")],
    model: Annotated[
        str | None, typer.Option(help=f"Check the file against its tokenizer: {_MODEL_HELP}")
    ] = None,
    as_json: JSON_OPTION = False,
) -> None:
    """Show the tokens in FILE: id, text, score and weight, and where they come from."""
    with readable_errors():
        loaded = SafetyTokens.load(file)
        if model is not None:
            with needs_integrations():
                from ..integrations.loading import load_tokenizer
            with progress(quiet=as_json) as watch:
                tokenizer = load_tokenizer(model, progress=lambda text: watch(text, 0, 1))
            loaded.verify(tokenizer)
    if as_json:
        print_json({"file": str(file), "verified_with": model, **_described(loaded)})
        return
    _show(loaded)
    console = Console(highlight=False)
    lines = [
        f"tokenizer    {loaded.vocab_size} tokens, hash {loaded.tokenizer_hash}",
        f"fingerprint  {loaded.fingerprint}",
    ]
    if model is not None:
        lines.append(f"The tokenizer of {model} is the one they were made with.")
    for line in lines:
        console.print(Text(line), soft_wrap=True)


@tokens.command(cls=Command)
def compare(
    first: Annotated[Path, typer.Argument(help="A safety_tokens.json.")],
    second: Annotated[Path, typer.Argument(help="Another one, of the same tokenizer.")],
    as_json: JSON_OPTION = False,
) -> None:
    """Show which tokens two files share, and whether they rank them alike."""
    with readable_errors():
        one, other = SafetyTokens.load(first), SafetyTokens.load(second)
        found = compare_tokens(one, other)
    if as_json:
        print_json({"first": str(first), "second": str(second), **asdict(found)})
        return
    pieces = {**_pieces(other), **_pieces(one)}
    table = Table("", "tokens", "", show_lines=True)
    for name, ids in (
        ("in both", found.both),
        (f"only in {first.name}", found.only_first),
        (f"only in {second.name}", found.only_second),
    ):
        table.add_row(Text(name), str(len(ids)), Text(" ".join(pieces[token] for token in ids)))
    console = Console(highlight=False)
    console.print(table)
    ranked = found.rank_correlation
    console.print(
        f"Jaccard {found.jaccard:.2f}; rank correlation of the scores "
        + ("not defined" if ranked is None else f"{ranked:.2f} on the {len(found.both)} in both")
    )


def _described(chosen: SafetyTokens) -> dict[str, Any]:
    return {**chosen.as_dict(), "fingerprint": chosen.fingerprint}


def _show(chosen: SafetyTokens) -> None:
    console = Console(highlight=False)
    console.print(Text(f"{len(chosen)} tokens: {chosen.source}", style="bold"), soft_wrap=True)
    table = Table()
    table.add_column("id", justify="right")
    table.add_column("token", no_wrap=True)
    for name in ("score", "weight"):
        table.add_column(name, justify="right")
    weights = None if chosen.id_weights is None else chosen.id_weights.tolist()
    columns = (_column(chosen.scores, len(chosen)), _column(weights, len(chosen)))
    for (token, piece), score, weight in zip(_pieces(chosen).items(), *columns, strict=True):
        table.add_row(str(token), Text(piece), score, weight)
    console.print(table)


def _pieces(chosen: SafetyTokens) -> dict[int, str]:
    """Return each id's text in quotes, with spaces as \u2423 and unprintable characters escaped.

    A plain space would be invisible at the end of a line.
    """
    ids = chosen.ids.tolist()
    if chosen.pieces is None:
        return {token: f"#{token}" for token in ids}
    shown = (repr(piece).replace(" ", "\u2423") for piece in chosen.pieces)
    return dict(zip(ids, shown, strict=True))


def _column(values: Iterable[float] | None, count: int) -> list[str]:
    return ["-"] * count if values is None else [f"{value:.3g}" for value in values]
