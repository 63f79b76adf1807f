"""What a launch sees of the tensors it is given: they, their padding, and nothing beside them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="an optional dependency outside Linux")
from bench.ptx.launcher import View, executing
from bench.ptx.memory import Fault
from bench.ptx.program import Unsupported
from str_kernels.op import backends
from str_kernels.op.rows import rows_triton


def reaches(view: View, name: str, element: int, size: int = 4) -> bool:
    try:
        view.memory.locate(np.array([view.pointers[name] + element * size]), size)
    except Fault:
        return False
    return True


def test_rows_that_lie_apart_have_nothing_between_them() -> None:
    field = torch.zeros(5, 27)
    view = View({"Logits": field[1:4, 3:23], "Target": torch.zeros(3)}, 0)
    assert [reaches(view, "Logits", n) for n in (-1, 0, 19, 20, 26, 27, 46, 47)] == [
        False, True, True, False, False, True, True, False,
    ]  # fmt: skip
    assert reaches(view, "Target", 2) and not reaches(view, "Target", 3)


def test_padding_is_there_for_the_rows_alone() -> None:
    field = torch.zeros(2, 40)
    given = {"Logits": field[:, :20], "Ref": torch.zeros(2, 40)[:, :20]}
    view = View(given, 32)
    assert reaches(view, "Logits", 31) and not reaches(view, "Logits", 32)
    assert not reaches(view, "Ref", 20)


def test_addresses_are_as_aligned_as_the_tensors() -> None:
    field = torch.zeros(64)
    views = View({"a": field, "b": field[3:], "c": torch.empty(0)}, 0)
    assert views.pointers["b"] - views.pointers["a"] == 12  # one storage
    assert views.pointers["a"] % 16 == field.data_ptr() % 16 == 0
    assert not reaches(views, "c", 0)


def test_what_was_written_is_in_the_tensors() -> None:
    field = torch.zeros(3, 8)
    view = View({"Grad": field[:, :4]}, 0)
    at = view.memory.locate(np.array([view.pointers["Grad"] + 32]), 4)
    view.memory.store(at, [np.float32([7.0]).view(np.uint32)], 32)
    view.copy_back()
    assert field[1, 0] == 7.0 and field.sum() == 7.0


def test_new_memory_is_not_to_be_read() -> None:
    view = View({"Terms": torch.zeros(4), "Norm": torch.zeros(4)}, 0)
    view.forget("Terms")
    terms = view.memory.locate(np.array([view.pointers["Terms"]]), 4)
    with pytest.raises(Fault, match="nobody has written"):
        view.memory.load(terms, 1, 32)
    view.memory.load(view.memory.locate(np.array([view.pointers["Norm"]]), 4), 1, 32)


def test_a_tensor_of_another_form_is_refused() -> None:
    with pytest.raises(Unsupported, match="strides"):
        View({"x": torch.zeros(4, 4).t()[:, :3]}, 0)


def test_what_was_replaced_is_back_afterwards() -> None:
    before = rows_triton.CAPS_REGISTERS, backends._interpreting
    with executing():
        assert rows_triton.CAPS_REGISTERS
        assert backends.missing_for("triton", torch.device("cpu"), torch.float32) is None
    assert (rows_triton.CAPS_REGISTERS, backends._interpreting) == before
