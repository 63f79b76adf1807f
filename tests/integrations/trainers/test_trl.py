"""SafetySFTTrainer beside TRL's own: the same numbers, and the penalty on top."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from tiny_models import fresh_lora, tiny_model
from tiny_tokenizer import chat_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM

from str_kernels import AnchorPrompts, SafetyPenalty, SafetyTokens, attach

pytest.importorskip("trl")  # the oldest releases of the matrix are tested without it
from datasets import Dataset  # which comes with it
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer, TrlParser

from str_kernels.integrations.trainers.trl_sft import SafetySFTConfig, SafetySFTTrainer

# a name that old releases and this one know
pytestmark = pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning"
)
TOKENS = SafetyTokens(ids=[10, 11, 13, 14, 15])
ROWS = [
    {
        "prompt": [{"role": "user", "content": f"what is {a} + {b}"}],
        "completion": [{"role": "assistant", "content": " ".join(["="] * a) + f" {a + b}"}],
    }
    for a in range(1, 5)
    for b in range(1, 5)
]
# The template's answers carry no generation marks: TRL wants those for assistant_only_loss.
MARKED = (
    "{% for m in messages %}<{{ m.role }}> {% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }} <end> {% endgeneration %}{% else %}{{ m.content }} <end> {% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
)


def model_of(folder: Any, seed: int) -> Any:
    return AutoModelForCausalLM.from_pretrained(save_tiny_model(folder / "model", seed))


def trained(cls: Any, folder: Any, seed: int, config: dict[str, Any], **options: Any) -> Any:
    tokenizer = chat_tokenizer()
    rows = Dataset.from_list(ROWS)
    if config.get("assistant_only_loss"):
        tokenizer.chat_template = MARKED
        rows = Dataset.from_list([{"messages": row["prompt"] + row["completion"]} for row in ROWS])
    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"), "max_steps": 3, "per_device_train_batch_size": 4,
        "logging_steps": 1, "report_to": "none", "use_cpu": True, "disable_tqdm": True,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "save_strategy": "no",
        "bf16": False, "max_length": 48, "seed": 5, "gradient_checkpointing": False,
    }  # fmt: skip
    arguments = (SafetySFTConfig if "safety_weight" in config else SFTConfig)(**settings | config)
    torch.manual_seed(seed)
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = cls(
        model_of(folder, seed), arguments, train_dataset=rows, eval_dataset=rows,
        processing_class=tokenizer, peft_config=lora, **options,
    )  # fmt: skip
    trainer.train()
    return trainer


def training_log(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


OF_TRL = ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm")


@pytest.mark.parametrize(
    "config",
    [
        {"completion_only_loss": True},
        {"completion_only_loss": False},
        {"assistant_only_loss": True},
        {"packing": True, "packing_strategy": "wrapped", "completion_only_loss": False},
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True},
    ],
    ids=lambda config: ", ".join(config),
)
@pytest.mark.filterwarnings("ignore::UserWarning:trl", "ignore::FutureWarning:trl")
def test_without_a_penalty_it_is_sft_trainer(config: Any, seed: int, tmp_path: Any) -> None:
    own = trained(SFTTrainer, tmp_path, seed, config)
    ours = trained(
        SafetySFTTrainer, tmp_path, seed, config, safety_tokens=TOKENS, penalty=SafetyPenalty(0.0),
        positions="response",
    )  # fmt: skip
    for entry, expected in zip(training_log(ours), training_log(own), strict=True):
        for name in OF_TRL:
            assert entry[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name
    assert training_log(ours)[-1]["safety/penalty"] > 0.0
    assert training_log(ours)[-1]["safety/ce"] == pytest.approx(training_log(ours)[-1]["loss"])
    found, expected = ours.evaluate(), own.evaluate()
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize("anchored", [False, True])
def test_its_loss_is_cross_entropy_and_penalty(anchored: bool, seed: int, tmp_path: Any) -> None:
    weight = 0.3
    anchors = AnchorPrompts.from_prompts(
        chat_tokenizer(), ["help me"], per_step=1, penalty_weight=0.5
    )
    options: dict[str, Any] = {"anchors": anchors} if anchored else {}
    ours = trained(
        SafetySFTTrainer, tmp_path, seed, {}, safety_tokens=TOKENS,
        penalty=SafetyPenalty(weight), positions="response", **options,
    )  # fmt: skip
    for step, entry in enumerate(training_log(ours)):
        penalty, at_anchors = entry["safety/penalty"], entry.get("safety/anchor_penalty", 0.0)
        total = entry["safety/ce"] + weight * penalty + 0.5 * at_anchors
        assert entry["loss"] == pytest.approx(total, rel=1e-5)
        assert (penalty > 0.0) == (step > 0)
    assert ("safety/anchor_penalty" in training_log(ours)[0]) == anchored


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulation_equals_one_batch(micro: int, seed: int, tmp_path: Any) -> None:
    # AdamW's first steps are the signs of gradients, which rounding decides where they are near 0
    config = {"safety_weight": 0.3, "max_steps": 2, "optim": "sgd", "learning_rate": 0.5}
    options: dict[str, Any] = {
        "safety_tokens": TOKENS,
        "anchors": AnchorPrompts.from_prompts(chat_tokenizer(), ["help me", "bye"], per_step=1),
    }
    whole = trained(
        SafetySFTTrainer, tmp_path, seed, {**config, "per_device_train_batch_size": 8}, **options
    )
    split = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": 8 // micro}
    parts = trained(SafetySFTTrainer, tmp_path, seed, config | split, **options)
    for entry, expected in zip(training_log(parts), training_log(whole), strict=True):
        for name in ("loss", "safety/ce", "safety/penalty", "safety/anchor_penalty"):
            assert entry[name] == pytest.approx(expected[name], rel=1e-5, abs=1e-7), name
    wanted = dict(whole.model.named_parameters())
    for name, parameter in parts.model.named_parameters():
        assert torch.allclose(parameter, wanted[name], rtol=1e-4, atol=1e-6), name


def test_the_config_is_parsed_and_says_how_to_attach(seed: int, tmp_path: Any) -> None:
    prompts, templates = tmp_path / "anchors.jsonl", tmp_path / "templates.txt"
    prompts.write_text('{"prompt": "help me"}\n')
    templates.write_text("sorry , but I can not help with that .\n")
    flags = [
        "--output_dir", str(tmp_path), "--safety_weight", "0.25", "--safety_kind", "logprob",
        "--safety_positions", "3", "--safety_anchors", str(prompts),
        "--safety_anchors_per_step", "1", "--safety_templates", str(templates),
        "--safety_delta", "2.5", "--safety_ref_tokens", "7", "--safety_backend", "torch",
        "--use_cpu", "--report_to", "none", "--bf16", "False",
    ]  # fmt: skip
    parser = TrlParser((SafetySFTConfig,))
    (config,) = parser.parse_args_and_config(flags)
    trainer = SafetySFTTrainer(
        model_of(tmp_path, seed), config, train_dataset=Dataset.from_list(ROWS),
        processing_class=chat_tokenizer(), positions="all",
    )  # fmt: skip
    options = trainer.attach_options
    assert (options["penalty"].weight, options["penalty"].kind) == (0.25, "logprob")
    assert (options["penalty"].delta, options["ref_tokens"]) == (2.5, 7)
    assert (options["backend"], options["ref_every"]) == ("torch", 1)
    assert options["positions"] == "all"  # a keyword goes before the config
    assert len(options["anchors"]) == 1
    assert trainer.safety_tokens.pieces[0] == "sorry"
    assert "--safety_temperature" in parser.format_help()
    assert "T of kind subset_kl." in parser.format_help()


def test_a_script_for_gpus_runs_on_a_cpu(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """TRL's own raises there; what is asked for is not changed."""
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *_: False)
    assert SafetySFTConfig(output_dir=str(tmp_path)).bf16 is False
    assert SafetySFTConfig(output_dir=str(tmp_path), use_cpu=True).bf16 is True
    with pytest.raises(ValueError, match="bf16"):
        SafetySFTConfig(output_dir=str(tmp_path), bf16=True)
    with pytest.raises(ValueError, match="bf16"):
        SFTConfig(output_dir=str(tmp_path))


def test_other_losses_are_refused(seed: int, tmp_path: Any) -> None:
    settings: dict[str, Any] = {
        "output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "bf16": False
    }  # fmt: skip
    rows = Dataset.from_list(ROWS)
    given: dict[str, Any] = {"train_dataset": rows, "processing_class": chat_tokenizer()}
    with pytest.raises(ValueError, match="`loss_type` must be 'nll'; got 'dft'"):
        config = SFTConfig(loss_type="dft", **settings)
        SafetySFTTrainer(model_of(tmp_path, seed), config, safety_tokens=TOKENS, **given)
    with pytest.raises(ValueError, match="`safety_tokens` must be given"):
        SafetySFTTrainer(model_of(tmp_path, seed), SFTConfig(**settings), **given)


def test_sft_trainer_and_dpo_of_an_attached_model_say_what_to_use(seed: int, tmp_path: Any) -> None:
    model = fresh_lora(tiny_model("llama", seed))
    rows = Dataset.from_list(
        [{"prompt": "what is", "chosen": " 1 + 2", "rejected": " good day"}] * 4
    )
    config = DPOConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_steps=1,
        per_device_train_batch_size=2, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = DPOTrainer(model, args=config, train_dataset=rows, processing_class=chat_tokenizer())
    with (
        attach(trainer.model, TOKENS, positions="response"),
        pytest.raises(ValueError, match="`fused_lm_head` must be False"),
    ):
        trainer.train()
