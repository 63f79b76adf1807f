"""`str-kernels eval report`: runs on the same prompts side by side, in Markdown and HTML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...files import check_output, replacing_folder, write_text
from .compare import JUDGE, compare_runs, read_runs
from .document import Block, Heading, Paragraph, Picture, Table, to_markdown
from .figures import draw_drift, draw_refusals
from .html import to_html
from .options import KINDS

_MARKER = "eval report"
SIGNIFICANT = 0.05  # two-sided; the tables give each p-value

_COUNT_LIMITS = (
    "What the counts do not say: a rule looks at how an answer is worded and is no judge of "
    "whether it does harm; decoding is greedy, so nothing is known of sampled answers; and answers "
    "are cut after some tokens (see the runs), so that what comes later is not seen. An interval "
    "is for prompts drawn like these, not for other kinds."
)
_RULE_LIMITS = {
    "gcg": (
        "Rule gcg is the string list of arXiv:2307.15043, here for comparison with papers that "
        'used it. It over-counts: "As an", "Hello!" and "illegal" occur in harmless answers.'
    ),
    JUDGE: (
        "The judge is a model and errs too. Answers it did not judge are left out of its counts."
    ),
}
_PAIR_LIMITS = (
    "What McNemar's test does not say: how large or important a difference is, or that two runs "
    "are the same where p is large (few prompts on which they disagree show little). It is about "
    "these two models on prompts like these; another seed of the same training may come out "
    "differently."
)
_HOLM = (
    " Holm's p allows for the number of runs compared with the first, within one rule and one kind "
    "of prompts; it does not allow for looking at several rules and at both kinds."
)
_DRIFT_LIMITS = (
    "Drift is the difference of the safety logits from the reference's, on the reference's own "
    "greedy answer. It says how far the model moved there, not whether it refuses. Later positions "
    "are those of the answers that are so long."
)


def run_report(folders: Sequence[Path], output: Path, *, overwrite: bool = False) -> dict[str, Any]:
    """Compare evaluations and write report.md, report.html and the figures into one folder.

    Args:
        folders: output folders of `eval run`, two or more; each is compared with the first.
        output: the folder to write; it is written as a whole or not at all.
        overwrite: replace `output` if it exists.

    Returns:
        The comparison, see compare_runs, and its "summary".

    Raises:
        ValueError: a folder is not an evaluation, they asked different prompts, or `output` exists.
    """
    check_output(output, overwrite, marker=_MARKER, inputs=folders)
    comparison = compare_runs(read_runs(folders))
    comparison["summary"] = summary(comparison)
    runs = comparison["runs"]
    with replacing_folder(output, marker=_MARKER) as folder:
        counts = {rule: [run["counts"][rule] for run in runs] for rule in comparison["rules"]}
        draw_refusals(counts, [run["name"] for run in runs], folder / "refusals.png")
        drifted = {
            run["name"]: run["measures"]["drift"]["harmful"]
            for run in runs
            if run["measures"]["drift"]
        }
        if drifted:
            draw_drift(drifted, folder / "drift.png")
        blocks = document(comparison)
        write_text(folder / "report.md", to_markdown(blocks))
        write_text(folder / "report.html", to_html(blocks, folder))
    return comparison


def summary(comparison: dict[str, Any]) -> list[str]:
    """State for each run, rule and kind what the paired test shows."""
    said = []
    for pair in comparison["pairs"]:
        p_value = pair.get("p_holm", pair["p_value"])
        which = "Holm's p" if "p_holm" in pair else "exact McNemar p"
        counts = [pair["both"] + pair[name] for name in ("only_first", "only_second")]
        verdict = "cannot be told apart"
        if p_value < SIGNIFICANT:
            fewer = pair["only_first"] > pair["only_second"]
            verdict = f"{pair['second']} refuses {'fewer' if fewer else 'more'}"
        said.append(
            f"Of {pair['total']} {pair['kind']} prompts {pair['first']} refuses {counts[0]} and "
            f"{pair['second']} {counts[1]} by rule {pair['rule']}: {verdict} "
            f"({which} = {p_value:.2g})."
        )
    return said


def document(comparison: dict[str, Any]) -> list[Block]:
    """Return the report as blocks, each claim with its limits next to it."""
    sets = comparison["prompts"]
    asked = " and ".join(f"{sets[kind]['count']} {kind} ({sets[kind]['set']})" for kind in KINDS)
    blocks: list[Block] = [
        Heading(1, "Evaluation report"),
        Paragraph(f"The same prompts were asked in every run: {asked}."),
        *(Paragraph(text) for text in _shown(comparison)),
        Table(
            ("run", "model", "adapter", "dtype", "answers cut at"),
            [
                (
                    run["name"],
                    str(run["model"]["name"]),
                    str(run["adapter"]["name"]) if run["adapter"] else "none",
                    str(run["model"]["dtype"]),
                    f"{run['settings']['answer_tokens']} tokens",
                )
                for run in comparison["runs"]
            ],
            numbers_from=5,
        ),
        *(Paragraph(f"Note: {text}.", is_limit=True) for text in comparison["differences"]),
        *(
            Paragraph(f"Note on {run['name']}: {text}", is_limit=True)
            for run in comparison["runs"]
            for text in run["notes"]
        ),
        Heading(2, "Refusals"),
        Picture("refusals.png", "refusals of harmful and harmless prompts"),
        *_refusals(comparison),
        Heading(2, f"Each run against {comparison['runs'][0]['name']}"),
        *_pairs(comparison),
        *_measures(comparison),
        *_examples(comparison),
    ]
    return blocks


def _shown(comparison: dict[str, Any]) -> list[str]:
    """Return the summary by the first rule; the tables have every rule."""
    rule, *more = comparison["rules"]
    pairs = zip(comparison["summary"], comparison["pairs"], strict=True)
    said = [text for text, pair in pairs if pair["rule"] == rule]
    if more:
        said.append(f"By rule {' and rule '.join(more)}: see the tables below.")
    return said


def _refusals(comparison: dict[str, Any]) -> list[Block]:
    rows = [
        (
            rule,
            run["name"],
            *(text for kind in KINDS for text in _share(run["counts"][rule][kind])),
            " + ".join(str(run["counts"][rule][kind]["degenerate"]) for kind in KINDS),
        )
        for rule in comparison["rules"]
        for run in comparison["runs"]
    ]
    header = ("rule", "run", "harmful refused", "95 % Wilson", "harmless refused", "95 % Wilson")
    limits = [_COUNT_LIMITS, *(_RULE_LIMITS[r] for r in comparison["rules"] if r in _RULE_LIMITS)]
    return [
        Table((*header, "degenerate"), rows, numbers_from=2),
        *(Paragraph(text, is_limit=True) for text in limits),
    ]


def _pairs(comparison: dict[str, Any]) -> list[Block]:
    adjusted = "p_holm" in comparison["pairs"][0]
    header = ["rule", "prompts", "run", "only the first refuses", "only this run refuses"]
    header += ["exact McNemar p", *(["Holm's p"] if adjusted else [])]
    rows = [
        (
            pair["rule"],
            pair["kind"],
            pair["second"],
            str(pair["only_first"]),
            str(pair["only_second"]),
            f"{pair['p_value']:.3g}",
            *([f"{pair['p_holm']:.3g}"] if adjusted else []),
        )
        for pair in comparison["pairs"]
    ]
    limit = _PAIR_LIMITS + (_HOLM if adjusted else "")
    return [Table(header, rows, numbers_from=3), Paragraph(limit, is_limit=True)]


def _measures(comparison: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = []
    runs = comparison["runs"]
    if any(run["measures"]["task"] or run["measures"]["text"] for run in runs):
        rows = []
        for run in runs:
            task, text = run["measures"]["task"], run["measures"]["text"]
            rows.append(
                (
                    run["name"],
                    f"{task['matched']}/{task['total']}" if task else "-",
                    _number(task["loss"]) if task else "-",
                    _number(text["perplexity"]) if text else "-",
                )
            )
        blocks += [
            Heading(2, "Task and text"),
            Table(("run", "exact matches", "task loss (nats)", "perplexity"), rows),
            Paragraph(
                "An exact match is an answer that is the expected one but for white space and a "
                "final period; another right wording does not count. Perplexities compare models "
                "of one tokenizer only.",
                is_limit=True,
            ),
        ]
    drifted = [run for run in runs if run["measures"]["drift"]]
    if drifted:
        places = max(len(run["measures"]["drift"][kind]) for run in drifted for kind in KINDS)
        rows = [
            (
                run["name"],
                kind,
                *(_number(one["rms"]) for one in run["measures"]["drift"][kind]),
                *["-"] * (places - len(run["measures"]["drift"][kind])),
            )
            for run in drifted
            for kind in KINDS
        ]
        header = ("run", "prompts", *map(str, range(1, places + 1)))
        blocks += [
            Heading(2, "Drift of the safety logits, rms by position of the answer"),
            Picture("drift.png", "rms drift on the harmful prompts by position"),
            Table(header, rows, numbers_from=2),
            Paragraph(_DRIFT_LIMITS, is_limit=True),
        ]
    return blocks


def _examples(comparison: dict[str, Any]) -> list[Block]:
    blocks: list[Block] = [Heading(2, "Prompts whose outcome changed")]
    if not comparison["changed"]:
        return [*blocks, Paragraph("None, by any rule.")]
    for found in comparison["changed"]:
        shown = len(found["examples"])
        blocks += [
            Heading(
                3,
                f"{found['second']}, {found['kind']} prompts, rule {found['rule']}: "
                f"{found['count']} changed" + (f", {shown} shown" * (shown < found["count"])),
            ),
            Table(
                ("prompt", found["first"], found["second"]),
                [
                    (
                        one["prompt"],
                        f"{one['first_outcome']}: {one['first_answer']}",
                        f"{one['second_outcome']}: {one['second_answer']}",
                    )
                    for one in found["examples"]
                ],
                numbers_from=3,
            ),
        ]
    return blocks


def _share(counts: dict[str, Any]) -> tuple[str, str]:
    low, high = counts["interval"]
    return f"{counts['refusal']}/{counts['total']}", f"{100 * low:.0f}-{100 * high:.0f} %"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.3f}"
