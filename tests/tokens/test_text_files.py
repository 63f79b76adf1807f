"""Files of people's own as editors write them: marks, other encodings, halves of pairs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_safety_tokens import WORDS, WordTokenizer

from str_kernels import SafetyTokens
from str_kernels.evals import load_prompts
from str_kernels.files.text_files import read_text_file

MARK = b"\xef\xbb\xbf"
CP1252 = "fine\nI can’t help.\n".encode("cp1252")  # noqa: RUF001


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    tokenizer = WordTokenizer(WORDS)
    plain, marked = tmp_path / "plain.txt", tmp_path / "marked.txt"
    plain.write_bytes(b"# a comment\r\nI cannot help.\r\n")
    marked.write_bytes(MARK + plain.read_bytes())
    assert read_text_file("it", marked) == read_text_file("it", plain)
    found = [SafetyTokens.from_templates(tokenizer, file) for file in (plain, marked)]
    assert found[0].pieces == found[1].pieces

    found[0].save(tmp_path / "tokens.json")
    (tmp_path / "marked.json").write_bytes(MARK + (tmp_path / "tokens.json").read_bytes())
    assert SafetyTokens.load(tmp_path / "marked.json").fingerprint == found[0].fingerprint

    rows = [{"prompt": "One?"}, {"prompt": "Two?"}]
    for name, text in (
        ("rows.jsonl", "\r\n".join(map(json.dumps, rows))),
        ("rows.csv", "prompt\r\nOne?\r\nTwo?\r\n"),
    ):
        (tmp_path / name).write_bytes(MARK + text.encode())
        assert [row.prompt for row in load_prompts(tmp_path / name)] == ["One?", "Two?"]


def test_another_encoding_is_refused_by_file_and_line(tmp_path: Path) -> None:
    file = tmp_path / "words.txt"
    file.write_bytes(CP1252)
    with pytest.raises(ValueError, match=r"^`templates` must be .*words.txt, line 2, .* 0x92"):
        SafetyTokens.from_templates(WordTokenizer(WORDS), file)
    file.write_bytes("I cannot help.".encode("utf-16"))
    with pytest.raises(ValueError, match=r"words.txt is UTF-16"):
        SafetyTokens.from_templates(WordTokenizer(WORDS), file)
    for name, start in (("rows.jsonl", b'{"prompt": "a"}\n\n'), ("rows.csv", b"prompt\na\n")):
        file = tmp_path / name
        file.write_bytes(start + b'{"prompt": "\x92"}\n')
        with pytest.raises(ValueError, match=rf"^`name_or_path` .*{name}, line 3, .* 0x92"):
            load_prompts(file)


def test_half_a_character_is_refused(tmp_path: Path) -> None:
    for templates in (["fine", "I \ud83d cannot"], ["fine", 3]):
        with pytest.raises(ValueError, match=r"^`templates` must be text; got"):
            SafetyTokens.from_templates(WordTokenizer(WORDS), templates)
    file = tmp_path / "words.txt"
    file.write_bytes(b"fine\nI \xed\xa0\xbd cannot\n")  # how some programs write one
    with pytest.raises(ValueError, match=r"words.txt, line 2, .* 0xed"):
        SafetyTokens.from_templates(WordTokenizer(WORDS), file)
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "fine"}\n{"prompt": "I \\ud83d cannot"}\n')
    with pytest.raises(ValueError, match=r'rows.jsonl, line 2: "prompt" must be text'):
        load_prompts(file)
    file.write_text('{"prompt": "\\ud83d\\ude00"}\n')  # a whole pair
    assert load_prompts(file)[0].prompt == "\U0001f600"


def test_only_line_ends_end_a_row(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_bytes('{"prompt": "a\u2028b\x85c"}\r{"prompt": "d"}\r\n'.encode())
    assert [row.prompt for row in load_prompts(file)] == ["a\u2028b\x85c", "d"]
    file.write_text('{"prompt": "a"}\n' + "[" * 100_000)
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: "):
        load_prompts(file)
