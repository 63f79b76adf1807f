"""Reading training rows, and which of their tokens carry labels."""

from __future__ import annotations

import json

import pytest
from tiny_tokenizer import chat_tokenizer

from str_kernels.integrations.chat_data import Example, encode_examples, read_examples

USER = {"role": "user", "content": "hello"}
ASSISTANT = {"role": "assistant", "content": "good day"}


def write(path, *rows):
    path.write_text(
        "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
    )
    return path


def test_reads_both_kinds_and_skips_blank_lines(tmp_path):
    path = write(
        tmp_path / "rows.jsonl",
        {"messages": [USER, ASSISTANT], "id": 7},
        "\n",
        {"prompt": "a b", "completion": " c"},
        {"prompt": [USER], "completion": [ASSISTANT]},
    )
    chat, plain, split = read_examples(path)
    assert chat.messages == split.messages == (USER, ASSISTANT)
    assert (plain.messages, plain.prompt, plain.completion) == (None, "a b", " c")
    assert plain.where == "rows.jsonl line 3"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{broken\n", "Expecting property name"),
        ("[1]\n", "must be a JSON object; got list"),
        ({"text": "x"}, r"got \['text'\]"),
        ({"messages": []}, "at least one turn"),
        ({"messages": [{"role": "robot", "content": "x"}]}, '"role"'),
        ({"messages": [{"role": "user", "content": 3}]}, '"content" that is a string'),
        ({"messages": [USER]}, "an assistant turn"),
        ({"prompt": 1, "completion": "x"}, '"prompt" must be a string; got int'),
        ({"prompt": "x", "completion": ""}, "must not be empty"),
        ('{"prompt": "\xff", "completion": "x"}\n', "codec"),
    ],
)
def test_a_broken_row_is_named(tmp_path, row, reason):
    path = tmp_path / "rows.jsonl"
    text = row if isinstance(row, str) else json.dumps(row) + "\n"
    good = json.dumps({"messages": [USER, ASSISTANT]}) + "\n"
    path.write_bytes(good.encode() + text.encode("latin-1"))
    with pytest.raises(ValueError, match=rf"`data`.*rows.jsonl, line 2: .*{reason}"):
        read_examples(path)


def test_missing_and_empty_files(tmp_path):
    with pytest.raises(ValueError, match="`data` must be a readable JSONL file"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="at least one row"):
        read_examples(write(tmp_path / "empty.jsonl", "\n"))


def test_only_assistant_turns_carry_labels():
    tokenizer = chat_tokenizer()
    turns = (
        USER,
        ASSISTANT,
        {"role": "user", "content": "thanks"},
        {**ASSISTANT, "content": "bye"},
    )
    (row,) = encode_examples(tokenizer, [Example(messages=turns)], max_length=99)
    labelled = [label for label in row["labels"] if label != -100]
    assert tokenizer.decode(labelled) == "good day <end> bye <end>"
    assert [
        i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label != -100
    ] == labelled
    text = tokenizer.decode(row["input_ids"])
    assert text == (
        "<user> hello <end> <assistant> good day <end> <user> thanks <end> <assistant> bye <end>"
    )


def test_plain_rows_end_with_eos_and_label_the_completion():
    tokenizer = chat_tokenizer()
    example = Example(prompt="hello good", completion=" day")
    (row,) = encode_examples(tokenizer, [example], max_length=99)
    assert tokenizer.decode(row["input_ids"]) == "hello good day <end>"
    assert row["labels"][:2] == [-100, -100] and -100 not in row["labels"][2:]


def test_cut_rows_and_rows_without_a_label():
    tokenizer = chat_tokenizer()
    example = Example(messages=(USER, ASSISTANT), where="f line 4")
    (row,) = encode_examples(tokenizer, [example], max_length=5)
    assert len(row["input_ids"]) == len(row["labels"]) == 5
    with pytest.raises(ValueError, match=r"`max_length`.*f line 4"):
        encode_examples(tokenizer, [example], max_length=4)


def test_templates_that_rewrite_history_are_refused():
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<user> ' if loop.last else '' }}{{ m.content }} {% endfor %}"
    )
    with pytest.raises(ValueError, match="changes earlier turns of f line 9"):
        encode_examples(tokenizer, [Example(messages=(USER, ASSISTANT), where="f line 9")], 99)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template; got messages in f line 9"):
        encode_examples(tokenizer, [Example(messages=(USER, ASSISTANT), where="f line 9")], 99)
