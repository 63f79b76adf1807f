"""Liger beside us: its layers' kernels are used and change nothing; its loss never takes our place.

Its kernels run here in Triton's interpreter, which lacks two things that they use: numbers with a
dtype, and CUDA's rsqrt. Both are supplied below.
"""

from __future__ import annotations

import os
from typing import Any

import numpy
import pytest
from loss_checks import ON_ROWS, TOKENS, Step, assert_close, attached_step, moved
from tiny_models import batch_of
from tiny_rows import Rows, trained
from transformers.models.llama import modeling_llama

from str_kernels import attach

pytest.importorskip("liger_kernel")  # which has no wheel for other systems than Linux's
from liger_kernel.transformers import apply_liger_kernel_to_llama

# Liger's forward calls transformers by names that have been renamed
pytestmark = pytest.mark.filterwarnings("ignore:`past_key_values` is deprecated:FutureWarning")
LAYERS = {"rope": True, "swiglu": True, "rms_norm": True}
NO_LOSS = {"cross_entropy": False, "fused_linear_cross_entropy": False}
FUSED = dict.fromkeys(LAYERS, False) | {"fused_linear_cross_entropy": True}


@pytest.fixture(autouse=True)
def unpatched(monkeypatch: Any) -> None:
    """Take back what Liger writes into transformers' module, after the test."""
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    llama = modeling_llama.LlamaForCausalLM
    monkeypatch.setattr(llama, "forward", llama.forward)


@pytest.fixture
def launched(monkeypatch: Any) -> set[str]:
    """Let the interpreter run Liger's kernels; return the names of those that ran."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("compiled kernels take no tensors on a CPU")
    import liger_kernel.ops.rms_norm
    import triton.language as tl
    from triton.runtime import interpreter

    names: set[str] = set()
    convert, launch = interpreter._implicit_cvt, interpreter.GridExecutor.__call__

    def convert_numbers(arg: Any) -> Any:
        if not isinstance(arg, float):
            return convert(arg)
        value = numpy.array([arg], dtype=numpy.float32)  # as a float is passed to a GPU
        return tl.tensor(interpreter.TensorHandle(value, tl.float32), tl.float32)

    def launch_and_note(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.add(self.fn.__name__)
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter, "_implicit_cvt", convert_numbers)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_and_note)
    monkeypatch.setattr(liger_kernel.ops.rms_norm, "rsqrt", lambda x: tl.rsqrt(x))
    return names


def step(model: Any, seed: int) -> Step:
    return attached_step(model, batch_of(seed))


def ran(launched: set[str]) -> bool:
    parts = ("rms_norm_forward", "rms_norm_backward", "swiglu_forward", "swiglu_backward", "rope")
    return all(any(part in name for name in launched) for part in parts)


def test_its_layers_change_nothing(launched: set[str], seed: int) -> None:
    expected, model = step(moved(seed), seed), moved(seed)
    apply_liger_kernel_to_llama(model=model.get_base_model(), **LAYERS, **NO_LOSS)
    got = step(model, seed)
    assert ran(launched), launched
    assert_close(got, expected)
    assert got.penalty == pytest.approx(expected.penalty, rel=1e-4) and got.penalty > 1e-3


def test_safety_trainer_with_its_layers(launched: set[str], seed: int, tmp_path: Any) -> None:
    plain, expected = trained(seed, tmp_path, 2, 1, steps=2)
    wanted = plain.evaluate(Rows(seed, 2))["eval_loss"]
    assert not launched
    options: Any = {"use_liger_kernel": True, "liger_kernel_config": LAYERS | NO_LOSS}
    trainer, log = trained(seed, tmp_path, 2, 1, steps=2, **options)
    assert ran(launched), launched
    for entry, other in zip(log, expected, strict=True):
        for name in ("loss", "safety/ce", "safety/penalty"):
            # AdamW's first steps divide gradients by themselves, so rounding grows a little
            assert entry[name] == pytest.approx(other[name], rel=1e-3, abs=1e-6), name
    assert log[-1]["safety/penalty"] > 0.0
    assert trainer.evaluate(Rows(seed, 2))["eval_loss"] == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("place", ["model", "class"])
def test_its_loss_put_in_before_gives_way(place: str, seed: int) -> None:
    expected = step(moved(seed), seed)
    if place == "class":
        apply_liger_kernel_to_llama(**FUSED)
    model = moved(seed)
    if place == "model":
        apply_liger_kernel_to_llama(model=model.get_base_model(), **FUSED)
    assert "liger_kernel" in model.get_base_model().forward.__module__
    got = step(model, seed)
    assert_close(got, expected)
    assert got.penalty > 1e-3


def test_its_loss_put_in_after_raises_or_is_not_reached(seed: int) -> None:
    model = moved(seed)
    expected = step(model, seed).loss
    with attach(model, TOKENS, **ON_ROWS) as handle:
        apply_liger_kernel_to_llama(**FUSED)  # of the class: the attached forward is the model's
        loss = model(**batch_of(seed)).loss
        assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
        last = handle.last
        apply_liger_kernel_to_llama(model=model.get_base_model(), **FUSED)
        with pytest.raises(RuntimeError, match="forward was replaced"):
            model(**batch_of(seed))
        assert handle.last is last
