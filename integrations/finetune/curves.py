"""The curves of a fine-tuning run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..figures import SERIES, figure_label, legend, new_figure, save, style

# Each panel's title, and the log entries that it shows with their labels.
_PANELS = (
    ("cross-entropy\n(nats per token)", {"safety/ce": "training", "eval_loss": "evaluation"}),
    (
        "penalty\n(unit of its kind)",
        {"safety/penalty": "rows", "safety/anchor_penalty": "anchors"},
    ),
    ("largest drift\n(logits)", {"safety/max_drift": "rows and anchors"}),
)


def draw_curves(log: Sequence[dict[str, float]], path: Path, *, model: str = "") -> None:
    """Draw cross-entropy, penalty and largest drift over the steps of one run.

    Args:
        log: entries of steps and of evaluations; a term that is None is left out.
        path: the PNG file to write.
        model: the model's name, for the caption.
    """
    losses = _points(log, "safety/ce")
    title = "The terms of the loss over the steps"
    if len(losses) > 1:
        title = f"Cross-entropy went from {losses[0][1]:.3g} to {losses[-1][1]:.3g} nats per token"
    of = f"One run of {figure_label(Path(model).name)}" if model else "One run"
    figure = new_figure(
        3.0,
        title,
        f"{of}. A training point is the mean of the steps since the one before it; of the drift it "
        "is their largest.",
    )
    for axes, (name, terms) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for colour, (term, label) in zip(SERIES, terms.items(), strict=False):
            points = _points(log, term)
            if any(value for _, value in points):
                form = "o-" if len(points) < 20 else "-"
                axes.plot(*zip(*points, strict=True), form, color=colour, label=label, markersize=3)
        if axes.lines:
            legend(axes)
        style(axes, title=name, x="step")
        axes.set_ylim(bottom=0)
    save(figure, path)


def _points(log: Sequence[dict[str, float]], term: str) -> list[tuple[float, float]]:
    return [(entry["step"], entry[term]) for entry in log if entry.get(term) is not None]
