"""attach() with a reference cache: the live reference's loss, and nothing silently another's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from tiny_models import VOCAB, checkpoint, fresh_lora, tiny_model, with_lora
from tiny_rows import Padding, Rows, arguments_of, log_of, trainer_of

from str_kernels import AnchorPrompts, SafetyPenalty, SafetyTokens, attach
from str_kernels.integrations.anchors.prompts import AnchorRow
from str_kernels.integrations.reference_cache.fingerprint import model_fingerprint
from str_kernels.integrations.reference_cache.reading import cache_model
from str_kernels.reference_cache.reader import KEY, CachedReference, verify_cache

TOKENS = SafetyTokens(ids=[7, 3, 100, 64])
BOUND = 1e-6  # float32; the cache's batches are padded otherwise, which rounds otherwise


ROWS: Any = "response"


def data_of(seed: int, count: int = 10) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(4, 12, (count,), generator=generator).tolist()
    lengths[:3] = [5, 11, 8]  # so that these are padded
    return [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]


def pad(rows: list[list[int]], side: str = "right") -> dict[str, torch.Tensor]:
    """Pad, with labels on all but the first two tokens of each row."""
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for at, row in enumerate(rows):
        start = 0 if side == "right" else longest - len(row)
        ids[at, start : start + len(row)] = torch.tensor(row)
        mask[at, start : start + len(row)] = 1
        labels[at, start + 2 : start + len(row)] = torch.tensor(row[2:])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def flatten(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Pack rows into one, as DataCollatorWithFlattening does."""
    each = [pad([row]) for row in rows]
    batch = {name: torch.cat([b[name] for b in each], 1) for name in ("input_ids", "labels")}
    batch["position_ids"] = torch.cat([torch.arange(len(row)) for row in rows])[None]
    return batch


def steps(model: Any, batches: list[dict[str, Any]], accumulate: int, **options: Any) -> list[Any]:
    """Train a few steps and return (loss, penalty) of each forward."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    seen = []
    with attach(model.train(), TOKENS, **{"positions": "response", **options}) as handle:
        for number, batch in enumerate(batches, start=1):
            loss = model(**batch).loss
            (loss / accumulate).backward()
            assert handle.last is not None
            seen.append([float(loss.detach()), float(handle.last.penalty)])
            if number % accumulate == 0:
                optimizer.step()
                optimizer.zero_grad()
    return seen


@pytest.fixture
def base(seed: int) -> Any:
    return tiny_model("llama-tied", seed)


@pytest.fixture
def rows(seed: int) -> list[list[int]]:
    return data_of(seed)


@pytest.fixture
def folder(base: Any, rows: Any, tmp_path: Any) -> Any:
    cache_model(base, rows, TOKENS, tmp_path / "cache", rows_per_shard=4, batch_tokens=30)
    return tmp_path / "cache"


def compare(one: list[Any], other: list[Any], bound: float = BOUND) -> None:
    difference = (torch.tensor(one) - torch.tensor(other)).abs() / torch.tensor(other).clamp(min=1)
    assert difference.max() <= bound, difference
    assert torch.tensor(other)[1:, 1].min() > 1e-4  # there is a penalty to compare


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_equals_the_live_reference(
    base: Any, rows: Any, folder: Any, seed: int, side: str, accumulate: int, checkpointing: bool
) -> None:
    model = with_lora(base, seed)
    if checkpointing:
        checkpoint(model)
        model.enable_input_require_grads()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen = [[rows[index] for index in order[at : at + 3]] for at in (0, 2, 4, 6, 1, 7)]
    batches = [pad(three, side) for three in chosen]
    penalty = SafetyPenalty(0.5)
    expected = steps(copy.deepcopy(model), batches, accumulate, penalty=penalty)
    found = steps(model, batches, accumulate, penalty=penalty, reference=CachedReference(folder))
    compare(found, expected)


@pytest.mark.parametrize("positions", ["all", 2])
def test_other_positions_and_log_probs(
    base: Any, rows: Any, seed: int, tmp_path: Any, positions: Any
) -> None:
    cache_model(base, rows, TOKENS, tmp_path / "cache", kind="logprob", path="logits")
    model = with_lora(base, seed)
    options = {"penalty": SafetyPenalty(0.5, kind="logprob"), "positions": positions}
    batches = [pad(rows[:4])] * 2
    reference = CachedReference(tmp_path / "cache")
    with torch.random.fork_rng():
        expected = steps(copy.deepcopy(model), batches, 1, **options)
    compare(steps(model, batches, 1, **options, reference=reference), expected)
    with pytest.raises(ValueError, match="`penalty` must be of a kind that compares log_probs"):
        attach(model, TOKENS, reference=reference, positions=ROWS)


def test_packed_rows(base: Any, rows: Any, folder: Any, seed: int) -> None:
    model = with_lora(base, seed)
    batch = flatten(rows[:4])
    options: dict[str, Any] = {"penalty": SafetyPenalty(0.5)}
    without = {**batch, "use_cache": False}
    expected = steps(copy.deepcopy(model), [without, without], 1, **options)
    options["reference"] = CachedReference(folder)
    compare(steps(copy.deepcopy(model), [without, without], 1, **options), expected)
    with attach(model.train(), TOKENS, **options, positions=ROWS):
        # transformers keeps packed rows apart without a cache and without a mask only
        with pytest.raises(ValueError, match="packed one after the other and use_cache on"):
            model(**batch)
        masked = {**without, "attention_mask": torch.ones_like(batch["input_ids"])}
        with pytest.raises(ValueError, match="after the other, with an attention_mask: of such"):
            model(**masked)


def test_checkpointing_switches_the_cache_off_for_packed_rows(
    base: Any, rows: Any, folder: Any, seed: int
) -> None:
    model = with_lora(base, seed).train()
    batch = flatten(rows[:3])
    reference = CachedReference(folder)
    expected = steps(copy.deepcopy(model), [{**batch, "use_cache": False}] * 2, 1)
    checkpoint(model)
    model.enable_input_require_grads()
    compare(steps(model, [batch] * 2, 1, reference=reference), expected)


def test_layouts_are_told_apart_in_16_bits_too(seed: int, tmp_path: Any) -> None:
    for name, layout, expected in (
        ("llama", "left", True), ("llama", "packed", True), ("llama", "masked", False),
        ("gpt2", "left", False), ("gpt2", "packed", True), ("gpt2", "masked", False),
    ):  # fmt: skip
        base, rows = tiny_model(name, seed).bfloat16(), data_of(seed)
        cache_model(base, rows, TOKENS, tmp_path / "cache", overwrite=True)
        batch: Any = pad(rows[:3], "left") if layout == "left" else flatten(rows[:3])
        if layout == "masked":
            batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        model, cached = with_lora(base, seed).train(), CachedReference(tmp_path / "cache")
        with attach(model, TOKENS, reference=cached, positions=ROWS) as handle:
            try:
                handle._inner(**batch, use_cache=False)
                found = True
            except ValueError as error:
                assert "`reference` must not be a cache for rows" in str(error)
                found = False
            assert found == expected, (name, layout)


def test_a_model_that_counts_positions_from_the_padding(seed: int, tmp_path: Any) -> None:
    base, rows = tiny_model("gpt2", seed), data_of(seed)
    cache_model(base, rows, TOKENS, tmp_path / "cache")
    model = with_lora(base, seed)
    reference, batches = CachedReference(tmp_path / "cache"), [pad(rows[:3])] * 2
    expected = steps(copy.deepcopy(model), batches, 1)
    compare(steps(copy.deepcopy(model), batches, 1, reference=reference), expected)
    left = pad(rows[:3], "left")
    with attach(model.train(), TOKENS, reference=reference, positions=ROWS):
        with pytest.raises(ValueError, match="do not start at position 0"):
            model(**left)
        left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
        assert torch.isfinite(model(**left).loss)


@pytest.mark.parametrize("workers", [0, 1])
def test_trainer_with_the_look_up_in_the_data_loader(
    seed: int, tmp_path: Any, workers: int
) -> None:
    data = Rows(seed, 16)
    rows = [Padding().pad([data[index]]) for index in range(16)]
    ids = [row["input_ids"][0][row["attention_mask"][0].bool()].tolist() for row in rows]
    base = tiny_model("llama", seed)
    cache_model(base, ids, TOKENS, tmp_path / "cache")
    cached = CachedReference(tmp_path / "cache")

    def log(collator: Any, reference: Any) -> list[float]:
        torch.manual_seed(seed)
        arguments = arguments_of(
            tmp_path / "run", max_steps=3, gradient_accumulation_steps=2, seed=seed % 1000,
            per_device_train_batch_size=2, learning_rate=0.02, eval_strategy="epoch",
            dataloader_num_workers=workers,
        )  # fmt: skip
        options = {"eval_dataset": data, "data_collator": collator, "reference": reference}
        options |= {"safety_tokens": TOKENS, "penalty": SafetyPenalty(0.5)}
        trainer = trainer_of(fresh_lora(copy.deepcopy(base)), arguments, data, **options)
        trainer.train()
        assert "eval_loss" in trainer.evaluate()
        return [x for e in log_of(trainer) for x in (e["loss"], e["safety/penalty"])]

    expected = log(Padding().pad, None)
    found = log(cached.with_collator(Padding().pad), cached)
    assert found[-1] > 0
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-6)  # the log is rounded


def test_a_batch_with_values_of_another_batch(base: Any, rows: Any, folder: Any, seed: int) -> None:
    cached = CachedReference(folder)
    model = with_lora(base, seed)
    batch = cached.with_collator(pad)(rows[:3])
    with attach(model.train(), TOKENS, reference=cached, positions=ROWS):
        before = dict(batch)
        assert torch.isfinite(model(**batch).loss)
        assert batch.keys() == before.keys()  # the caller's own is left alone
        batch[KEY] = batch[KEY][:, :-1]
        with pytest.raises(ValueError, match="`ref_safety_logits` must be"):
            model(**batch)
        with torch.no_grad():
            assert torch.isfinite(model.eval()(**batch).loss)  # not given to the model
    absent = [rows[0], rows[1][:-1]]
    with attach(model.train(), TOKENS, reference=cached, positions=ROWS):
        with pytest.raises(ValueError, match="row 1 of the batch is not there"):
            model(**pad(absent))


def test_anchors_beside_a_reference_that_is_asked_in_every_second_forward(
    base: Any, rows: Any, tmp_path: Any, seed: int
) -> None:
    """What the collator looked up is the batch's, and no anchor's, though nobody asked for it."""
    two = [row[:4] for row in rows[1:3]]  # a batch as large as the anchors
    cache_model(base, [*two, rows[0][:4]], TOKENS, tmp_path / "cache")
    cached = CachedReference(tmp_path / "cache")
    model = with_lora(base, seed).train()
    anchors = AnchorPrompts([AnchorRow(tuple(row)) for row in two], per_step=1)

    def losses(collate: Any, **reference: Any) -> list[float]:
        found = []
        options = {"anchors": anchors, "ref_every": 2, "positions": ROWS, **reference}
        with attach(model, TOKENS, **options) as handle:
            for step in range(4):
                handle.step = step
                found.append(float(model(**collate([rows[0][:4]])).loss.detach()))
        return found

    expected = pytest.approx(losses(pad), rel=1e-5)
    assert losses(pad, reference=cached) == expected
    assert losses(cached.with_collator(pad), reference=cached) == expected


def test_a_full_fine_tuning_may_begin_and_be_resumed(
    base: Any, rows: Any, folder: Any, seed: int
) -> None:
    batches = [pad(rows[:3])] * 3
    frozen = copy.deepcopy(base)
    expected = steps(copy.deepcopy(base), batches, 1, ref_model=frozen)
    compare(steps(base, batches, 1, reference=CachedReference(folder)), expected)
    with pytest.raises(ValueError, match=r"check_model=False\) is for"):
        attach(base, TOKENS, reference=CachedReference(folder), positions=ROWS)
    resumed = CachedReference(folder, check_model=False)
    attach(base, TOKENS, reference=resumed, positions=ROWS).remove()


def test_another_model_or_other_tokens_are_refused(
    base: Any, rows: Any, folder: Any, seed: int, tmp_path: Any
) -> None:
    model = with_lora(base, seed)
    for wrong in ([3, 7, 100, 64], [7, 3, 100]):
        with pytest.raises(ValueError, match="`safety_tokens` must be the 4 ids"):
            tokens = SafetyTokens(ids=wrong)
            attach(model, tokens, reference=CachedReference(folder), positions=ROWS)
    other = with_lora(tiny_model("llama-tied", seed + 1), seed)
    with pytest.raises(ValueError, match="must have the base weights that the cache"):
        attach(other, TOKENS, reference=CachedReference(folder), positions=ROWS)
    with pytest.raises(ValueError, match="was built with model "):
        cache_model(other, rows, TOKENS, folder)
    # of a model with adapters, what it is without them
    cache_model(model, rows, TOKENS, folder, rows_per_shard=4, batch_tokens=30)
    assert verify_cache(folder) == []
    with pytest.raises(ValueError, match="at least one id"):
        cache_model(model, rows, SafetyTokens(ids=[]), tmp_path / "none")


def test_the_adapters_stay_on(base: Any, rows: Any, folder: Any, seed: int) -> None:
    """A cache needs no frozen base and no way back: PiSSA would be refused without it."""
    model = with_lora(copy.deepcopy(base), seed)
    with attach(model.train(), TOKENS, reference=CachedReference(folder), positions=ROWS):
        model.disable_adapter = None  # nobody may call it
        assert torch.isfinite(model(**pad(rows[:2])).loss)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    pissa = get_peft_model(base, config)
    with pytest.raises(ValueError, match="must have the base weights"):
        attach(pissa, TOKENS, reference=CachedReference(folder), positions=ROWS)
    unchecked = CachedReference(folder, check_model=False)
    with attach(pissa.train(), TOKENS, reference=unchecked, positions=ROWS) as handle:
        pissa(**pad(rows[:2])).loss.backward()
        assert handle.last is not None and handle.last.penalty < 1e-6  # the same function still


# The fingerprint

HEAD = ["lm_head"]
AROUND = {
    "LoRA": lambda: LoraConfig(r=2, target_modules=["q_proj", "v_proj"]),
    "DoRA": lambda: LoraConfig(r=2, target_modules=["q_proj"], use_dora=True),
    "IA3": lambda: IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=[]),
    "LoRA on the head": lambda: LoraConfig(r=2, target_modules=["q_proj", "lm_head"]),
    "a trained head": lambda: LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=HEAD),
    "trained tokens": lambda: LoraConfig(
        r=2, target_modules=["q_proj"], trainable_token_indices=[3, 4]
    ),
}


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("model_name", ["llama", "llama-tied"])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning")
@pytest.mark.filterwarnings("ignore:.*tied.*:UserWarning")
def test_the_fingerprint_is_the_models_without_its_adapters(
    name: str, model_name: str, seed: int
) -> None:
    base = tiny_model(model_name, seed)
    plain = model_fingerprint(base)
    assert plain == model_fingerprint(copy.deepcopy(base)) and len(plain) == 64
    model = get_peft_model(base, AROUND[name]())
    assert model_fingerprint(model) == plain
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)
    assert model_fingerprint(model) == plain


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_bit_of_one_weight_is_another_model(dtype: torch.dtype, seed: int) -> None:
    model = tiny_model("qwen2", seed).to(dtype)
    before = model_fingerprint(model)
    for tensor in (model.model.layers[1].self_attn.k_proj.bias, model.lm_head.weight):
        as_bytes = tensor.data.view(-1).view(torch.uint8)
        as_bytes[-1] ^= 1
        assert model_fingerprint(model) != before
        as_bytes[-1] ^= 1
    assert model_fingerprint(model) == before
    assert model_fingerprint(model.to(torch.float16)) != before


def test_the_config_counts_where_it_changes_logits(seed: int, tmp_path: Any) -> None:
    model = tiny_model("gemma2", seed)
    before = model_fingerprint(model)
    model.config.use_cache = not model.config.use_cache
    model.config.eos_token_id, model.config._name_or_path = 99, "elsewhere"
    model.set_attn_implementation("eager")
    assert model_fingerprint(model) == before
    model.save_pretrained(tmp_path)
    assert model_fingerprint(type(model).from_pretrained(tmp_path)) == before
    model.config.final_logit_softcapping = 3.0
    assert model_fingerprint(model) != before


def test_weights_that_are_not_there_have_no_fingerprint(seed: int) -> None:
    with pytest.raises(ValueError, match="whole and in memory"):
        model_fingerprint(tiny_model("llama", seed).to("meta"))
