"""The table of docs/support.md that says what holds in which trainer: each cell names its test."""

from __future__ import annotations

TRAINERS = (
    "plain loop", "Accelerate", "Trainer", "TRL SFT", "Lightning", "Axolotl", "ms-swift",
    "LLaMA-Factory",
)  # fmt: skip
AGREE = "test_trainers_agree.py::test_all_trainers_log_the_same"
SUMS = "test_trainers_agree.py::test_accumulation_is_exact_in_every_trainer"
LIGHTNING = "test_trainer_recipes.py::test_lightning"
AXOLOTL = "test_axolotl.py::test_it_trains_and_logs"
SWIFT = "test_swift_plugin.py::test_it_trains_and_logs"
FACTORY = "test_trainer_recipes.py::test_llama_factory"
FOUR = ("plain loop", "Accelerate", "Trainer", "TRL SFT")
FEATURES: dict[str, dict[str, str]] = {
    "the plain loop's losses, step by step": {
        "plain loop": "test_attach.py::test_lora_equals_the_naive_loss",
        **dict.fromkeys(FOUR[1:], AGREE),
        "Lightning": LIGHTNING,
        "ms-swift": SWIFT,
        "LLaMA-Factory": FACTORY,
    },
    "accumulation: as one batch": dict.fromkeys(FOUR, SUMS)
    | {"Lightning": LIGHTNING, "ms-swift": SWIFT, "LLaMA-Factory": FACTORY},
    "anchors": dict.fromkeys(FOUR, SUMS)
    | {"Lightning": LIGHTNING, "Axolotl": AXOLOTL, "ms-swift": SWIFT},
    "the terms in its log": {
        "Trainer": "test_trainer.py::test_terms_are_averaged_between_logs",
        "TRL SFT": "test_trl.py::test_its_loss_is_cross_entropy_and_penalty",
        "Axolotl": AXOLOTL,
        "ms-swift": SWIFT,
        "LLaMA-Factory": FACTORY,
    },
    "TensorBoard, W&B": {
        "Trainer": "test_trackers.py::test_tensorboard_draws_the_terms",
    },
    "a loss that drops the penalty is refused": {
        "plain loop": "test_silence.py::test_a_forward_put_in_our_place_is_noticed",
        "Trainer": "test_trainer.py::test_ligers_loss_is_refused",
        "TRL SFT": "test_trl.py::test_other_losses_are_refused",
        "Axolotl": "test_axolotl.py::test_what_replaces_the_loss_is_refused",
        "ms-swift": "test_swift_plugin.py::test_what_replaces_the_loss_is_refused",
        "LLaMA-Factory": "test_trainer_recipes.py::test_llama_factory_refuses_its_other_losses",
    },
    "its own metrics, packing, completions": {
        "Trainer": ("test_models.py::test_trainer_evaluates_with_the_models_own_loss_and_logits"),
        "TRL SFT": "test_trl.py::test_without_a_penalty_it_is_sft_trainer",
    },
    "going on from a checkpoint": {
        "Trainer": "test_anchors.py::test_the_trainer_logs_them_and_resumes_at_their_turn",
    },
    "Liger's layers beside it": {
        "plain loop": "test_liger.py::test_its_layers_change_nothing",
        "Trainer": "test_liger.py::test_safety_trainer_with_its_layers",
    },
    "several ranks": {
        "plain loop": "test_distributed.py::test_a_step_equals_that_of_one_process",
        "Trainer": ("test_distributed_training.py::test_a_spread_model_logs_what_a_whole_one_does"),
    },
}


def tests() -> list[str]:
    """List the tests of the table, each once, in its order."""
    cells = (test for row in FEATURES.values() for test in row.values())
    return list(dict.fromkeys(cells))


def rows() -> list[tuple[str, ...]]:
    """Return the table, in whose cells the numbers of `tests` stand."""
    numbers = {test: str(i) for i, test in enumerate(tests(), 1)}
    return [
        (feature, *(numbers.get(found.get(trainer, ""), "-") for trainer in TRAINERS))
        for feature, found in FEATURES.items()
    ]
