"""attach() on the models of the zoo, a few of each kind; `make sweep` takes all of them."""

from __future__ import annotations

import csv
import dataclasses

import pytest
import transformers
import zoo
from sweep import LEAST_EXACT, TABLE, VERSIONS, counts_of

from str_kernels import SafetyPenalty
from str_kernels.integrations.anchors.passes import AnchorPass
from str_kernels.integrations.attach import forward as safety_forward
from str_kernels.integrations.models import loss_paths
from str_kernels.integrations.models.loss_paths import HeadPath

# transformers' own models warn of this and that (a slow path, an old name): not on trial here
pytestmark = pytest.mark.filterwarnings("ignore:::transformers", "ignore:::torch")

EXACT = {
    "llama": "head of its own",
    "gemma": "head tied to the embeddings",
    "gpt2": "positions learnt, Conv1D layers",
    "phi": "bias on the head",
    "gptj": "bias on the head, attention beside the MLP",
    "bert-generation": "an encoder's class with is_decoder",
    "roberta": "two layers and a bias in its head",
    "cohere": "logits multiplied",
    "granite": "logits divided",
    "minicpm3": "hidden states divided before the head",
    "gemma2": "logits capped",
    "mixtral": "auxiliary loss of the experts",
    "qwen3_moe": "the same, many experts",
    "gpt_oss": "the same, sinks in the attention",
    "jetmoe": "the same under another name, experts of attention",
    "deepseek_v3": "latent attention, shared experts",
    "mamba": "state space",
    "rwkv": "recurrent",
    "xlstm": "recurrent, logits capped",
    "falcon_h1": "attention beside state space, logits multiplied",
    "recurrent_gemma": "attention after recurrence, logits capped",
    "gemma3": "vision-language, given text alone",
}
OWN_LOSS = "have next-token cross-entropy as its own loss"


def judge(model_type, *args, **options):
    if model_type not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    outcome = zoo.judge(model_type, *args, **options)
    with TABLE.open(newline="") as file:
        made_for = next(csv.DictReader(file))["transformers"]
    if outcome.kind == "not buildable" and transformers.__version__ != made_for:
        pytest.skip(f"the tiny config is for transformers {made_for}: {outcome.reason}")
    return outcome


@pytest.mark.parametrize("model_type", EXACT)
def test_loss_and_gradients_are_those_of_the_naive_loss(model_type, seed):
    outcome = judge(model_type, seed)
    assert outcome.kind == "exact", outcome


@pytest.mark.parametrize(("model_type", "reason"), [("bart", OWN_LOSS), ("xlnet", OWN_LOSS)])
@pytest.mark.parametrize("path", ["linear", "logits"])
def test_a_model_whose_own_loss_is_another_is_refused(model_type, reason, path, seed):
    outcome = judge(model_type, seed, path)
    assert outcome.kind == "refused" and reason in outcome.reason, outcome


def test_a_head_that_cannot_be_read_is_refused_and_its_logits_taken(seed):
    outcome = judge("dory", seed)
    assert outcome.kind == "refused" and "a plain nn.Linear as its head" in outcome.reason, outcome
    outcome = judge("dory", seed, "logits")
    assert outcome.kind == "exact", outcome


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("model_type", ["llava", "qwen2_vl"])
def test_vision_language_models(model_type, image, seed):
    outcome = judge(model_type, seed, mapping="image-text-to-text", image=image)
    assert outcome.kind == "exact", outcome


def _heavier(monkeypatch):
    monkeypatch.setattr(zoo, "SafetyPenalty", lambda weight: SafetyPenalty(weight * 1.01))


def _with_head(**changes):
    def mutate(monkeypatch):
        def probe(model):
            head = real(model)
            return dataclasses.replace(head, **{k: f(head) for k, f in changes.items()})

        real = loss_paths.probe_head
        monkeypatch.setattr(loss_paths, "probe_head", probe)

    return mutate


def _without_bias(monkeypatch):
    def loss(*args, **options):
        return real(*args, **{**options, "linear_bias": None})

    real = loss_paths.safety_linear_cross_entropy
    monkeypatch.setattr(loss_paths, "safety_linear_cross_entropy", loss)


def _without_auxiliary_loss(monkeypatch):
    monkeypatch.setattr(safety_forward, "auxiliary_loss", lambda *_: 0.0)


def _without_anchors(monkeypatch):
    monkeypatch.setattr(AnchorPass, "__call__", lambda *_: 0.0)


def _steeper(monkeypatch):
    def run(self, *args):
        output, states = real(self, *args)
        return output, states * 1.01 - (states * 0.01).detach()

    real = HeadPath.run
    monkeypatch.setattr(HeadPath, "run", run)


ANOTHER_LOSS, OTHER_GRADIENTS = "its loss is another", "its gradients are others"


# Each a fault that would train a user's model in silence: the zoo is only worth as much as it sees.
@pytest.mark.parametrize(
    ("mutate", "model_type", "reason"),
    [
        (_heavier, "llama", ANOTHER_LOSS),
        (_with_head(logit_scale=lambda head: head.logit_scale * 1.01), "cohere", ANOTHER_LOSS),
        (_with_head(softcap=lambda _: None), "gemma2", ANOTHER_LOSS),
        (_without_bias, "phi", ANOTHER_LOSS),
        (_without_auxiliary_loss, "mixtral", ANOTHER_LOSS),
        (_without_anchors, "llama", ANOTHER_LOSS),
        (_steeper, "llama", OTHER_GRADIENTS),
    ],
)
def test_judge_sees_what_is_wrong(mutate, model_type, reason, seed, monkeypatch):
    mutate(monkeypatch)
    outcome = judge(model_type, seed)
    assert outcome.kind == "wrong" and reason in outcome.reason, outcome


def test_table_has_every_type_of_this_transformers_and_none_is_wrong():
    with TABLE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    wrong = [r["model_type"] for r in rows if "wrong" in (r["linear"], r["logits"], r["image"])]
    assert not wrong
    causal = [row for row in rows if row["mapping"] == "causal-lm"]
    assert counts_of(causal)["exact"] >= LEAST_EXACT
    if rows[0]["transformers"] != VERSIONS["transformers"]:
        pytest.skip(f"the table is of transformers {rows[0]['transformers']}: `make sweep`")
    listed = {(row["mapping"], row["model_type"]): row["class"] for row in rows}
    assert listed == {(m, t): name for m, names in zoo.CLASSES.items() for t, name in names.items()}
