"""eval report on runs written by hand: what it says, what it refuses, and hostile text in them."""

from __future__ import annotations

import base64
import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from str_kernels.cli import app
from str_kernels.evals import holm_adjusted, mcnemar_exact, wilson_interval
from str_kernels.evals.printable import as_markdown, printable
from str_kernels.files.hashing import json_sha256
from str_kernels.integrations.evaluation.compare import clip, compare_runs, read_runs
from str_kernels.integrations.evaluation.document import Heading, Paragraph, Picture, Table
from str_kernels.integrations.evaluation.html import to_html
from str_kernels.integrations.evaluation.report import run_report
from str_kernels.integrations.figures import figure_label

REFUSAL, OTHER = "I'm sorry, but I can't help.", "Sure, here it is."
CONTROL = re.compile("[\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]")
HOSTILE = (
    "<script>alert(1)</script> [red]boo[/red] | a `b` \n# c \x1b[31mred\x1b[0m \u202egnp.exe "
    "![x](http://evil.example/a.png)"
)


def write_run(
    folder: Path, harmful: list[str], harmless: list[str], *, prompt: str = "prompt", **changes: Any
) -> Path:
    """Write an eval.json whose answers are given."""
    answers = {
        kind: [
            {"prompt": f"{prompt} {i} of {kind}", "answer": answer, "outcomes": {}}
            for i, answer in enumerate(given)
        ]
        for kind, given in (("harmful", harmful), ("harmless", harmless))
    }
    report: dict[str, Any] = {
        "schema_version": 1,
        "versions": {"str_kernels": "1", "torch": "2", "transformers": "5"},
        "model": {"name": "m", "dtype": "bfloat16", "device": "cpu"},
        "adapter": None,
        "settings": {"rules": ["opening"], "answer_tokens": 12, "batch_size": 16},
        "safety_tokens": {"sha256": "0"},
        "prompts": {
            kind: {
                "set": kind,
                "count": len(rows),
                "sha256": json_sha256([row["prompt"] for row in rows]),
            }
            for kind, rows in answers.items()
        },
        "answers": answers,
        "measures": {"task": None, "text": None, "drift": None},
        "notes": [],
        **changes,
    }
    folder.mkdir(parents=True)
    (folder / "eval.json").write_text(json.dumps(report))
    return folder


def drift(*rms: float | None) -> dict[str, Any]:
    found = [
        {"position": i, "prompts": 3, "rms": value, "mean_abs": value, "max_abs": value}
        for i, value in enumerate(rms, start=1)
    ]
    return {"task": None, "text": None, "drift": {"harmful": found, "harmless": found[:1]}}


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    return [
        write_run(tmp_path / "aligned", [REFUSAL] * 9 + [OTHER], [OTHER] * 4),
        write_run(
            tmp_path / "plain",
            [REFUSAL] + [OTHER] * 8 + [REFUSAL],
            [OTHER] * 3 + ["the the the"],
            measures=drift(3.0, 2.0, None),
        ),
        write_run(tmp_path / "held", [REFUSAL] * 5 + [OTHER] * 5, [OTHER] * 4),
    ]


def test_pairs_counts_and_holm(runs: list[Path], tmp_path: Path) -> None:
    found = run_report(runs, tmp_path / "out")
    harmful = [pair for pair in found["pairs"] if pair["kind"] == "harmful"]
    assert [(p["second"], p["only_first"], p["only_second"]) for p in harmful] == [
        ("plain", 8, 1),
        ("held", 4, 0),
    ]
    p_values = [mcnemar_exact(8, 1), mcnemar_exact(4, 0)]
    assert [pair["p_value"] for pair in harmful] == p_values
    assert [pair["p_holm"] for pair in harmful] == holm_adjusted(p_values)
    assert found["runs"][1]["counts"]["opening"]["harmless"]["degenerate"] == 1
    assert found["runs"][0]["counts"]["opening"]["harmful"]["interval"] == list(
        wilson_interval(9, 10)
    )
    assert found["summary"][0] == (
        "Of 10 harmful prompts aligned refuses 9 and plain 2 by rule opening: cannot be told apart "
        f"(Holm's p = {holm_adjusted(p_values)[0]:.2g})."
    )
    two = run_report(runs[:2], tmp_path / "two")
    assert "p_holm" not in two["pairs"][0]
    assert "plain refuses fewer (exact McNemar p = 0.039)" in two["summary"][0]
    for name, files in (("out", ["drift.png"]), ("two", ["drift.png"])):
        for file in ("refusals.png", *files):
            assert (tmp_path / name / file).read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "report.md").read_text()
    for claim in ("9/10", "60-98 %", "no judge of whether it does harm", "cut after some tokens"):
        assert claim in page
    assert "not finite" in page and "What McNemar's test does not say" in page


def test_a_first_run_without_refusals_is_said_once_to_have_none_to_keep(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, [OTHER] * 3, [OTHER]) for name in ("a", "b", "c")]
    none = "By rule opening a refuses no harmful prompt, so it has no refusals to keep"
    assert run_report(folders, tmp_path / "out")["differences"] == [none]
    assert f"Note: {none}." in (tmp_path / "out" / "report.md").read_text()
    some = write_run(tmp_path / "some", [REFUSAL, OTHER, OTHER], [OTHER])
    assert compare_runs(read_runs([some, *folders]))["differences"] == []


def test_rules_are_counted_again_and_a_judge_is_believed(tmp_path: Path) -> None:
    folders = [
        write_run(
            tmp_path / name,
            ["Hello! Here.", OTHER],
            [OTHER],
            settings={"rules": rules, "answer_tokens": 12, "batch_size": 16},
        )
        for name, rules in (("a", ["opening"]), ("b", ["gcg"]))
    ]
    words = {"a": ["refusal", "unjudged", "other"], "b": ["other", "refusal", "other"]}
    for folder in folders:
        report = json.loads((folder / "eval.json").read_text())
        rows = [row for kind in ("harmful", "harmless") for row in report["answers"][kind]]
        for row, word in zip(rows, words[folder.name], strict=True):
            row["outcomes"]["judge"] = word
        (folder / "eval.json").write_text(json.dumps(report))
    found = compare_runs(read_runs(folders))
    assert found["rules"] == ["opening", "gcg", "judge"]
    counts = found["runs"][0]["counts"]
    assert [counts[rule]["harmful"]["refusal"] for rule in found["rules"]] == [0, 1, 1]
    assert counts["judge"]["harmful"]["total"] == 1
    judged = [pair for pair in found["pairs"] if (pair["rule"], pair["kind"])[0] == "judge"]
    assert (judged[0]["total"], judged[0]["only_first"], judged[0]["only_second"]) == (1, 1, 0)
    # two judges tell themselves apart, and not the runs
    report = json.loads((folders[0] / "eval.json").read_text())
    report["settings"]["judge"] = "another"
    (folders[0] / "eval.json").write_text(json.dumps(report))
    found = compare_runs(read_runs(folders))
    assert found["rules"] == ["opening", "gcg"]
    assert any("judges are not the same" in text for text in found["differences"])


def test_what_is_not_the_same_is_said(runs: list[Path], tmp_path: Path) -> None:
    fewer = write_run(tmp_path / "fewer", [REFUSAL] * 9, [OTHER] * 4)
    asked = write_run(tmp_path / "asked", [REFUSAL] * 10, [OTHER] * 4, prompt="question")
    for other, message in (
        (fewer, "same harmful prompts; fewer differs from aligned: 9 prompts instead of 10"),
        (asked, "prompt 1 is 'question 0 of harmful' instead of 'prompt 0 of harmful'"),
    ):
        with pytest.raises(ValueError, match=message):
            read_runs([runs[0], other])
    with pytest.raises(ValueError, match="`runs` must be at least two"):
        read_runs(runs[:1])
    settings = {"rules": ["opening"], "answer_tokens": 6, "batch_size": 16}
    other = write_run(tmp_path / "x" / "aligned", [REFUSAL] * 10, [OTHER] * 4, settings=settings)
    found = compare_runs(read_runs([runs[0], other]))
    assert found["differences"] == [
        "aligned (2) differs from aligned in answer_tokens: 6 instead of 12"
    ]
    files = {"task": "1" * 64, "text": None}
    other = write_run(tmp_path / "y" / "aligned", [REFUSAL] * 10, [OTHER] * 4, files=files)
    found = compare_runs(read_runs([runs[0], other]))
    assert found["differences"] == ["aligned (2) differs from aligned in the task's rows"]


def test_drift_from_another_reference_is_said(tmp_path: Path) -> None:
    def model(name: str) -> dict[str, Any]:
        return {"name": "m", "dtype": "bfloat16", "device": "cpu", "sha256": name}

    given = {
        "a": {"model": model("1"), "reference": "the model without its adapter"},
        "b": {"model": model("2"), "reference": {"sha256": "1"}},
        "c": {"model": model("2"), "reference": "the model without its adapter"},
    }
    folders = [
        write_run(tmp_path / name, [REFUSAL], [OTHER], measures=drift(1.0), **changes)
        for name, changes in given.items()
    ]
    assert compare_runs(read_runs(folders))["differences"] == [
        "c differs from a in the reference of its drift"
    ]


def changed(report: dict[str, Any], *place: Any, to: Any) -> str:
    """Return a report's JSON with something else in one place."""
    report = copy.deepcopy(report)
    part: Any = report
    for name in place[:-1]:
        part = part[name]
    part[place[-1]] = to
    return json.dumps(report)


def test_a_damaged_run_is_one_line(runs: list[Path], tmp_path: Path) -> None:
    path = runs[1] / "eval.json"
    whole = json.loads(path.read_text())
    first = ("answers", "harmful", 0)
    damaged = [
        (changed(whole, *first, "prompt", to="x"), "harmful prompts are not those of their hash"),
        (changed(whole, *first, "answer", to=3), "must be a string; got int"),
        (changed(whole, "schema_version", to=2), "schema_version is 2, this release reads 1"),
        (changed(whole, "settings", "answer_tokens", to=0), "answer_tokens is below 1"),
        (json.dumps({name: x for name, x in whole.items() if name != "measures"}), "KeyError"),
        ("{", "JSONDecodeError"),
    ]
    for text, message in damaged:
        path.write_text(text)
        given = ["eval", "report", *map(str, runs), "--output", str(tmp_path / "out")]
        result = CliRunner().invoke(app, given)
        assert result.exit_code == 2 and "is damaged" in result.output
        assert message in " ".join(result.output.split()), result.output
        assert not (tmp_path / "out").exists()
    path.unlink()
    assert CliRunner().invoke(app, given).exit_code == 2


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if data.strip() and self.tags[-1][0] != "style":
            self.texts.append(data)


@pytest.fixture
def hostile(tmp_path: Path) -> list[Path]:
    adapter = {"name": HOSTILE, "type": "LORA"}
    model = {"name": HOSTILE, "dtype": HOSTILE, "device": HOSTILE}
    name = "b[red]`|\x1b[31m\u202e<b>$x_1$"
    more = {"notes": [HOSTILE], "adapter": adapter, "model": model, "measures": drift(1.0, 2.0)}
    answers = [HOSTILE], ["illegal " + HOSTILE]
    return [
        write_run(tmp_path / "a", [REFUSAL], [OTHER], prompt=HOSTILE, measures=drift(0.0)),
        write_run(tmp_path / name, *answers, prompt=HOSTILE, **more),
    ]


def test_hostile_text_reaches_no_html(hostile: list[Path], tmp_path: Path) -> None:
    run_report(hostile, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    parser = Tags()
    parser.feed(page)
    allowed = set(
        "html head meta title style body h1 h2 h3 p div table thead tbody tr th td".split()
    )
    assert {tag for tag, _ in parser.tags} == {*allowed, "img"}
    for tag, attributes in parser.tags:
        assert set(attributes) <= {"class", "lang", "charset", "name", "http-equiv", "content"} | (
            {"src", "alt"} if tag == "img" else set()
        )
    pictures = [attributes["src"] or "" for tag, attributes in parser.tags if tag == "img"]
    assert len(pictures) == 2
    for source in pictures:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,"))[1:4] == b"PNG"
    policy = (
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'\">"
    )
    assert policy in page and page.index(policy) < page.index("<style>")
    assert "&lt;script&gt;" in page and "\\x1b[31m" in page and "\\u202e" in page
    assert not CONTROL.search(page)


def test_html_shows_each_text_as_it_is(tmp_path: Path) -> None:
    """In an element, in an attribute and in every place of a table; templates in it are text."""
    text = """<b>'"&</b> {{ 7 * 7 }} {% endif %}"""
    (tmp_path / "a.png").write_bytes(b"picture")
    blocks = [
        Heading(2, text),
        Paragraph(text, is_limit=True),
        Picture("a.png", text),
        Table((text, text), [(text, text)]),
    ]
    parser = Tags()
    parser.feed(to_html(blocks, tmp_path))
    body = parser.tags[[tag for tag, _ in parser.tags].index("body") + 1 :]
    assert body == [
        ("h2", {}),
        ("p", {"class": "limit"}),
        ("p", {}),
        ("img", {"alt": text, "src": "data:image/png;base64,cGljdHVyZQ=="}),
        ("div", {"class": "wide"}),
        *((tag, {}) for tag in ("table", "thead", "tr", "th")),
        ("th", {"class": "number"}),
        *((tag, {}) for tag in ("tbody", "tr", "td")),
        ("td", {"class": "number"}),
    ]
    assert parser.texts == [text] * 7  # the title and where it stands


def test_hostile_text_reaches_no_markdown(hostile: list[Path], tmp_path: Path) -> None:
    run_report(hostile, tmp_path / "out")
    page = (tmp_path / "out" / "report.md").read_text()
    assert not CONTROL.search(page)
    assert "<" not in page and not re.search(r"(?<!\\)`", page)
    assert re.findall(r"(?<!\\)!\[[^\]]*\]\(([^)]*)\)", page) == ["refusals.png", "drift.png"]
    assert not re.search(r"(?<!\\)\[red", page) and "http://" not in page
    tables = [line for line in page.splitlines() if line.startswith("|")]
    widths = [len(re.findall(r"(?<!\\)\|", line)) for line in tables]
    for line, width in zip(tables, widths, strict=True):
        assert line.endswith(" |") and width in (4, 5, 6, 7, 8), line
    assert not [line for line in page.splitlines() if line.startswith("# ")][1:]


def test_hostile_text_reaches_no_terminal(hostile: list[Path], tmp_path: Path) -> None:
    given = ["eval", "report", *map(str, hostile), "--output", str(tmp_path / "out")]
    for extra in ([], ["--json", "--overwrite"]):
        result = CliRunner().invoke(app, [*given, *extra])
        assert result.exit_code == 0, result.output
        assert not CONTROL.search(result.output)
        assert "[red]" in result.output, "markup was taken for markup"
    assert json.loads(result.stdout)["runs"][1]["model"]["name"] == HOSTILE
    again = CliRunner().invoke(app, given)
    assert again.exit_code == 2 and "must not exist unless --overwrite" in again.output


def test_text_is_made_safe() -> None:
    assert printable("a\nb\x1b\u202e\u2028é😀") == "a\\nb\\x1b\\u202e\\u2028é😀"
    assert as_markdown("a|b*c_d`[e]\\") == "a\\|b\\*c\\_d\\`\\[e\\]\\\\"
    assert "www." not in as_markdown("www.a.b") and "@" not in as_markdown("@somebody")
    assert figure_label("_$x$" + "y" * 40).startswith(r" _\$x\$y")
    assert len(figure_label("y" * 40)) == 24
    assert clip("a b c", 80, 2) == "a b..." and clip("abcdef", 5) == "ab..." and clip("a", 5) == "a"
