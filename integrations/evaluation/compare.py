"""Read, check and compare evaluations of several models on the same prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...evals import (
    RULES,
    UNJUDGED,
    as_verdict,
    classify_answer,
    count_refusals,
    holm_adjusted,
    judged_counts,
    paired_outcomes,
    printable,
    wilson_interval,
)
from ...files import json_sha256
from .options import KEPT_TOKENS, KINDS
from .run import EVAL_FILE, SCHEMA_VERSION

JUDGE = "judge"
_MOST_EXAMPLES = 5  # for each run, rule and kind
_PROMPT_CHARACTERS, _ANSWER_CHARACTERS = 200, 120


@dataclass(frozen=True)
class Run:
    """The content of one eval.json, and its name in the report."""

    name: str
    report: dict[str, Any]

    def prompts(self, kind: str) -> list[str]:
        """Return the prompts of one kind."""
        return [row["prompt"] for row in self.report["answers"][kind]]

    def outcomes(self, rule: str, kind: str) -> list[str]:
        """Return the outcome of each prompt: the rule applied again, or the judge's verdict."""
        rows = self.report["answers"][kind]
        if rule == JUDGE:
            return [as_verdict(row["outcomes"][JUDGE]) for row in rows]
        return list(count_refusals([row["answer"] for row in rows], rule).outcomes)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read evaluations and check that they asked the same prompts.

    Args:
        folders: output folders of `eval run`, at least two.

    Returns:
        The runs in order, each named after its folder; repeated names get a number.

    Raises:
        ValueError: there are fewer than two, one is not an evaluation or is damaged, or their
            prompts differ; the message says which and how.
    """
    if len(folders) < 2:
        raise ValueError(f"`runs` must be at least two folders; got {len(folders)}")
    runs: list[Run] = []
    for folder in folders:
        report = _read(folder)
        base = name = printable(folder.resolve().name)
        number = 1
        while name in [run.name for run in runs]:
            number += 1
            name = f"{base} ({number})"
        runs.append(Run(name, report))
    for run in runs[1:]:
        for kind in KINDS:
            _check_same_prompts(kind, runs[0], run)
    return runs


def compare_runs(runs: Sequence[Run]) -> dict[str, Any]:
    """Put runs side by side, and compare each with the first.

    Args:
        runs: the result of read_runs.

    Returns:
        JSON values: "runs" (name, model, adapter, counts per rule and kind, measures), "pairs"
        (each run against the first per rule and kind: prompts that only one of them refused, the
        exact McNemar p-value, and Holm's if there are several runs), "changed" (prompts with a
        different outcome, a few of each), and "differences" (whatever else may explain the
        counts, such as other settings).

    Notes:
        Rules are applied again to the kept answers, so that all runs are counted by the same
        version of a rule. The judge's verdicts are used as they are, if every run has them.
    """
    rules = _shared_rules(runs)
    counts = {
        run.name: {
            rule: {kind: judged_counts(run.outcomes(rule, kind)) for kind in KINDS}
            for rule in rules
        }
        for run in runs
    }
    return {
        "schema_version": 1,
        "prompts": runs[0].report["prompts"],
        "rules": rules,
        "runs": [
            {
                "name": run.name,
                "model": run.report["model"],
                "adapter": run.report["adapter"],
                "settings": run.report["settings"],
                "counts": counts[run.name],
                "measures": run.report["measures"],
                "notes": run.report["notes"],
            }
            for run in runs
        ],
        "pairs": [pair for rule in rules for kind in KINDS for pair in _pairs(runs, rule, kind)],
        "changed": [
            found
            for run in runs[1:]
            for rule in rules
            for kind in KINDS
            for found in _changed(runs[0], run, rule, kind)
        ],
        "differences": [
            *(text for run in runs[1:] for text in _differences(runs[0], run)),
            *_other_references(runs),
            *_other_judges(runs),
            *_nothing_to_keep(runs[0], counts[runs[0].name]),
        ],
    }


def _read(folder: Path) -> dict[str, Any]:
    path = folder / EVAL_FILE
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if report["schema_version"] != SCHEMA_VERSION:
            raise ValueError(
                f"schema_version is {report['schema_version']}, this release reads {SCHEMA_VERSION}"
            )
        _check_fields(report)
    except OSError as error:
        raise ValueError(f"`runs` must be folders of eval run; got {folder}: {error}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"`runs` must be folders of eval run; {path} is damaged: {type(error).__name__}: "
            f"{error}"
        ) from error
    return dict(report)


def _check_fields(report: dict[str, Any]) -> None:
    """Raise unless all fields that the report needs are there, with the right types."""
    for kind in KINDS:
        rows = report["answers"][kind]
        for row in rows:
            if not isinstance(row["prompt"], str):
                raise TypeError("a prompt is no string")
            classify_answer(row["answer"])
            row["outcomes"].items()
        if json_sha256([row["prompt"] for row in rows]) != report["prompts"][kind]["sha256"]:
            raise ValueError(f"the {kind} prompts are not those of their hash")
        str(report["prompts"][kind]["set"])
    if not 1 <= report["settings"]["answer_tokens"]:
        raise ValueError("answer_tokens is below 1")
    adapter = report["adapter"]
    for text in (
        *report["notes"],
        *report["settings"]["rules"],
        *(report["model"][name] for name in ("name", "dtype")),
        *([] if adapter is None else [adapter["name"]]),
    ):
        if not isinstance(text, str):
            raise TypeError(f"a name or note is no string: {text!r}")
    measures = report["measures"]
    numbers: list[Any] = []
    for kind in KINDS if measures["drift"] else ():
        for one in measures["drift"][kind]:
            numbers += [int(one["position"]), int(one["prompts"])]
            numbers += [one[name] for name in ("rms", "mean_abs", "max_abs")]
    if measures["task"]:
        wilson_interval(int(measures["task"]["matched"]), int(measures["task"]["total"]))
        numbers.append(measures["task"]["loss"])
    if measures["text"]:
        numbers.append(measures["text"]["perplexity"])
    for number in numbers:
        if number is not None and not isinstance(number, (int, float)):
            raise TypeError(f"a measure is no number: {number!r}")


def _check_same_prompts(kind: str, first: Run, run: Run) -> None:
    wanted, got = first.prompts(kind), run.prompts(kind)
    if wanted == got:
        return
    where = next(
        (i for i, pair in enumerate(zip(wanted, got, strict=False), 1) if pair[0] != pair[1]), None
    )
    parts = []
    if len(wanted) != len(got):
        parts.append(f"{len(got)} prompts instead of {len(wanted)}")
    if where is not None:
        one, other = (clip(found[where - 1], 60) for found in (got, wanted))
        parts.append(f"prompt {where} is {one!r} instead of {other!r}")
    raise ValueError(
        f"`runs` must have asked the same {kind} prompts; {run.name} differs from {first.name}: "
        f"{', '.join(parts)}"
    )


def _shared_rules(runs: Sequence[Run]) -> list[str]:
    used = {rule for run in runs for rule in run.report["settings"]["rules"]}
    rules = [rule for rule in RULES if rule in used] or [RULES[0]]
    rows = [row for run in runs for kind in KINDS for row in run.report["answers"][kind]]
    judges = {run.report["settings"].get("judge") for run in runs}
    # verdicts of two different judges would compare the judges, not the runs
    judged = len(judges) == 1 and all(JUDGE in row["outcomes"] for row in rows)
    return [*rules, JUDGE] if rows and judged else list(rules)


def _pairs(runs: Sequence[Run], rule: str, kind: str) -> list[dict[str, Any]]:
    first = runs[0].outcomes(rule, kind)
    found: list[dict[str, Any]] = []
    for run in runs[1:]:
        judged = [
            pair
            for pair in zip(first, run.outcomes(rule, kind), strict=True)
            if UNJUDGED not in pair
        ]
        counted = paired_outcomes([one for one, _ in judged], [other for _, other in judged])
        found.append(
            {
                "rule": rule,
                "kind": kind,
                "first": runs[0].name,
                "second": run.name,
                "only_first": counted.only_first,
                "only_second": counted.only_second,
                "both": judged.count(("refusal", "refusal")),
                "total": len(judged),
                "p_value": counted.p_value,
            }
        )
    if len(found) > 1:
        adjusted = holm_adjusted([pair["p_value"] for pair in found])
        for pair, p_value in zip(found, adjusted, strict=True):
            pair["p_holm"] = p_value
    return found


def _changed(first: Run, run: Run, rule: str, kind: str) -> list[dict[str, Any]]:
    rows = [run_.report["answers"][kind] for run_ in (first, run)]
    changed = [
        {
            "prompt": clip(before["prompt"], _PROMPT_CHARACTERS),
            "first_outcome": one,
            "first_answer": clip(before["answer"], _ANSWER_CHARACTERS, KEPT_TOKENS),
            "second_outcome": other,
            "second_answer": clip(after["answer"], _ANSWER_CHARACTERS, KEPT_TOKENS),
        }
        for before, after, one, other in zip(
            *rows, first.outcomes(rule, kind), run.outcomes(rule, kind), strict=True
        )
        if one != other
    ]
    if not changed:
        return []
    return [
        {
            "rule": rule,
            "kind": kind,
            "first": first.name,
            "second": run.name,
            "count": len(changed),
            "examples": changed[:_MOST_EXAMPLES],
        }
    ]


_SHOWN = {
    "sha256": "the safety tokens",
    "task": "the task's rows",
    "text": "the text of the perplexity",
}


def _differences(first: Run, run: Run) -> list[str]:
    """Name differences other than the model's that may explain different counts."""
    found = []
    for name, of in (
        ("answer_tokens", "settings"),
        ("batch_size", "settings"),
        ("dtype", "model"),
        ("device", "model"),
        ("sha256", "safety_tokens"),
        ("task", "files"),
        ("text", "files"),
        ("torch", "versions"),
        ("transformers", "versions"),
        ("str_kernels", "versions"),
    ):
        one, other = (report.get(of, {}).get(name) for report in (first.report, run.report))
        if one != other:
            shown = _SHOWN.get(name, name)
            values = "" if name in _SHOWN else f": {other} instead of {one}"
            found.append(f"{run.name} differs from {first.name} in {shown}{values}")
    return found


def _other_judges(runs: Sequence[Run]) -> list[str]:
    """Say that verdicts are left out because the judges differ."""
    judges = [run.report["settings"].get("judge") for run in runs]
    if len(set(judges)) < 2:
        return []
    asked = ", ".join(f"{run.name}: {judge}" for run, judge in zip(runs, judges, strict=True))
    return [f"The judges are not the same, and their verdicts are left out ({asked})"]


def _other_references(runs: Sequence[Run]) -> list[str]:
    """Name the runs whose drift has another reference than the first run with a drift."""
    drifted = [run for run in runs if run.report["measures"]["drift"]]
    return [
        f"{run.name} differs from {drifted[0].name} in the reference of its drift"
        for run in drifted[1:]
        if _reference_hash(run) != _reference_hash(drifted[0])
    ]


def _nothing_to_keep(first: Run, counts: dict[str, Any]) -> list[str]:
    """Say by which rules the first run refuses nothing: no run can then have lost a refusal."""
    return [
        f"By rule {rule} {first.name} refuses no harmful prompt, so it has no refusals to keep"
        for rule, found in counts.items()
        if found["harmful"]["refusal"] == 0
    ]


def _reference_hash(run: Run) -> object:
    reference = run.report.get("reference")
    # "reference" is text if it is the model without its adapter; then the model's hash counts
    found = reference if isinstance(reference, dict) else run.report["model"]
    return found.get("sha256")


def clip(text: str, characters: int, words: int | None = None) -> str:
    """Shorten a text from a file to a number of characters, and of words if given."""
    short = text
    if words is not None and len(text.split()) > words:
        short = " ".join(text.split()[:words])
    return short if short == text and len(text) <= characters else short[: characters - 3] + "..."
