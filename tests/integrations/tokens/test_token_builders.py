"""Safety tokens from what a model says: both builders against plain loops, in float64."""

from __future__ import annotations

import statistics

import pytest
import torch
from taught_model import ANSWERS, HARMFUL, HARMLESS, SHORT, ids_of, taught_model

from str_kernels import SafetyTokens
from str_kernels.evals import classify_answer
from str_kernels.integrations.chat import generation
from str_kernels.integrations.tokens.builders import from_contrast, from_refusals
from str_kernels.integrations.tokens.opening_tokens import from_openings


@pytest.fixture(scope="module")
def taught():
    model, tokenizer = taught_model()
    return model.double(), tokenizer


def answer_plainly(model, tokenizer, prompt, length=24):
    """Return the ids of the greedy answer and the probabilities (t, V) from which each came."""
    ids, answer, shares = ids_of(tokenizer, prompt), [], []
    for _ in range(length):
        with torch.no_grad():
            shares.append(model(torch.tensor([ids])).logits[0, -1].softmax(-1))
        token = int(shares[-1].argmax())
        if token == 1:
            break
        ids, answer = [*ids, token], [*answer, token]
    return answer, torch.stack(shares)[: len(answer)]


def test_the_model_has_learnt_its_part(taught):
    model, tokenizer = taught
    said = generation.answer_prompts(model, tokenizer, list(ANSWERS), max_new_tokens=24)
    assert said == list(ANSWERS.values())
    ids = generation.answer_ids(model, tokenizer, list(ANSWERS), max_new_tokens=3, batch_size=4)
    assert ids == [tokenizer.encode(answer)[:3] for answer in ANSWERS.values()]
    assert {classify_answer(ANSWERS[prompt]) for prompt in HARMFUL} == {"refusal"}


def test_refusals_against_a_plain_loop(taught):
    model, tokenizer = taught
    tokens = from_refusals(model, tokenizer, HARMFUL + SHORT, positions=4, count=99)
    # 5 refusals open with "sorry , but I", 5 with "I can not help"
    assert dict(zip(tokens.pieces, tokens.scores, strict=True)) == pytest.approx(
        {"I": (5 * 1 + 5 * 0.25) / 10, "sorry": 0.5, ",": 0.375, "can": 0.375, "but": 0.25}
        | {"not": 0.25, "help": 0.125}
    )
    assert list(tokens.scores) == sorted(tokens.scores, reverse=True)
    assert tokens.id_weights is None and "10 refusals of 12 harmful" in tokens.source
    tokens.verify(tokenizer)
    fewer = from_refusals(model, tokenizer, HARMFUL + SHORT, positions=4, count=3, batch_size=5)
    assert fewer.ids.tolist() == tokens.ids.tolist()[:3]


def test_a_token_counts_once_an_answer_where_it_first_stands(taught, monkeypatch):
    model, tokenizer = taught
    said = tokenizer.encode("I can not help with that , I can not help")
    with_special = [*said[:3], tokenizer.unk_token_id, *said[3:]]
    monkeypatch.setattr(
        "str_kernels.integrations.tokens.builders.answer_ids", lambda *_, **__: [said, with_special]
    )
    tokens = from_refusals(model, tokenizer, ["a", "b"], positions=8)
    scores = dict(zip(tokens.pieces, tokens.scores, strict=True))
    assert scores["I"] == 1.0 and scores["can"] == pytest.approx(7 / 8)
    assert scores["help"] == pytest.approx((5 / 8 + 4 / 8) / 2)
    assert "<unk>" not in scores and len(scores) == 7


def plain_contrast(model, tokenizer, harmful, harmless, positions, floor):
    """Return the score of every id, by the formula, a prompt and a token at a time."""
    means = {"refusal": [], "other": []}
    for wanted, prompts in (("refusal", harmful), ("other", harmless)):
        for prompt in prompts:
            answer, shares = answer_plainly(model, tokenizer, prompt)
            if classify_answer(tokenizer.decode(answer)) == wanted:
                means[wanted].append(shares[:positions].mean(0).tolist())
    scores = []
    for one, other in zip(*(zip(*means[name], strict=True) for name in means), strict=True):
        error = statistics.variance(one) / len(one) + statistics.variance(other) / len(other)
        scores.append((statistics.mean(one) - statistics.mean(other)) / (error**0.5 + floor))
    return scores


@pytest.mark.parametrize("positions", [1, 3, 8])
def test_contrast_against_a_plain_loop(taught, positions):
    model, tokenizer = taught
    asked = HARMFUL + SHORT, HARMLESS
    truth = plain_contrast(model, tokenizer, *asked, positions, floor=1e-3)
    special = set(tokenizer.all_special_ids)
    wanted = sorted(
        (i for i in range(len(tokenizer)) if truth[i] > 0 and i not in special),
        key=lambda i: -truth[i],
    )
    tokens = from_contrast(model, tokenizer, *asked, count=99, positions=positions)
    assert tokens.ids.tolist() == wanted
    # relative 1e-7: the variance of sums and squares has lost digits, 1e-16 of 1e-6 (floor**2)
    assert tokens.scores == pytest.approx([truth[i] for i in wanted], rel=1e-7)
    shares = torch.tensor([truth[i] for i in wanted])
    torch.testing.assert_close(tokens.id_weights, (shares / shares.mean()).float())
    assert tokens.id_weights.min() >= 0
    assert float(tokens.id_weights.mean()) == pytest.approx(1.0, abs=1e-6)
    assert "10 refusals of 12 harmful" in tokens.source and "6 answers to 7" in tokens.source
    some = from_contrast(model, tokenizer, *asked, count=2, positions=positions)
    assert some.ids.tolist() == wanted[:2]
    assert float(some.id_weights.mean()) == pytest.approx(1.0)


def test_the_floor_is_added_to_the_standard_error(taught):
    model, tokenizer = taught
    asked = HARMFUL + SHORT, HARMLESS
    truth = plain_contrast(model, tokenizer, *asked, 3, floor=0.5)
    tokens = from_contrast(model, tokenizer, *asked, count=5, positions=3, floor=0.5)
    assert tokens.scores == pytest.approx([truth[i] for i in tokens.ids.tolist()], rel=1e-7)
    assert max(tokens.scores) < 2  # a difference of 1 over 0.5


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_the_batch_size_changes_nothing_and_only_last_logits_are_made(taught, batch_size):
    model, tokenizer = taught
    asked = HARMFUL + SHORT, HARMLESS
    truth = from_contrast(model, tokenizer, *asked, positions=3)
    shapes = []
    hook = model.lm_head.register_forward_hook(lambda _, __, out: shapes.append(out.shape))
    model.train()
    try:
        tokens = from_contrast(model, tokenizer, *asked, positions=3, batch_size=batch_size)
        assert model.training
    finally:
        hook.remove()
        model.eval()
    assert tokens.ids.tolist() == truth.ids.tolist()
    assert tokens.scores == pytest.approx(truth.scores, rel=1e-7)
    assert max(shape[0] for shape in shapes) <= batch_size
    assert max(shape[1] for shape in shapes) == 3


def test_progress_ends_at_all_of_each_stage(taught):
    model, tokenizer = taught
    seen = {}
    from_contrast(
        model, tokenizer, HARMFUL, HARMLESS, batch_size=4,
        watch=lambda stage, done, total: seen.setdefault(stage, []).append((done, total)),
    )  # fmt: skip
    assert [steps[-1] for steps in seen.values()] == [(10, 10), (7, 7), (10, 10), (6, 6)]
    assert all(steps[0][0] <= 4 for steps in seen.values())


def test_a_model_that_does_not_refuse_and_bad_numbers(taught):
    model, tokenizer = taught
    with pytest.raises(ValueError, match=r"`prompts` must .* refuses; it does so to 0 of 2"):
        from_refusals(model, tokenizer, SHORT)
    with pytest.raises(ValueError, match=r"`harmful` must hold at least 2 prompts .* 1 of 3"):
        from_contrast(model, tokenizer, [HARMFUL[0], *SHORT], HARMLESS)
    with pytest.raises(ValueError, match=r"`harmless` must .* without refusing; .* 1 of 11"):
        from_contrast(model, tokenizer, HARMFUL, [*HARMFUL, "hello"])
    with pytest.raises(TypeError, match="`harmless` must be a sequence of strings"):
        from_contrast(model, tokenizer, HARMFUL, "hello")
    for options, message in (
        ({"count": 0}, "`count` must be >= 1; got 0"),
        ({"positions": 0}, r"`positions` must be in \[1, 24\], .*; got 0"),
        ({"positions": 9, "answer_tokens": 8}, r"`positions` must be in \[1, 8\], .*; got 9"),
        ({"batch_size": 0}, "`batch_size` must be >= 1; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            from_refusals(model, tokenizer, HARMFUL, **options)
        with pytest.raises(ValueError, match=message):
            from_contrast(model, tokenizer, HARMFUL, HARMLESS, **options)
    for floor in (0.0, float("nan")):
        with pytest.raises(ValueError, match="`floor` must be > 0; got"):
            from_contrast(model, tokenizer, HARMFUL, HARMLESS, floor=floor)


@pytest.mark.parametrize("batch_size", [1, 5, 99])
def test_openings_against_a_plain_loop(taught, batch_size):
    model, tokenizer = taught
    model.train()
    shares = [answer_plainly(model, tokenizer, prompt, length=1)[1][0] for prompt in ANSWERS]
    score = torch.stack(shares).mean(0)
    beside = SafetyTokens.from_ids(tokenizer, [9, 4, 12], source="three")
    found = from_openings(
        model, tokenizer, list(ANSWERS), beside=beside, count=5, batch_size=batch_size
    )
    others = [i for i in score.argsort(descending=True).tolist() if i not in (9, 4, 12)][:5]
    assert found.ids.tolist() == [9, 4, 12, *others] and model.training
    assert found.scores == pytest.approx(score[found.ids].tolist())
    assert found.source.startswith("three; and the 5 likeliest") and found.id_weights is None
    assert len(from_openings(model, tokenizer, HARMFUL, beside=beside)) == 6  # as many as beside
    with pytest.raises(ValueError, match="`count` must be >= 1, and given where `beside` is None"):
        from_openings(model, tokenizer, HARMFUL)
    with pytest.raises(ValueError, match="`prompts` must hold at least one prompt"):
        from_openings(model, tokenizer, [], count=3)
    with pytest.raises(TypeError, match="`prompts` must be a sequence of strings"):
        from_openings(model, tokenizer, "hello", count=3)
