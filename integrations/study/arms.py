"""The arms of the study, which are compared, and the portions in which they are run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Literal

from ...op import PenaltyKind
from .ceilings import Ceiling
from .results import BASE

TokensName = Literal["safety", "random", "likely", "both", "contrast", "none"]


@dataclass(frozen=True)
class Arm:
    """One way to fine-tune.

    Attributes:
        kind: of the penalty.
        weight: of the penalty on the rows; 0 means no penalty there.
        anchor_weight: of the penalty at the anchors; 0 means no anchors.
        tokens: "safety": the safety tokens. "random": as many random ones. "likely": as many of
            the likeliest other tokens where answers to the anchors begin. "both": safety and
            likely. "contrast": chosen by `from_contrast` on the taught model, with weights.
        per_step: harmful and harmless anchors in each step.
        held: positions held of each anchor: its last, and held - 1 of the model's own refusal.
        steps: optimizer steps.
        learning_rate: peak of the schedule.
        lora_rank: of the adapters.
        refusals: refusals mixed into the rows of each step.
        ceiling: a loss used instead of the penalty.
    """

    kind: PenaltyKind = "coarse_kl"
    weight: float = 0.0
    anchor_weight: float = 0.0
    tokens: TokensName = "safety"
    per_step: tuple[int, int] = (2, 2)
    held: int = 1
    steps: int = 40
    learning_rate: float = 5e-4
    lora_rank: int = 8
    refusals: int = 0
    ceiling: Ceiling | None = None


def as_columns(arm: Arm) -> dict[str, str]:
    """Return an arm as columns of the study's file."""
    columns = {name: "" if value is None else str(value) for name, value in asdict(arm).items()}
    return columns | {"per_step": "{} + {}".format(*arm.per_step)}


PLAIN = Arm(tokens="none")
PAPER = Arm("mse", weight=0.1)
DEFAULT = Arm(anchor_weight=0.1)
RANDOM = dataclasses.replace(DEFAULT, tokens="random")
MAIN = {"plain": PLAIN, "rows (paper)": PAPER, "anchors (default)": DEFAULT, "random": RANDOM}


def _sweep() -> dict[str, Arm]:
    arms = {
        "refusal rows": dataclasses.replace(PLAIN, refusals=2),
        "plain, lr 2e-4": dataclasses.replace(PLAIN, learning_rate=2e-4),
        "plain, lr 1e-4": dataclasses.replace(PLAIN, learning_rate=1e-4),
        "plain, 20 steps": dataclasses.replace(PLAIN, steps=20),
        "plain, 10 steps": dataclasses.replace(PLAIN, steps=10),
        "plain, 120 steps": dataclasses.replace(PLAIN, steps=120),
        "anchors (default), 120 steps": dataclasses.replace(DEFAULT, steps=120),
        "likely": dataclasses.replace(DEFAULT, tokens="likely"),
        "both": dataclasses.replace(DEFAULT, tokens="both"),
        "contrast": dataclasses.replace(DEFAULT, tokens="contrast"),
        "1 + 1 a step": dataclasses.replace(DEFAULT, per_step=(1, 1)),
        "4 + 4 a step": dataclasses.replace(DEFAULT, per_step=(4, 4)),
        "4 positions": dataclasses.replace(DEFAULT, held=4),
        "rows and anchors": Arm("mse", weight=0.03, anchor_weight=0.1),
        "all logits' KL": Arm(anchor_weight=0.1, tokens="none", ceiling="full_kl"),
        "hidden state": Arm(anchor_weight=3.0, tokens="none", ceiling="hidden"),
        "constrained": Arm(tokens="none", ceiling="constrained"),
    }
    for weight in (0.03, 0.05, 0.2, 0.3, 1.0, 3.0):
        arms[f"anchors, {weight:g}"] = dataclasses.replace(DEFAULT, anchor_weight=weight)
    for weight in (0.03, 0.3, 1.0):
        arms[f"random, {weight:g}"] = dataclasses.replace(RANDOM, anchor_weight=weight)
    for kind, weights in {
        "mse": (0.03, 0.1, 0.3, 1.0),
        "logprob": (0.03, 0.1),
        "subset_kl": (0.1,),
        "centered": (0.1,),
    }.items():
        for weight in weights:
            arms[f"{kind}, {weight:g}"] = Arm(kind, anchor_weight=weight)  # type: ignore[arg-type] # of the kinds
            if kind == "mse":
                name = f"{kind}, {weight:g}, random"
                arms[name] = Arm("mse", anchor_weight=weight, tokens="random")
    for weight in (0.03, 0.3):
        arms[f"rows, {weight:g}"] = Arm("mse", weight=weight)
    for rank in (4, 64):
        arms[f"plain, rank {rank}"] = dataclasses.replace(PLAIN, lora_rank=rank)
        arms[f"anchors (default), rank {rank}"] = dataclasses.replace(DEFAULT, lora_rank=rank)
    return arms


ARMS = MAIN | _sweep()


@dataclass(frozen=True)
class Run:
    """An arm on a task with a seed, which also determines the taught model."""

    task: str
    arm: str
    seed: int


def main_runs(seeds: int) -> list[Run]:
    """Return the runs of the main comparison, one seed after the other, on both kinds of sums."""
    runs = []
    for seed in range(seeds):
        runs.append(Run("sums", BASE, seed))
        for task in ("sums", "Sure!"):
            runs += [Run(task, arm, seed) for arm in ("plain", "anchors (default)")]
    return runs


PORTIONS: dict[str, Callable[[int], list[Run]]] = {
    "main": main_runs,
    "controls": lambda seeds: [
        Run(task, arm, seed)
        for seed in range(seeds)
        for task in ("sums", "Sure!")
        for arm in ("random", "rows (paper)", "refusal rows")
    ],
    "sweep": lambda _: [Run("sums", arm, 0) for arm in ARMS if arm not in MAIN],
    "tasks": lambda _: [
        Run(task, arm, 0) for task in ("JSON", "5 % harmful") for arm in (*MAIN, "refusal rows")
    ],
}
