"""`make ptx`: what its portions are, and that it goes on where it was stopped."""

from __future__ import annotations

import every
import pytest


def test_portions_are_all_codes_mutants_and_marked_files() -> None:
    found = list(every.portions(every.TARGETS))
    names = [portion.name for portion in found]
    assert len(set(names)) == len(names)
    for target in every.TARGETS:
        mine = [p for p in found if p.env["STR_PTX"] == target]
        codes = {p.env["STR_PTX_PORTION"] for p in mine if p.name.startswith("codes")}
        assert codes == {f"{n}/{every.CODES}" for n in range(every.CODES)}
        assert f"mutants {target}" in names
        files = {p.arguments[0] for p in mine if p.name.startswith("gpu")}
        assert {"tests/rows/test_triton.py", "tests/rows/test_ops.py"} <= files
        assert "tests/bench/test_bench.py" not in files


def test_what_has_passed_is_not_run_again(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(every, "LINES", tmp_path / "folder" / "ptx.jsonl")
    ran: list[str] = []

    def run(portion, seconds):
        ran.append(portion.name)
        failed = int(portion.name == "codes sm_80 2/12" and len(ran) < 5)
        counts = {"passed": 3, "failed": failed, "skipped": 0}
        status = "failed" if failed else "passed"
        return {"portion": portion.name, "status": status, "seconds": 1.0, "failures": [], **counts}

    monkeypatch.setattr(every, "run", run)
    monkeypatch.setattr("sys.argv", ["every.py", "--only", "codes sm_80"])
    assert every.main() == 1
    first = len(ran)
    assert first == every.CODES
    assert every.main() == 0
    assert ran[first:] == ["codes sm_80 2/12"]  # what failed alone
    assert capsys.readouterr().out.splitlines()[-1].startswith("36 passed, 0 failed")
    monkeypatch.setattr(every, "sources", lambda: "others")
    every.main()
    assert len(ran) == first + 1 + every.CODES


def test_a_portion_without_time_is_left(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(every, "LINES", tmp_path / "ptx.jsonl")
    monkeypatch.setattr(every, "run", lambda portion, seconds: pytest.fail("there is no time"))
    monkeypatch.setattr("sys.argv", ["every.py", "--only", "mutants", "--minutes", "0"])
    assert every.main() == 1
