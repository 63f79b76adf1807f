"""`python -m bench longcontext`: its children, what it says of each way, the parts, the plan."""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
import torch
from bench_runs import PNG, run

from bench.memory import longcontext, longcontext_plan, memory_parts, process
from bench.memory.longcontext_child import (
    ANCHORS,
    BY_HAND,
    CACHED,
    LIVE,
    OWN,
    TRL,
    WAYS,
    main,
    make_loss,
)
from bench.results import read_rows

pytestmark = pytest.mark.usefixtures("clean_memory")


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Stand in for the processes: twice the bytes for twice the tokens, naive STR has no room."""
    jobs: list[dict[str, Any]] = []
    times = {OWN: 4, BY_HAND: 5, TRL: 3, LIVE: 2, CACHED: 2, ANCHORS: 1}

    def child(job: dict[str, Any], allocator: dict[str, str]) -> dict[str, Any]:
        jobs.append({**job, **allocator})
        if job.get("builds_cache"):
            return {"status": "built"}
        if job["who"] == BY_HAND and job["tokens"] > 100:
            return {"status": "out of memory"}
        if job["who"] == TRL:
            return {"status": "failed: ImportError: no module named trl"}
        size = times[job["who"]] * job["tokens"]
        return {"status": "measured", "peak_bytes": size * 10**6, "seconds": float(size)}

    monkeypatch.setattr(longcontext, "_in_child", child)
    return jobs


def test_each_way_against_the_models_own_and_naive(children, tmp_path):
    figure = tmp_path / "longcontext.png"
    rows = json.loads(
        run("longcontext", "--tokens", 100, "--tokens", 200, "--rounds", 2, "--save", "--json",
            "--results", tmp_path, "--figure", figure)
    )  # fmt: skip
    assert figure.read_bytes().startswith(PNG)
    found = {(row["who"], row["tokens"]): row for row in rows}
    assert len(found) == 2 * len(WAYS) == len(read_rows(tmp_path / "longcontext.csv"))
    assert found[ANCHORS, 100]["peak_against_own"] == pytest.approx(1 / 4)
    assert found[ANCHORS, 100]["time_against_naive"] == pytest.approx(1 / 5)
    # what did not run has its reason and no number, and nothing is compared with it
    assert found[BY_HAND, 200]["status"] == "out of memory"
    assert "peak_bytes" not in found[BY_HAND, 200] and "peak_bytes" not in found[TRL, 100]
    assert "time_against_naive" not in found[ANCHORS, 200]
    assert found[ANCHORS, 200]["peak_against_own"] == pytest.approx(1 / 4)
    # in turn; the cache before any of them; what failed is not tried again
    first = [job["who"] for job in children if job["tokens"] == 200]
    assert first == [CACHED, *WAYS, *(who for who in WAYS if who not in (BY_HAND, TRL))]
    assert {job["THP_MEM_ALLOC_ENABLE"] for job in children if "builds_cache" not in job} == {"1"}
    table = run("longcontext", "--tokens", 200, "--way", BY_HAND, "--allocator", "default")
    assert "out of memory" in " ".join(table.split())
    assert "THP_MEM_ALLOC_ENABLE" not in children[-1]


def test_every_way_makes_the_loss_that_it_says(tmp_path):
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from str_kernels.integrations.loading.builtin_model import builtin_model_folder

    tokenizer = AutoTokenizer.from_pretrained(builtin_model_folder())
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 49152, (1, 40), generator=generator)
    found, passes = {}, {}
    for who in WAYS:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=49152, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
            num_attention_heads=2,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
        trained, loss_of = make_loss(model, who, rows, tokenizer, 2, tmp_path)
        passes[who] = sizes = []
        model.model.register_forward_pre_hook(
            lambda _, args, kwargs, sizes=sizes: sizes.append(kwargs["input_ids"].shape[0]),
            with_kwargs=True,
        )
        for parameter in trained:  # far from the reference, or the penalty would be 0
            with torch.no_grad():
                parameter.add_(torch.randn(parameter.shape))
        loss_of(rows).backward()
        found[who] = torch.cat([parameter.grad.flatten() for parameter in trained])

    def apart(first: str, second: str) -> float:
        return float((found[first] - found[second]).norm() / found[OWN].norm())

    assert apart(TRL, OWN) < 1e-4  # cross-entropy alone
    assert apart(CACHED, LIVE) < 1e-4
    assert apart(LIVE, OWN) > 1e-3  # has a penalty
    assert passes[ANCHORS] == [1, 4, 4] and passes[CACHED] == passes[OWN] == [1]
    assert passes[LIVE] == passes[BY_HAND] == [1, 1]
    assert 1e-7 < apart(ANCHORS, OWN) < 1e-2
    assert apart(BY_HAND, LIVE) < 0.2 * apart(BY_HAND, OWN)  # whose mean has one position more
    assert {path.name for path in tmp_path.iterdir()} == {"cache-40"}


def test_a_child_that_was_killed_says_so(monkeypatch):
    done = subprocess.CompletedProcess([], -9, "", "some warning")
    monkeypatch.setattr(process.subprocess, "run", lambda *_, **__: done)
    assert longcontext._in_child({"who": OWN}, {}) == {"status": "killed by SIGKILL"}


def test_a_cache_that_was_not_built_is_not_measured(children, monkeypatch):
    child = longcontext._in_child

    def no_cache(job: dict[str, Any], allocator: dict[str, str]) -> dict[str, Any]:
        return {"status": "failed: full"} if job.get("builds_cache") else child(job, allocator)

    monkeypatch.setattr(longcontext, "_in_child", no_cache)
    rows = longcontext.measure([100], [CACHED, ANCHORS])
    assert [row["status"] for row in rows] == ["failed: full", "measured"]


def test_no_room_at_all_is_said(children, monkeypatch):
    monkeypatch.setattr(longcontext, "available_bytes", lambda: 1000)
    with pytest.raises(RuntimeError, match="bytes free; got 1,000"):
        longcontext.measure([100])
    monkeypatch.setattr(longcontext, "available_bytes", lambda: 0)  # not known
    longcontext.measure([100], memory=7)
    assert children[-1]["limit"] == 7 * 10**9


def test_a_child_measures(tmp_path):
    job = {"tokens": 64, "rank": 2, "threads": 1, "folder": str(tmp_path), "limit": 0}
    found = main({**job, "who": ANCHORS})
    assert found["status"] == "measured" and found["seconds"] > 0
    assert 1e6 < found["peak_bytes"] < 1e9


def test_the_parts_add_up_to_what_the_planner_counts():
    from str_kernels.integrations.plan.planner import read_config
    from str_kernels.integrations.plan.step_memory import (
        checkpoint_layers,
        measure_step,
        meta_model,
    )

    (tokens,) = lengths = [600]
    rows = memory_parts.parts_of(lengths)
    model = meta_model(read_config("builtin"), torch.bfloat16, "sdpa", 8)
    checkpoint_layers(model)
    step = measure_step(model, 1, tokens, 96, padding=False, device="cpu")
    all_of = {row["phase"]: row["bytes"] for row in rows if row["part"] == "all"}
    assert all_of[memory_parts.LOSS] == pytest.approx(step.activations + step.own.peak, rel=1e-3)
    assert all_of[memory_parts.BACKWARD] == pytest.approx(step.backward, rel=1e-3)
    for phase in (memory_parts.FORWARD, memory_parts.LOSS, memory_parts.BACKWARD):
        mine = [row["bytes"] for row in rows if row["phase"] == phase and row["part"] != "all"]
        assert sum(mine) == pytest.approx(all_of[phase], rel=1e-2)
    (kept,) = (
        row for row in rows
        if row["part"] == memory_parts.BOUNDARIES and row["phase"] == memory_parts.FORWARD
    )  # fmt: skip
    assert kept["bytes_a_token"] == 30 * 576 * 2  # layers, width, bfloat16


def test_the_plan_of_a_small_model(monkeypatch):
    small = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 8, "tie_word_embeddings": True,
    }  # fmt: skip
    monkeypatch.setitem(longcontext_plan.SHAPES, "1B", small)
    short, long = longcontext_plan.planned([256, 65536], ["1B"])
    assert short["ours"] < short["own"] < short["naive"]
    assert longcontext_plan.smallest_card(short, "ours") == "24 GB"
    assert longcontext_plan.smallest_card(long, "naive") == "none"
    assert long["own"] > 65536 * 128256 * 4
