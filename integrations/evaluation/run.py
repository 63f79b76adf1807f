"""`str-kernels eval run`: one model's refusals, task, perplexity and drift, in one folder."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from ... import __version__
from ...evals import UNJUDGED, Judge, RefusalCounts, counts_of, judged_counts
from ...files import (
    Stages,
    Watcher,
    check_output,
    json_sha256,
    read_text_file,
    replacing_folder,
    write_json,
)
from ...tokens import SafetyTokens
from ..chat import read_examples
from .asking import AskedModel
from .figures import draw_drift
from .inputs import NamedModel, PromptList, files_hash, load_reference, load_safety_tokens
from .options import KINDS, EvalOptions

SCHEMA_VERSION = 1
EVAL_FILE = "eval.json"
_MARKER = "eval run"


def run_eval(
    output: Path,
    options: EvalOptions,
    *,
    judge: Judge | None = None,
    overwrite: bool = False,
    watch: Watcher | None = None,
    say: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Evaluate a model and write eval.json and, if drift is measured, drift.png.

    Answers are greedy. Each finished batch is kept beside `output`, in a folder named after it with
    ".stages" at the end, until the run is complete. A killed run can so be resumed, and writes the
    same eval.json as a run that was not killed.

    Args:
        output: the folder to write; it is written as a whole or not at all.
        options: the model to evaluate, and what to measure.
        judge: asked about every answer in addition to the rules, see evals.judge.
        overwrite: replace `output` if it exists.
        watch: called with a stage's name, the amount done and the total.
        say: called with a line of text that the user should see.

    Returns:
        The content of eval.json.

    Raises:
        ValueError: the input is bad; the message starts with the argument.
    """
    watch = watch or (lambda stage, done, total: None)
    say = say or (lambda text: None)
    check_output(output, overwrite, marker=_MARKER)
    asked = {
        kind: PromptList.load(kind, getattr(options, kind), options.limit, options.column)
        for kind in KINDS
    }
    task = read_examples(options.task)[: options.limit] if options.task else []
    text = read_text_file("`text`", options.text) if options.text else None
    found = NamedModel.load(
        options.model, options.adapter, options.dtype, lambda line: watch(line, 0, 1)
    )
    tokens = load_safety_tokens(options.safety_tokens, found.tokenizer)
    reference = None
    if options.reference is not None:
        reference = load_reference(options.reference, options.dtype, found.tokenizer)
    report = _preamble(options, found, reference, tokens, asked, judge)
    report["files"] = {
        name: path and files_hash([path])
        for name, path in (("task", options.task), ("text", options.text))
    }
    key = [report]
    stages = Stages(output.parent / f"{output.name}.stages", key, say)
    asking = AskedModel(options, found, stages, watch)

    answers = {kind: asking.answers(kind, asked[kind].prompts) for kind in KINDS}
    outcomes = {kind: _by_rule(answers[kind], options.rules) for kind in KINDS}
    notes = _unfinished(outcomes, options)
    report["counts"] = {
        rule: {kind: _described(outcomes[kind][rule]) for kind in KINDS} for rule in options.rules
    }
    verdicts: dict[str, list[str]] = {}
    if judge is not None:
        verdicts = {
            kind: asking.verdicts(
                kind, judge, asked[kind].prompts, [given["answer"] for given in answers[kind]]
            )
            for kind in KINDS
        }
        report["counts"]["judge"] = {kind: judged_counts(verdicts[kind]) for kind in KINDS}
    report["answers"] = {
        kind: [
            {
                "prompt": prompt,
                "answer": answers[kind][i]["answer"],
                "outcomes": answers[kind][i]["outcomes"]
                | ({"judge": verdicts[kind][i]} if verdicts else {}),
            }
            for i, prompt in enumerate(asked[kind].prompts)
        ]
        for kind in KINDS
    }
    drift, why_not = asking.drift(tokens, asked, reference)
    notes += why_not
    report["measures"] = {
        "task": asking.task(task) if task else None,
        "text": asking.text(text) if text is not None else None,
        "drift": drift,
    }
    unjudged = sum(words.count(UNJUDGED) for words in verdicts.values())
    if unjudged:
        notes.append(
            f"The judge gave none of its three words for {unjudged} answers; they are left out of "
            "its counts."
        )
    report["notes"] = notes
    with replacing_folder(output, marker=_MARKER) as folder:
        write_json(folder / EVAL_FILE, report)
        if drift is not None:
            draw_drift({f"{kind} prompts": drift[kind] for kind in KINDS}, folder / "drift.png")
    stages.remove()
    return report


def _preamble(
    options: EvalOptions,
    found: NamedModel,
    reference: NamedModel | None,
    tokens: SafetyTokens,
    asked: dict[str, PromptList],
    judge: Judge | None,
) -> dict[str, Any]:
    """Return the part of eval.json that is known before the results; it keys the stages."""
    if reference is not None:
        compared: Any = reference.described
    else:
        compared = None if found.adapter is None else "the model without its adapter"
    packages = ("transformers", "peft")
    return {
        "schema_version": SCHEMA_VERSION,
        "versions": {
            "str_kernels": __version__,
            "torch": torch.__version__,
            **{name: version(name) for name in packages},
            "python": platform.python_version(),
        },
        "model": found.described,
        "adapter": found.adapter,
        "reference": compared,
        "settings": {
            "decoding": "greedy",
            "rules": list(options.rules),
            "judge": None if judge is None else getattr(judge, "name", "a callable"),
            "answer_tokens": options.answer_tokens,
            "positions": options.positions,
            "batch_size": options.batch_size,
            "limit": options.limit,
            "max_length": options.max_length,
        },
        "safety_tokens": {
            "count": len(tokens),
            "source": tokens.source,
            "sha256": json_sha256(tokens.ids.tolist()),
        },
        "prompts": {kind: asked[kind].describe() for kind in KINDS},
    }


def _by_rule(answers: Sequence[dict[str, Any]], rules: Sequence[str]) -> dict[str, RefusalCounts]:
    return {rule: counts_of([given["outcomes"][rule] for given in answers], rule) for rule in rules}


def _unfinished(outcomes: dict[str, dict[str, RefusalCounts]], options: EvalOptions) -> list[str]:
    """Say how many answers ended inside a thought, which no rule can classify."""
    counts = {kind: next(iter(outcomes[kind].values())) for kind in KINDS}
    if not any(one.unfinished for one in counts.values()):
        return []
    said = " and ".join(
        f"{one.unfinished} of {one.total} {kind} answers" for kind, one in counts.items()
    )
    return [
        f"{said} ended inside a thought (think block or channel), or within few words of its end, "
        f"after {options.answer_tokens} tokens: they are neither refusals nor other answers. Raise "
        "--answer-tokens"
    ]


def _described(counts: RefusalCounts) -> dict[str, Any]:
    return {
        "refusal": counts.refusal,
        "other": counts.other,
        "degenerate": counts.degenerate,
        "unfinished": counts.unfinished,
        "total": counts.total,
        "interval": list(counts.interval),
    }
