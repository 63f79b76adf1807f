"""Reading training rows, and which of their tokens carry labels."""

from __future__ import annotations

import csv
import dataclasses
import json

import pytest
from tiny_tokenizer import chat_tokenizer

from str_kernels.integrations.chat.answer_spans import render_with_answers
from str_kernels.integrations.chat.rows import Example, encode_examples, encode_rows, read_examples

datasets = pytest.importorskip("datasets")  # which comes with trl

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
    assert plain.where == "rows.jsonl, line 3"


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("{broken\n", "Expecting property name"),
        ("[1]\n", "must be a JSON object; got list"),
        ({"txt": "x"}, r"got the keys \['txt'\]"),
        ({"text": ""}, "must not be empty"),
        ({"messages": [USER, {**ASSISTANT, "tool_calls": ["x"]}]}, '"tool_calls" must be a list'),
        ({"messages": [USER, ASSISTANT], "tools": 5}, '"tools" must be a list; got int'),
        ({"messages": [USER, ASSISTANT], "chat_template_kwargs": "x"}, "must be an object"),
        (
            {"messages": [USER, ASSISTANT], "chat_template_kwargs": {"tokenize": True}},
            "must be options of the template",
        ),
        ({"conversations": None}, '"conversations" must be a list; got NoneType'),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, '"history" must be a list'),
        ({"chosen": "a", "rejected": "b"}, "are preferences"),
        ({"messages": [USER, {**ASSISTANT, "weight": 0.5}]}, '"weight" must be 0 or 1'),
        ({"conversations": [{"from": "robot", "value": "x"}]}, '"from" must be one of'),
        ({"messages": [{**USER, "content": [{"type": "image"}]}, ASSISTANT]}, "got a image"),
        ('{"prompt": "\\ud83d", "completion": "x"}\n', "half of a character"),
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
    with pytest.raises(ValueError, match="`data` must be a readable file"):
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


def test_a_whole_text_is_labelled():
    tokenizer = chat_tokenizer()
    (row,) = encode_examples(tokenizer, [Example(completion="hello day", form="text")], None)
    assert tokenizer.decode(row["labels"]) == "hello day <end>"


def test_cut_rows_and_rows_without_a_label():
    tokenizer = chat_tokenizer()
    example = Example(messages=(USER, ASSISTANT), where="f, line 4")
    (row,) = encode_examples(tokenizer, [example], max_length=5)
    assert len(row["input_ids"]) == len(row["labels"]) == 5
    with pytest.raises(ValueError, match=r"`max_length`.*f, line 4"):
        encode_examples(tokenizer, [example], max_length=4)
    longer = dataclasses.replace(example, messages=(USER, USER, ASSISTANT), where="f, line 5")
    found = encode_rows(tokenizer, [example, longer], max_length=5)
    assert (len(found.rows), found.cut, found.dropped) == (1, 1, ("f, line 5",))
    with pytest.raises(ValueError, match="f, line 5 and 1 others"):
        encode_rows(tokenizer, [longer, longer], max_length=5)


def test_a_template_that_rewrites_earlier_turns():
    """The turn before the last is rendered otherwise when the last is there."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<user> ' if loop.last else '' }}{{ m.content }} {% endfor %}"
    )
    (row,) = encode_examples(tokenizer, [Example(messages=(USER, ASSISTANT))], 99)
    assert tokenizer.decode([label for label in row["labels"] if label != -100]) == "good day"
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template; got messages in f, line 9"):
        encode_examples(tokenizer, [Example(messages=(USER, ASSISTANT), where="f, line 9")], 99)


def labelled(tokenizer, example):
    (row,) = encode_examples(tokenizer, [example], 99)
    return tokenizer.decode([label for label in row["labels"] if label != -100])


def test_turns_of_weight_0_and_turns_of_the_prompt_carry_no_label(tmp_path):
    first, last = {**ASSISTANT, "weight": 0}, {**ASSISTANT, "content": "bye"}
    path = write(
        tmp_path / "rows.jsonl",
        {"messages": [USER, first, USER, last]},
        {"prompt": [USER, ASSISTANT, USER], "completion": [last]},
        {"messages": [USER, first]},
    )
    one, other, none = read_examples(path)
    tokenizer = chat_tokenizer()
    assert labelled(tokenizer, one) == labelled(tokenizer, other) == "bye <end>"
    assert encode_rows(tokenizer, [one, none], 99).dropped == ("rows.jsonl, line 3",)


def test_rows_of_sharegpt_and_alpaca(tmp_path):
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]
    path = write(
        tmp_path / "rows.jsonl",
        {"conversations": turns},
        {"instruction": "hello", "input": "", "output": "good day"},
        {"instruction": "what is", "input": "1", "output": "2", "history": [["hello", "bye"]]},
    )
    share, alpaca, long = read_examples(path)
    assert share.messages == alpaca.messages == (USER, ASSISTANT)
    assert [turn["content"] for turn in long.messages] == ["hello", "bye", "what is\n\n1", "2"]
    found = encode_rows(chat_tokenizer(), [share, alpaca, long], 99)
    assert found.forms == {"ShareGPT": 1, "Alpaca": 2}


def test_the_same_rows_from_every_kind_of_file(tmp_path, monkeypatch):
    rows = [{"prompt": "what is 1", "completion": "2"}, {"prompt": "bye", "completion": "bye, 1"}]
    chats = [
        {"messages": [USER, {**ASSISTANT, "content": "good"}]},
        {"messages": [USER, ASSISTANT]},
    ]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    write(tmp_path / "rows.jsonl", *rows)
    (tmp_path / "mark.jsonl").write_bytes(b"\xef\xbb\xbf" + (tmp_path / "rows.jsonl").read_bytes())
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.csv").write_text('prompt,completion\r\nwhat is 1,2\r\nbye,"bye, 1"\r\n')
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    expected = [(row["prompt"], row["completion"]) for row in rows]
    for name in ("rows.jsonl", "mark.jsonl", "rows.json", "rows.csv", "rows.parquet", "saved"):
        examples = read_examples(tmp_path / name)
        assert [(one.prompt, one.completion) for one in examples] == expected, name
    datasets.DatasetDict({"a": datasets.Dataset.from_list(chats)}).save_to_disk(tmp_path / "split")
    assert [one.messages for one in read_examples(tmp_path / "split", "a")] == [
        tuple(row["messages"]) for row in chats
    ]
    with pytest.raises(ValueError, match="`data_split` must be one of a; got 'train'"):
        read_examples(tmp_path / "split")
    with pytest.raises(ValueError, match=r"`data` must hold training rows; rows.csv, line 2"):
        (tmp_path / "rows.csv").write_text('prompt,completion\nx,"y"z\n')
        read_examples(tmp_path / "rows.csv")


def test_a_hub_id_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *_, **__: (_ for _ in ()).throw(OSError("no such\ndata"))
    )
    with pytest.raises(ValueError, match=r"got someone/rows: no such$"):
        read_examples("someone/rows")


def test_calls_and_tools_reach_the_template(tmp_path):
    arguments = {"city": "Oslo"}
    call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
    other = {"type": "function", "function": {"name": "time", "arguments": {"zone": 1}}}
    path = write(
        tmp_path / "rows.jsonl",
        *(
            {
                "messages": [USER, {"role": "assistant", "content": None, "tool_calls": [one]}],
                "tools": json.dumps([{"name": "weather"}]),
            }
            for one in (call, other)
        ),
    )
    first, second = read_examples(path)
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{{ tools[0].name }} {% for m in messages %}<{{ m.role }}> {{ m.content }}"
        "{% for c in m.tool_calls %}{{ c.function.name }} {{ c.function.arguments | tojson }}"
        "{% endfor %} <end> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"
    )
    text, spans = render_with_answers(tokenizer, first.messages, **first.options)
    assert [text[a:b] for a, b in spans.values()] == ['weather {"city": "Oslo"} <end> ']
    assert render_with_answers(tokenizer, second.messages, **second.options)[0].count("zone") == 1
    tokenizer.chat_template = tokenizer.chat_template.replace("c.function.name", "''")
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: .*leaves out the tool_calls"):
        encode_rows(tokenizer, [second], 99)


def test_a_long_field_of_a_csv_and_a_short_file_after_it(tmp_path):
    long = "word " * 40_000  # past csv's own limit of 131,072 characters
    (tmp_path / "long.csv").write_text(f"prompt,completion\nhello,{long}\n")
    (tmp_path / "short.csv").write_text("prompt,completion\nhello,bye\n")
    before = csv.field_size_limit()
    try:
        assert read_examples(tmp_path / "long.csv")[0].completion == long
        read_examples(tmp_path / "short.csv")
        assert csv.field_size_limit() > len(long)  # what others read is not cut down
    finally:
        csv.field_size_limit(before)


def test_a_tokenizer_that_cannot_say_where_its_tokens_are():
    class Slow:
        is_fast = False

        def __init__(self, of):
            self.of = of

        def __getattr__(self, name):
            return getattr(self.of, name)

    turns = (USER, ASSISTANT, USER, {**ASSISTANT, "content": "bye"})
    examples = [Example(messages=turns), Example(messages=turns, unlabelled=frozenset({1}))]
    tokenizer = chat_tokenizer()
    assert encode_rows(Slow(tokenizer), examples, 99) == encode_rows(tokenizer, examples, 99)
