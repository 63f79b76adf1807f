"""SafetyTokens: how they are chosen, what a file of them survives, and which tokenizer they fit."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import str_kernels
from str_kernels import SafetyTokens
from str_kernels.files import atomic
from str_kernels.tokens.safety_tokens import SCHEMA_VERSION
from str_kernels.tokens.tokenizer import tokenizer_hash


class WordTokenizer:
    """Words with the space before them, and single other characters; unknown ones are <unk>.

    Like a byte-level BPE: "I" at a sentence's start and " I" inside one are two tokens.
    """

    def __init__(self, words: list[str], special: tuple[str, ...] = ("<s>", "<unk>")) -> None:
        self.names = [*special, *dict.fromkeys(words)]
        self.all_special_ids = list(range(len(special)))
        self.unknown = len(special) - 1

    def __len__(self) -> int:
        return len(self.names)

    def get_vocab(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.names)}

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        vocab = self.get_vocab()
        pieces = re.findall(r" ?\w+|.", text, re.S)
        return [0] * add_special_tokens + [vocab.get(piece, self.unknown) for piece in pieces]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(self.names[i] for i in token_ids)


WORDS = "I| I|'|m| sorry|Sorry| Sorry|,| cannot| help|.| cat| dog".split("|")


@pytest.fixture
def tokenizer() -> WordTokenizer:
    return WordTokenizer(WORDS)


def test_templates_give_their_tokens_at_a_start_and_inside(tokenizer) -> None:
    tokens = SafetyTokens.from_templates(tokenizer, ["I cannot help.", "Sorry, I cannot help."])
    # in the order of appearance: each sentence as it is, then after a space
    wanted = ["I", " cannot", " help", ".", " I", "Sorry", ",", " Sorry"]
    assert list(tokens.pieces) == wanted
    assert tokens.ids.tolist() == [tokenizer.get_vocab()[word] for word in wanted]
    assert tokens.ids.dtype == torch.int64
    assert (tokens.vocab_size, tokens.tokenizer_hash) == (15, tokenizer_hash(tokenizer))
    assert "2 sentences" in tokens.source and tokens.id_weights is None


def test_special_tokens_are_left_out(tokenizer) -> None:
    """Unknown words become <unk>, which is special here; <s> is not asked for."""
    tokens = SafetyTokens.from_templates(tokenizer, ["I quizzically cannot"])
    assert list(tokens.pieces) == ["I", " cannot", " I"]
    with pytest.raises(ValueError, match=r"^`templates` must leave at least one token; got none"):
        SafetyTokens.from_templates(tokenizer, ["zebra"])


def test_only_the_first_tokens_of_a_template(tokenizer) -> None:
    tokens = SafetyTokens.from_templates(tokenizer, ["I cannot help."], tokens_per_template=2)
    assert list(tokens.pieces) == ["I", " cannot", " I"]
    assert "first 2 tokens" in tokens.source
    with pytest.raises(ValueError, match=r"^`tokens_per_template` must be >= 1; got 0"):
        SafetyTokens.from_templates(tokenizer, ["I"], tokens_per_template=0)


def test_templates_from_a_file(tokenizer, tmp_path) -> None:
    path = tmp_path / "refusals.txt"
    path.write_text("# how we refuse\n\n  Sorry, I cannot help.  \n# cat\n", encoding="utf-8")
    for given in (path, str(path)):
        tokens = SafetyTokens.from_templates(tokenizer, given)
        assert list(tokens.pieces) == ["Sorry", ",", " I", " cannot", " help", ".", " Sorry"]
        assert "refusals.txt" in tokens.source
    path.write_text("# nothing\n", encoding="utf-8")
    for empty in (path, []):
        with pytest.raises(ValueError, match=r"^`templates` must hold at least one sentence"):
            SafetyTokens.from_templates(tokenizer, empty)


def test_the_built_in_templates() -> None:
    text = (Path(str_kernels.__file__).parent / "data/refusal_templates.txt").read_text("utf-8")
    lines = [line for line in text.splitlines() if line.strip() and line[0] != "#"]
    words = [word for line in lines for word in re.findall(r" ?\w+|.", line + " " + line)]
    tokenizer = WordTokenizer([*words, " #"])
    tokens = SafetyTokens.from_templates(tokenizer)
    assert len(tokens) > 20 and "built-in" in tokens.source
    assert {"I", " cannot"} <= set(tokens.pieces) and " #" not in tokens.pieces


def test_random_tokens_are_the_seeds_alone(tokenizer) -> None:
    tokens = SafetyTokens.random(tokenizer, 5, seed=3)
    assert torch.equal(tokens.ids, SafetyTokens.random(tokenizer, 5, seed=3).ids)
    assert tokens.ids.tolist() == sorted(set(tokens.ids.tolist())) and len(tokens) == 5
    assert any(
        not torch.equal(tokens.ids, SafetyTokens.random(tokenizer, 5, seed=seed).ids)
        for seed in range(4, 9)
    )
    assert tokens.source == "random, seed 3" and len(tokens.pieces) == 5


def test_random_tokens_are_ordinary_and_not_the_ones_compared_with(tokenizer) -> None:
    safety = SafetyTokens.from_templates(tokenizer, ["I cannot help."])
    rest = len(WORDS) - len(safety)
    for seed in range(5):
        tokens = SafetyTokens.random(tokenizer, rest, seed=seed, exclude=safety)
        assert not set(tokens.ids.tolist()) & {*safety.ids.tolist(), *tokenizer.all_special_ids}
    for count in (0, rest + 1):
        with pytest.raises(ValueError, match=rf"^`count` must be in \[1, {rest}\]; got {count}"):
            SafetyTokens.random(tokenizer, count, seed=0, exclude=safety)


def test_the_score_of_a_template_token_is_the_share_of_templates_it_is_in(tokenizer) -> None:
    tokens = SafetyTokens.from_templates(
        tokenizer, ["I cannot help.", "Sorry, I cannot.", "I'm sorry", "Sorry"]
    )
    scores = dict(zip(tokens.pieces, tokens.scores, strict=True))
    assert scores["Sorry"] == 0.5 and scores[" cannot"] == 0.5
    assert scores[" I"] == 0.75  # inside one, and after a space before two
    assert scores[" help"] == scores["m"] == 0.25


def test_given_ids(tokenizer) -> None:
    for ids in ([3, 1], (3, 1), torch.tensor([3, 1])):
        tokens = SafetyTokens(ids=ids, id_weights=[0.5, 2.0], pieces=["a", "b"])
        assert tokens.ids.tolist() == [3, 1] and len(tokens) == 2
        assert tokens.id_weights.dtype == torch.float32 and tokens.pieces == ("a", "b")
    assert len(SafetyTokens(ids=[])) == 0
    with pytest.raises(AttributeError):
        tokens.ids = torch.tensor([1])


def test_ids_on_a_device_are_copied_once() -> None:
    tokens = SafetyTokens(ids=[3, 1])
    there = tokens.ids_on("meta")
    assert there.device.type == "meta" and tokens.ids_on(torch.device("meta")) is there
    assert tokens.ids_on("cpu") is tokens.ids


def test_an_id_beyond_64_bits_is_named() -> None:
    with pytest.raises(ValueError, match=r"^`ids` must be"):
        SafetyTokens(ids=[2**70])


# Files


@pytest.fixture
def saved(tokenizer, tmp_path) -> Path:
    tokens = SafetyTokens.from_templates(tokenizer, ["I'm sorry, naïve Übung 日本"])
    path = tmp_path / "safety_tokens.json"
    tokens.save(path)
    return path


def test_what_is_saved_is_loaded(tokenizer, tmp_path) -> None:
    made = SafetyTokens.from_templates(tokenizer, ["I'm sorry"])
    weighted = SafetyTokens(
        ids=made.ids,
        id_weights=torch.rand(len(made)),
        pieces=("é", '"', "\\", "\n", " 日本", *made.pieces[5:]),
        source="naïve",
        vocab_size=99,
        tokenizer_hash="abc",
        scores=[k / 3 for k in range(len(made))],
    )
    for tokens in (made, weighted, SafetyTokens(ids=[7]), SafetyTokens(ids=[])):
        tokens.save(tmp_path / "tokens.json")
        again = SafetyTokens.load(str(tmp_path / "tokens.json"))
        assert torch.equal(again.ids, tokens.ids) and again.ids.dtype == torch.int64
        if tokens.id_weights is None:
            assert again.id_weights is None
        else:
            assert torch.equal(again.id_weights, tokens.id_weights)
        for name in ("pieces", "source", "vocab_size", "tokenizer_hash", "scores"):
            assert getattr(again, name) == getattr(tokens, name), name
    assert [p.name for p in tmp_path.iterdir()] == ["tokens.json"]


def test_a_file_from_before_there_were_scores_is_loaded(saved) -> None:
    fields = json.loads(saved.read_text("utf-8"))
    assert len(fields.pop("scores")) == len(fields["ids"])
    saved.write_text(json.dumps(fields), encoding="utf-8")
    assert SafetyTokens.load(saved).scores is None


def test_a_saved_file_can_be_read_by_people_and_by_the_group(saved) -> None:
    text = saved.read_text(encoding="utf-8")
    assert json.loads(text)["schema_version"] == SCHEMA_VERSION
    assert "'" in text and text.endswith("}\n")
    mask = os.umask(0o022)
    os.umask(mask)
    assert stat.S_IMODE(saved.stat().st_mode) == 0o666 & ~mask


def edited(saved: Path, **fields: object) -> str:
    return json.dumps({**json.loads(saved.read_text("utf-8")), **fields})


BAD_FILES = {
    "empty": lambda saved: "",
    "cut short": lambda saved: saved.read_text("utf-8")[:40],
    "not json": lambda saved: "safety: tokens",
    "a list": lambda saved: "[1, 2]",
    "null": lambda saved: "null",
    "a string": lambda saved: '"ids"',
    "not UTF-8": lambda saved: b'{"schema_version": 1, "source": "\xff"}',
    "no version": lambda saved: '{"ids": [1, 2]}',
    "no ids": lambda saved: '{"schema_version": 1}',
    "a later version": lambda saved: edited(saved, schema_version=SCHEMA_VERSION + 1),
    "version as text": lambda saved: edited(saved, schema_version=str(SCHEMA_VERSION)),
    "an unknown field": lambda saved: edited(saved, colour="red"),
    "a private field": lambda saved: edited(saved, _on_device={}),
    "ids null": lambda saved: edited(saved, ids=None),
    "ids as text": lambda saved: edited(saved, ids=["1", "2"]),
    "ids not whole": lambda saved: edited(saved, ids=[1.5, 2.0]),
    "ids twice": lambda saved: edited(saved, ids=[3, 3], pieces=None),
    "ids negative": lambda saved: edited(saved, ids=[-3], pieces=None),
    "ids outside": lambda saved: edited(saved, ids=[3, 9999], pieces=None),
    "ids of 70 bits": lambda saved: edited(saved, ids=[2**70], pieces=None, vocab_size=None),
    "vocab_size as text": lambda saved: edited(saved, vocab_size="15"),
    "pieces too few": lambda saved: edited(saved, pieces=["a"]),
    "pieces a number": lambda saved: edited(saved, pieces=3),
    "scores too few": lambda saved: edited(saved, scores=[1.0]),
    "scores as text": lambda saved: edited(saved, ids=[3], pieces=None, scores=["1"]),
    "scores not a number": lambda saved: edited(saved, ids=[3], pieces=None, scores=[float("nan")]),
    "weights too few": lambda saved: edited(saved, id_weights=[1.0]),
    "weights as text": lambda saved: edited(saved, ids=[3], pieces=None, id_weights=["1"]),
    "weights negative": lambda saved: edited(saved, ids=[3], pieces=None, id_weights=[-1.0]),
    "weights not a number": lambda saved: edited(
        saved, ids=[3], pieces=None, id_weights=[float("nan")]
    ),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_a_bad_file_is_named(kind: str, saved) -> None:
    content = BAD_FILES[kind](saved)
    saved.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as caught:
        SafetyTokens.load(saved)
    assert str(caught.value).startswith(
        f"a safety tokens file must be one that `save` wrote; got {saved}: "
    )
    if kind == "a later version":
        assert "schema_version is 2, this release reads 1" in str(caught.value)


def test_a_file_that_is_not_there(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        SafetyTokens.load(tmp_path / "none.json")
    with pytest.raises(FileNotFoundError):
        SafetyTokens(ids=[1]).save(tmp_path / "no folder" / "tokens.json")


def test_another_tokenizer_is_refused_and_what_differs_is_said(tokenizer, saved) -> None:
    assert torch.equal(SafetyTokens.load(saved, tokenizer).ids, SafetyTokens.load(saved).ids)
    swapped = WordTokenizer([WORDS[1], WORDS[0], *WORDS[2:]])
    with pytest.raises(ValueError) as caught:
        SafetyTokens.load(saved, swapped)
    message = str(caught.value)
    assert message.startswith("`tokenizer` must be the one the safety tokens were made with; got ")
    assert "hash " in message and "is ' I' instead of 'I'" in message and "sorry" not in message
    smaller = WordTokenizer(WORDS[:4])
    with pytest.raises(
        ValueError, match=r"6 tokens instead of 15;.*is 'nothing'|is nothing"
    ) as caught:
        SafetyTokens.load(saved, smaller)
    everything = WordTokenizer([word + "x" for word in WORDS])
    with pytest.raises(ValueError, match=r"; and \d+ more$"):
        SafetyTokens.load(saved, everything)


def test_the_same_words_cut_otherwise_or_other_special_tokens_are_noticed(tokenizer) -> None:
    class Cutting(WordTokenizer):
        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            return super().encode(text.lower(), add_special_tokens=add_special_tokens)

    special = WordTokenizer(WORDS)
    special.all_special_ids = [0, 1, 2]
    tokens = SafetyTokens.from_templates(tokenizer, ["I cannot"])
    tokens.verify(WordTokenizer(WORDS))
    for other in (Cutting(WORDS), special):
        with pytest.raises(ValueError, match=r"^`tokenizer` must be the one"):
            tokens.verify(other)
    SafetyTokens(ids=[1, 2]).verify(special)  # nothing is known of where they came from


# A full disk and a kill. The child is a process of its own: both end more than a test.

CHILD = """
import os, resource, sys, time
from pathlib import Path
from str_kernels import SafetyTokens
path, how = Path(sys.argv[1]), sys.argv[2]
tokens = SafetyTokens(ids=list(range(1000)), source="new")

def stop(*_):
    print("now", flush=True)
    time.sleep(60)

if how == "disk":
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
    try:
        tokens.save(path)
    except OSError as error:
        print("refused", error.errno, flush=True)
    sys.exit()
if how == "half":
    def half(self, text, **_):
        with open(self, "w") as file:
            file.write(text[: len(text) // 2])
            file.flush()
            stop()
    Path.write_text = half
else:
    Path.replace = stop
tokens.save(path)
"""


def child(path: Path, how: str) -> subprocess.Popen:
    env = {**os.environ, "PYTHONPATH": str(Path(str_kernels.__file__).parents[1])}
    command = [sys.executable, "-c", CHILD, str(path), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)


@pytest.mark.skipif(sys.platform == "win32", reason="rlimits and SIGKILL are POSIX")
@pytest.mark.parametrize("how", ["disk", "half", "renaming"])
def test_the_old_file_survives_a_full_disk_and_a_kill(how: str, saved) -> None:
    before = saved.read_bytes()
    with child(saved, how) as process:
        assert process.stdout is not None
        line = process.stdout.readline().split()
        if how == "disk":
            assert line[0] == "refused"
            assert process.wait(30) == 0
            assert [p.name for p in saved.parent.iterdir()] == [saved.name]  # nothing is left
        else:
            assert line == ["now"]
            assert len(list(saved.parent.iterdir())) == 2, "it is not in the middle of writing"
            process.send_signal(signal.SIGKILL)
            assert process.wait(30) == -signal.SIGKILL
    assert saved.read_bytes() == before
    assert len(SafetyTokens.load(saved)) > 0
    SafetyTokens(ids=[5]).save(saved)  # and what the kill left behind is in nobody's way
    assert SafetyTokens.load(saved).ids.tolist() == [5]


def test_an_error_while_writing_leaves_the_old_file_and_no_other(saved) -> None:
    before = saved.read_bytes()
    with pytest.raises(ValueError):
        atomic.write_json(saved, {"value": float("nan")})
    with pytest.raises(RuntimeError, match="in the middle"), atomic.replacing(saved) as temporary:
        temporary.write_text("half")
        raise RuntimeError("in the middle")
    assert saved.read_bytes() == before
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]
