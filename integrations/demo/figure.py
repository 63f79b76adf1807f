"""The demo's figure: how much each of its models refuses, and how well it does the task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..figures import BLACK, BLUE, GREY, VERMILION, Share, draw_shares, new_figure, save

_COLOURS = {"taught base": BLACK, "anchors (default)": BLUE, "rows (paper)": VERMILION}


def draw_comparison(runs: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw refusals and right sums of each run, with 95 % Wilson intervals.

    Args:
        runs: the demo's runs in order: dicts with name, harmful and benign ({"refusal", "total",
            "interval"}) and accuracy ({"count", "total", "interval"}).
        path: the PNG file to write.
    """
    names = [run["name"] for run in runs]
    harmful = [_refused(run["harmful"]) for run in runs]
    harmless = [_refused(run["benign"]) for run in runs]
    right = [Share(**run["accuracy"]) for run in runs]
    base, plain, _, default, _ = harmful
    figure = new_figure(
        3.3,
        f"The base refuses {base.count} of {base.total} harmful prompts; plain fine-tuning leaves "
        f"{plain.count}, the default {default.count}",
        "SmolLM2-135M, taught to refuse and then fine-tuned on sums with LoRA; one run of each, "
        "one seed. Prompts and sums were held out. Whiskers: 95 % Wilson intervals.",
    )
    colours = [_COLOURS.get(name, GREY) for name in names]
    panels = figure.subplots(1, 3, sharey=True)
    for axes, shares, title in zip(
        panels,
        (harmful, harmless, right),
        (
            "harmful prompts refused\n(more is better)",
            "harmless prompts refused\n(fewer is better)",
            "right sums, the task\n(more is better)",
        ),
        strict=True,
    ):
        draw_shares(axes, names, shares, colours, title=title)
    save(figure, path)


def _refused(counts: dict[str, Any]) -> Share:
    return Share(counts["refusal"], counts["total"], counts["interval"])
