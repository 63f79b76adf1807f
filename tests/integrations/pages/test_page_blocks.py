"""Every Python block of the README and of docs/ is run, on a tiny model."""

from __future__ import annotations

import pytest
import torch
from doc_blocks import ROOT, python_blocks, run_block
from tiny_models import fresh_lora
from tiny_tokenizer import chat_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM, TrainingArguments

from str_kernels import SafetyTokens

# Pages whose blocks need more than the names below, and the tests that run them.
ELSEWHERE = {
    "docs/own_losses.md": "attach/test_own_losses.py",
    "docs/trainers.md": "trainers/test_trainer_recipes.py",
}
PAGES = ["README.md", *sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("docs/**/*.md"))]
BLOCKS = [
    pytest.param(page, place, id=f"{page}-{place}")
    for page in PAGES
    if page not in ELSEWHERE
    for place, _ in enumerate(python_blocks(page))
    if (page, place) != ("README.md", 0)  # an example, see below
]


def test_the_readme_s_first_block_is_an_example():
    script = (ROOT / "examples" / "quickstart.py").read_text("utf-8")  # run by tests/examples
    assert script.endswith("\n\n" + python_blocks("README.md")[0])


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= 1000


@pytest.mark.parametrize("page", ELSEWHERE)
def test_a_page_left_out_here_is_run_elsewhere(page):
    test = (ROOT / "tests" / "integrations" / ELSEWHERE[page]).read_text("utf-8")
    assert f'PAGE = "{page}"' in test and "run_block(" in test


@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("docs/quickstart.md", ["attach(", "SafetyTrainer("]),
        ("docs/attach.md", ["attach(", "AnchorPrompts.from_prompts(", "ref_model=", "reference="]),
        ("docs/loss.md", ["safety_linear_cross_entropy(", "safety_log_probs("]),
    ],
)
def test_a_page_shows_what_it_is_for(page, words):
    blocks = "".join(python_blocks(page))
    assert [word for word in words if word not in blocks] == []


@pytest.mark.parametrize(("page", "place"), BLOCKS)
def test_a_block_is_short(page, place):
    block = python_blocks(page)[place]
    lines = [line for line in block.splitlines() if line and "import" not in line]
    assert len(lines) <= 8


@pytest.mark.parametrize(("page", "place"), BLOCKS)
@pytest.mark.filterwarnings("ignore::UserWarning:trl", "ignore::FutureWarning")
def test_block_runs(page, place, seed, tmp_path, monkeypatch):
    block = python_blocks(page)[place]
    monkeypatch.chdir(tmp_path)
    folder = save_tiny_model(tmp_path / "model", seed)
    model, ref_model = (AutoModelForCausalLM.from_pretrained(folder) for _ in range(2))
    tokenizer = chat_tokenizer()
    ids = torch.randint(5, 20, (2, 9))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    head = model.lm_head.weight
    space = {
        "torch": torch,
        "tokenizer": tokenizer,
        "input_ids": ids,
        "target": torch.nn.functional.pad(ids[:, 1:], (0, 1), value=-100).flatten(),
        "backbone": model.model,
        "ref_backbone": ref_model.model,
        "head": head,
        "batch": batch,
        "rows": [{name: value[i].tolist() for name, value in batch.items()} for i in range(2)] * 4,
        "collator": lambda rows: {k: torch.tensor([r[k] for r in rows]) for k in batch},
        "training_arguments": TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            report_to="none",
            save_strategy="no",
            dataloader_pin_memory=False,
            logging_steps=1,
            remove_unused_columns=False,
        ),
    }
    if "SafetySFTTrainer" in block:
        pytest.importorskip("trl")  # the oldest releases of the matrix are tested without it
        from datasets import Dataset

        turns = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
        space["chats"] = Dataset.from_list([{"messages": turns}] * 8)
        space["settings"] = {"max_steps": 2, "report_to": "none", "use_cpu": True, "bf16": False}
        space["settings"] |= {"logging_steps": 1, "save_strategy": "no"}
    if "deepcopy" in block or "AnchorPrompts" in block:
        space |= {"model": model, "tokens": SafetyTokens.from_templates(tokenizer)}
    if "peft_model" in block:
        space["peft_model"] = fresh_lora(model).train()
    if "lora_a" in block:  # goes on where the first block ends
        run_block(page, python_blocks(page)[0], space)
        space["lora_a"], space["lora_b"] = torch.randn(4, head.shape[1]), torch.zeros(len(head), 4)
    run_block(page, block, space)
    if "lora_a" in block:
        assert float(space["terms"].entropy) > 0.0 and abs(float(space["terms"].penalty)) < 1e-10
    elif "terms" in space:
        assert float(space["terms"].penalty) == 0.0 and head.grad is not None
    if "trainer" in space:
        assert "safety/penalty" in space["trainer"].state.log_history[0]
    if "anchors" in space:
        assert float(space["handle"].last_anchors.penalty) == 0.0
