"""docs/support.md, made of what the tests hold; `make support` writes it.

Models from docs/support/models.csv (`make sweep`), adapters from adapters.py, releases from
bench/results/compat.csv (`make compat`). test_support.py fails if the page is not what this makes.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import support_ranks
import support_trainers
from adapters import LAYERS, LORA, PROMPTS, Adapter

from str_kernels.files.atomic import replacing

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent
ROOT = HERE.parents[2]
PAGE = ROOT / "docs" / "support.md"
MODELS = ROOT / "docs" / "support" / "models.csv"
RELEASES = ROOT / "bench" / "results" / "compat.csv"

# What a model is used with, and the test that holds it.
USES = {
    "Heads: tied, untied, scaled, capped; auxiliary loss of experts": (
        "test_attach.py::test_lora_equals_the_naive_loss"
    ),
    "Full fine-tuning beside a frozen copy, both paths": (
        "test_models.py::test_full_fine_tuning_on_both_paths"
    ),
    "Resized vocabulary": "test_attach.py::test_resized_vocabulary",
    "Padding left and right, sdpa and eager attention": (
        "test_models.py::test_padding_on_either_side"
    ),
    "Packed rows told apart by position_ids": (
        "test_models.py::test_packed_rows_equal_the_rows_alone"
    ),
    "shift_labels, positional arguments, tuples": (
        "test_attach.py::test_shift_labels_positional_arguments_and_tuples"
    ),
    "Gradient checkpointing, reentrant and not": (
        "test_attach.py::test_gradient_checkpointing_changes_nothing"
    ),
    "bfloat16 autocast": "test_models.py::test_bfloat16_autocast",
    "torch.compile of the model, before or after": (
        "test_models.py::test_torch_compile_of_the_model"
    ),
    "generate(), evaluation and remove() as if nothing were there": (
        "test_attach.py::test_eval_generate_and_remove_leave_no_trace"
    ),
    "save_pretrained and from_pretrained": "test_models.py::test_save_and_load_leave_no_trace",
    "Trainer: evaluation loss, compute_metrics with logits": (
        "test_models.py::test_trainer_evaluates_with_the_models_own_loss_and_logits"
    ),
    "Trainer, a model that takes no num_items_in_batch": (
        "test_models.py::test_a_model_that_takes_no_num_items"
    ),
    "Anchors in a pass of their own, both paths": (
        "test_anchors.py::test_loss_and_gradients_are_those_by_hand"
    ),
    "Anchors as rows of the batch": (
        "test_anchor_batches.py::test_rows_of_the_batch_equal_a_pass_of_their_own"
    ),
    "Anchors and gradient accumulation": "test_anchors.py::test_accumulation_equals_one_batch",
    "A reference cache beside the reference's own passes": (
        "test_cached_reference.py::test_training_equals_the_live_reference"
    ),
    "DDP; FSDP2 with the head in the root, a unit of its own, or tied": (
        "test_distributed.py::test_a_step_equals_that_of_one_process"
    ),
    "Tensor parallelism by transformers' plan, and FSDP2 over it": (
        "test_distributed.py::test_a_step_equals_that_of_one_process"
    ),
    "A sequence split over ranks, with shift_labels": (
        "test_distributed.py::test_a_step_equals_that_of_one_process"
    ),
    "A checkpoint of two ranks on one and on four": (
        "test_distributed_training.py"
        "::test_a_checkpoint_of_two_ranks_goes_on_with_one_and_with_four"
    ),
    "Refused: a model already sharded by fully_shard, or in DDP": (
        "test_distributed.py::test_what_is_refused"
    ),
    "Refused: anchors with reentrant checkpointing on several ranks": (
        "test_distributed_training.py::test_anchors_and_reentrant_checkpointing_are_refused"
    ),
    "SafetySFTTrainer: TRL's own numbers, packing, completions, accumulation": (
        "test_trl.py::test_without_a_penalty_it_is_sft_trainer"
    ),
    "A plain loop, Accelerate, Trainer and TRL log the same": (
        "test_trainers_agree.py::test_all_trainers_log_the_same"
    ),
    "A reference asked in every n-th forward": (
        "test_reference_schedule.py::test_every_third_forward_counts_three_times"
    ),
    "A reference given the first columns alone": (
        "test_reference_schedule.py::test_the_reference_reads_the_first_columns_only"
    ),
    "Gradient accumulation": "test_anchors.py::test_accumulation_equals_one_batch",
    "Vision-language models with a text head, with and without a picture": (
        "test_zoo.py::test_vision_language_models"
    ),
    "Quantised bodies (bitsandbytes nf4, int8), on a CPU": "test_models.py::test_quantised_bodies",
    "Several adapters in use": "test_adapters.py::test_several_adapters_in_use",
    "Adapters by transformers' own add_adapter": (
        "test_adapters.py::test_adapters_by_transformers_alone"
    ),
    "Two attached models in one process": (
        "test_adapters.py::test_two_attached_models_in_one_process"
    ),
    "A second forward in the same step": "test_adapters.py::test_a_second_forward_in_the_same_step",
    "References: adapters off, a frozen model, a function": (
        "test_adapters.py::test_both_paths_and_every_reference_agree"
    ),
    "requires_grad and training mode after an error": (
        "test_adapters.py::test_state_survives_an_error"
    ),
    "Refused: a masked language model, an encoder and decoder, a classifier": (
        "test_models.py::test_what_is_no_causal_lm_is_refused"
    ),
    "Refused: merged adapters, adapters off": "test_adapters.py::test_merged_adapters",
}


def page() -> str:
    """Return the whole page."""
    rows = _read(MODELS)
    parts = [_INTRODUCTION]
    for mapping, title in (
        ("causal-lm", "Models for causal language modelling"),
        ("image-text-to-text", "Vision-language models, given text"),
    ):
        parts.append(_models(title, [row for row in rows if row["mapping"] == mapping]))
    parts += [_adapters(), _trainers(), _ranks(), _uses(), _releases()]
    return "\n\n".join(parts) + "\n"


_INTRODUCTION = """# What `attach` works with

`make support` writes this page from the tests: every row below is tested.

- **exact**: the loss is that of two forwards with full logits within 2e-5 of it, and every gradient
  within 1e-3 of its largest entry, in float32 (the largest errors seen are in the tables' sources).
- **logits**: exact with `attach(..., path="logits")`, which keeps all logits in memory;
  the default path refuses, since it cannot read the head.
- **refused**: `attach` raises ValueError, with this reason.
- **not built**: transformers or PEFT makes no tiny random one, so nothing is known."""


def _models(title: str, rows: Sequence[dict[str, str]]) -> str:
    versions = " and ".join(f"{name} {rows[0][name]}" for name in ("transformers", "torch"))
    exact = [row for row in rows if row["linear"] == "exact"]
    logits = [row for row in rows if row["logits"] == "exact"]
    refused = [row for row in rows if row["linear"] == "refused" and row["logits"] != "exact"]
    absent = [row for row in rows if row["linear"] == "not buildable"]
    pictured = [row["model_type"] for row in rows if row["image"] == "exact"]
    errors = (
        max(float(row["loss_error"]) for row in exact),
        max(float(row["gradient_error"]) for row in exact),
    )
    text = [
        f"## {title}",
        f"{len(rows)} types of {versions} (`make sweep`): {len(exact)} exact, {len(logits)} on the "
        f"logits alone, {len(refused)} refused, {len(absent)} not built, "
        f"{len(rows) - len(exact) - len(logits) - len(refused) - len(absent)} wrong. Largest "
        f"errors of the exact ones: loss {errors[0]:.0e}, gradients {errors[1]:.0e}.",
        "**Exact:** " + ", ".join(f"`{row['model_type']}`" for row in exact) + ".",
    ]
    if pictured:
        text.append("**Exact with a picture too:** " + _names(pictured) + ".")
    others = [(row, "logits") for row in logits] + [(row, "refused") for row in refused]
    others += [(row, "not built") for row in absent]
    text.append(
        _table(
            ("type", "", "reason"),
            ((f"`{row['model_type']}`", word, _cell(row["reason"])) for row, word in others),
        )
    )
    return "\n\n".join(text)


def _names(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _adapters() -> str:
    text = [
        "## Adapters",
        "By themselves, with the adapters off as the reference. A refused one is exact beside "
        "`ref_model`, a frozen copy made before it was added, unless the reason says otherwise. "
        "LoRA with dropout on the head is exact with another draw of its mask.",
    ]
    for title, group in (
        ("LoRA", LORA), ("Other layers", LAYERS), ("Prompt learning", PROMPTS)
    ):  # fmt: skip
        rows = ((name, f"`{a.config}`", *_verdict(a)) for name, a in group.items())
        text += [f"### {title}", _table(("adapter", "PEFT", "", "note"), rows)]
    return "\n\n".join(text)


def _verdict(adapter: Adapter) -> tuple[str, str]:
    if adapter.refused:
        return "refused", _cell(adapter.refused)
    return ("exact" if adapter.path == "linear" else "logits"), _cell(adapter.note)


def _trainers() -> str:
    tests = support_trainers.tests()
    text = (
        "## Trainers",
        "A number is that of the test below which holds it; - is nothing to hold, or not tested. "
        "Axolotl, ms-swift and LLaMA-Factory exclude the versions that the tests run on, and are "
        "stand-ins there ([trainers.md](trainers.md) says what was run by hand).",
        _table(("", *support_trainers.TRAINERS), support_trainers.rows()),
        "\n".join(f"{i}. `{test}`" for i, test in enumerate(tests, 1)),
    )
    return "\n\n".join(text)


def _ranks() -> str:
    text = (
        "## Ranks",
        "Loss and every gradient of a step on so many gloo ranks of a CPU, beside the same step "
        "in one process (`test_distributed.py`, `test_distributed_training.py`; the ZeRO rows: "
        "`test_deepspeed.py`, which `make deepspeed` runs). SafetyTrainer: its log beside that of "
        "a whole model.",
        _table(support_ranks.HEAD, support_ranks.rows()),
    )
    return "\n\n".join(text)


def _uses() -> str:
    rows = ((use, f"`{test}`") for use, test in USES.items())
    return "\n\n".join(("## Uses", _table(("what", "held by, in tests/integrations"), rows)))


def _releases() -> str:
    latest = {}  # the last run of each release
    for row in _read(RELEASES):
        latest[row["transformers"]] = row
    names = ("python", "torch", "transformers", "peft", "accelerate", "gguf")
    counts = ("passed", "failed", "skipped")
    rows = ([row.get(name, "") for name in (*names, *counts)] for row in latest.values())
    return "\n\n".join(
        (
            "## Releases",
            "The tests of `integrations/` and of the commands on each, in an environment of its "
            "own (`make compat`). The first row is the lower bounds in pyproject.toml.",
            _table((*names, *counts), rows),
        )
    )


def _read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;").replace("\n", " ")


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    with replacing(PAGE) as temporary:
        temporary.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.relative_to(ROOT)}")
