"""SafetyTokens: the vocabulary ids whose logits are penalised, and how they were chosen."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import is_text, read_text_file, write_json
from ..op import SafetyPenalty, check_id_values
from .fields import as_ids, as_scores, as_weights
from .frequency_match import count_ids, draw_matched
from .tokenizer import Tokenizer, tokenizer_hash

SCHEMA_VERSION = 1
_TEMPLATES_FILE = "refusal_templates.txt"


@dataclass(frozen=True, eq=False, init=False)
class SafetyTokens:
    """A set of distinct vocabulary ids whose logits the penalty keeps near the reference's.

    Args:
        ids: the K ids, int64 or a list of int; distinct, each >= 0 and inside the vocabulary.
        id_weights: (K,) factors a_k >= 0 of the penalty, or None for all ones.
        pieces: the text of each id, for people to read.
        source: how the ids were chosen, for people to read.
        vocab_size: number of tokens of the tokenizer they belong to.
        tokenizer_hash: its fingerprint, see `tokenizer_hash()`.
        scores: K finite numbers by which the ids were chosen, for people to read; the function
            that chose them documents their meaning.

    Raises:
        TypeError: an id or a score is not a number.
        ValueError: ids repeat or fall outside the vocabulary, a length differs from K, or a score
            is not finite.

    Examples:
        >>> tokens = SafetyTokens(ids=[3, 1])
        >>> len(tokens), tokens.ids
        (2, tensor([3, 1]))
    """

    ids: Tensor
    id_weights: Tensor | None
    pieces: tuple[str, ...] | None
    source: str
    vocab_size: int | None
    tokenizer_hash: str | None
    scores: tuple[float, ...] | None
    _on_device: dict[torch.device, Tensor] = field(repr=False)

    def __init__(
        self,
        ids: Tensor | Sequence[int],
        id_weights: Tensor | Sequence[float] | None = None,
        pieces: Sequence[str] | None = None,
        source: str = "given",
        vocab_size: int | None = None,
        tokenizer_hash: str | None = None,
        scores: Sequence[float] | None = None,
    ) -> None:
        listed = as_ids(ids)
        count = listed.shape[0]
        check_id_values("ids", listed.tolist(), vocab_size)
        weights = None
        if id_weights is not None:
            weights = as_weights(id_weights)
            if tuple(weights.shape) != (count,):
                raise ValueError(
                    f"`id_weights` must have shape ({count},); got {tuple(weights.shape)}"
                )
        if pieces is not None and len(pieces) != count:
            raise ValueError(f"`pieces` must have {count} entries; got {len(pieces)}")
        values: dict[str, object] = {
            "ids": listed,
            "id_weights": weights,
            "pieces": None if pieces is None else tuple(pieces),
            "source": source,
            "vocab_size": vocab_size,
            "tokenizer_hash": tokenizer_hash,
            "scores": None if scores is None else as_scores(scores, count),
            "_on_device": {},
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    def __len__(self) -> int:
        """Return K."""
        return int(self.ids.shape[0])

    @property
    def fingerprint(self) -> str:
        """SHA-256, as hex, of the ids in their order and of the tokenizer's hash.

        Two sets with the same fingerprint have the same safety logits in the same columns. Weights,
        pieces, scores and source do not change it.
        """
        content = json.dumps([self.ids.tolist(), self.tokenizer_hash])
        return hashlib.sha256(content.encode()).hexdigest()

    def ids_on(self, device: torch.device | str) -> Tensor:  # (K,)
        """Return the ids on `device`; the copy is kept."""
        device = torch.device(device)
        if device not in self._on_device:
            self._on_device[device] = self.ids.to(device)
        return self._on_device[device]

    @classmethod
    def from_ids(
        cls,
        tokenizer: Tokenizer,
        ids: Sequence[int],
        *,
        source: str = "given",
        id_weights: Tensor | Sequence[float] | None = None,
        scores: Sequence[float] | None = None,
    ) -> SafetyTokens:
        """Make a set from ids, and add their pieces and the tokenizer's fingerprint.

        Args:
            tokenizer: the model's tokenizer.
            ids: as in the class.
            source: as in the class.
            id_weights: as in the class.
            scores: as in the class.

        Returns:
            The SafetyTokens, in the order of ids.
        """
        check_id_values("ids", list(ids), len(tokenizer))  # before they are decoded
        return cls(
            ids=torch.tensor(ids, dtype=torch.int64),
            id_weights=id_weights,
            pieces=tuple(str(tokenizer.decode([token])) for token in ids),
            source=source,
            vocab_size=len(tokenizer),
            tokenizer_hash=tokenizer_hash(tokenizer),
            scores=scores,
        )

    @classmethod
    def from_templates(
        cls,
        tokenizer: Tokenizer,
        templates: Path | str | Iterable[str] | None = None,
        *,
        tokens_per_template: int | None = None,
    ) -> SafetyTokens:
        """Take the tokens of refusal sentences.

        Each template is encoded twice, as it is and after a space, without special tokens: a word
        has different ids at the start of a text and inside it. The ids are kept in the order of
        their first appearance. An id's score is the share of templates that contain it, in (0, 1].

        Args:
            tokenizer: the model's tokenizer.
            templates: a text file with one template per line ("#" starts a comment), a list of
                sentences, or None for the file that comes with the package.
            tokens_per_template: use only the first tokens of each template; all when None.

        Returns:
            The SafetyTokens, with pieces, scores, source and the tokenizer's fingerprint.

        Raises:
            OSError: the file cannot be read.
            ValueError: there is no template, one is not text, or there are no tokens.

        References:
            Bach and Tran 2026, arXiv:2604.17210, takes the tokens of the aligned model's own
            rejection templates. We do not know which templates, or how many tokens.
        """
        if templates is None:
            built_in = resources.files("str_kernels").joinpath("data", _TEMPLATES_FILE)
            sentences, source = _lines(built_in.read_text("utf-8")), "built-in refusal templates"
        elif isinstance(templates, (str, Path)):
            sentences = _lines(read_text_file("`templates`", templates))
            source = f"templates of {Path(templates).name}"
        else:
            sentences, source = list(templates), "templates given as a list"
        if not sentences:
            raise ValueError(f"`templates` must hold at least one sentence; got none ({source})")
        broken = next((one for one in sentences if not is_text(one)), None)
        if broken is not None:
            raise ValueError(f"`templates` must be text; got {broken!r} ({source})")
        if tokens_per_template is not None and tokens_per_template < 1:
            raise ValueError(f"`tokens_per_template` must be >= 1; got {tokens_per_template}")
        special = set(tokenizer.all_special_ids)
        found: Counter[int] = Counter()  # keeps the order of appearance
        for sentence in sentences:
            here: dict[int, None] = {}
            for text in (sentence, " " + sentence):
                encoded = tokenizer.encode(text, add_special_tokens=False)
                here.update(dict.fromkeys(encoded[:tokens_per_template]))
            found.update(here.keys())
        ids = [token for token in found if token not in special]
        if not ids:
            raise ValueError(f"`templates` must leave at least one token; got none ({source})")
        first = "" if tokens_per_template is None else f", first {tokens_per_template} tokens each"
        return cls.from_ids(
            tokenizer,
            ids,
            source=f"{source} ({len(sentences)} sentences{first}; score: share it is in)",
            scores=[found[token] / len(sentences) for token in ids],
        )

    @classmethod
    def random(
        cls,
        tokenizer: Tokenizer,
        count: int | None = None,
        *,
        seed: int,
        exclude: SafetyTokens | None = None,
        like: SafetyTokens | None = None,
        corpus: Iterable[Iterable[int]] | None = None,
    ) -> SafetyTokens:
        """Draw ordinary tokens, the control for any claim about safety tokens.

        Without a corpus they are drawn uniformly. With `like` and a corpus, each token matches one
        token of `like` and is nearly as frequent in the corpus (see
        `frequency_match.draw_matched`). If safety tokens work better than these, the reason is not
        that they are common words.

        Args:
            tokenizer: the model's tokenizer.
            count: K, how many to draw; as many as `like` when None.
            seed: of the draw; the same seed gives the same ids.
            exclude: tokens not to draw, usually the ones compared against.
            like: tokens of the same tokenizer; as many are drawn, none of them itself, and their
                weights are copied.
            corpus: rows of ids, such as the training data's; read once. Needs `like`.

        Returns:
            The SafetyTokens, in ascending order of id. With a corpus: in the order of `like`, entry
            k matching its entry k, with occurrences per million ids as scores.

        Raises:
            ValueError: there are fewer tokens to draw from than wanted; `count` is not the length
                of `like`; `like` is of another tokenizer; `corpus` is empty or without `like`.
        """
        taken = set(tokenizer.all_special_ids)
        for tokens in (exclude, like):
            taken.update([] if tokens is None else tokens.ids.tolist())
        pool = sorted(token for token in set(tokenizer.get_vocab().values()) if token not in taken)
        weights = None
        if like is not None:
            like.verify(tokenizer)
            if count not in (None, len(like)):
                raise ValueError(f"`count` must be that of `like`, {len(like)}; got {count}")
            count, weights = len(like), like.id_weights
        if count is None or not 1 <= count <= len(pool):
            raise ValueError(f"`count` must be in [1, {len(pool)}]; got {count}")
        source, scores = f"random, seed {seed}", None
        if corpus is None:
            ids = sorted(random.Random(seed).sample(pool, count))
        elif like is None:
            raise ValueError("`corpus` must come with `like`, the tokens to match; got none")
        else:
            counts = count_ids(corpus)
            ids = draw_matched(counts, like.ids.tolist(), pool, seed=seed)
            scores = [1e6 * counts[token] / counts.total() for token in ids]
            source += (
                f", as frequent among {counts.total():,} ids (score: occurrences per million) as "
                f"the tokens of: {like.source}"
            )
        return cls.from_ids(tokenizer, ids, source=source, id_weights=weights, scores=scores)

    @classmethod
    def load(cls, path: Path | str, tokenizer: Tokenizer | None = None) -> SafetyTokens:
        """Read what `save` wrote.

        Args:
            path: the JSON file.
            tokenizer: the tokenizer the ids will be used with. If given, it must be the one that
                they were made with.

        Returns:
            The SafetyTokens.

        Raises:
            OSError: the file cannot be read.
            ValueError: `save` did not write the file, it is damaged, or it belongs to another
                tokenizer; the message says what is wrong.
        """
        try:
            fields = json.loads(read_text_file("it", path))
            version = fields.pop("schema_version")
            if version != SCHEMA_VERSION:
                raise ValueError(
                    f"schema_version is {version}, this release reads {SCHEMA_VERSION}"
                )
            tokens = cls(**fields)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ValueError(
                f"a safety tokens file must be one that `save` wrote; got {path}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if tokenizer is not None:
            tokens.verify(tokenizer)
        return tokens

    def save(self, path: Path | str) -> None:
        """Write `as_dict()` as JSON, whole or not at all."""
        write_json(Path(path), self.as_dict())

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain lists, strings and numbers, with a schema version."""
        return {
            "schema_version": SCHEMA_VERSION,
            "source": self.source,
            "vocab_size": self.vocab_size,
            "tokenizer_hash": self.tokenizer_hash,
            "ids": self.ids.tolist(),
            "id_weights": None if self.id_weights is None else self.id_weights.tolist(),
            "pieces": None if self.pieces is None else list(self.pieces),
            "scores": None if self.scores is None else list(self.scores),
        }

    def weigh(self, penalty: SafetyPenalty | None) -> SafetyPenalty:
        """Return the penalty with these tokens' `id_weights`, unless it has its own.

        Args:
            penalty: kind and weight; the defaults of SafetyPenalty when None.
        """
        penalty = SafetyPenalty() if penalty is None else penalty
        if not isinstance(penalty, SafetyPenalty):
            raise TypeError(f"`penalty` must be a SafetyPenalty; got {type(penalty).__name__}")
        if penalty.id_weights is not None:
            return penalty
        return replace(penalty, id_weights=self.id_weights)

    def verify(self, tokenizer: Tokenizer) -> None:
        """Check that `tokenizer` is the one that the ids were made with.

        Args:
            tokenizer: the tokenizer to use them with.

        Raises:
            ValueError: it is another tokenizer; the message lists what differs.
        """
        differences = []
        if self.vocab_size is not None and self.vocab_size != len(tokenizer):
            differences.append(f"{len(tokenizer)} tokens instead of {self.vocab_size}")
        here = tokenizer_hash(tokenizer)
        if self.tokenizer_hash is not None and self.tokenizer_hash != here:
            differences.append(f"hash {here[:12]} instead of {self.tokenizer_hash[:12]}")
            inside = [token for token in self.ids.tolist() if token < len(tokenizer)]
            for token, piece in zip(self.ids.tolist(), self.pieces or (), strict=False):
                other = str(tokenizer.decode([token])) if token in inside else "nothing"
                if other != piece:
                    differences.append(f"id {token} is {other!r} instead of {piece!r}")
        if differences:
            shown = "; ".join(differences[:6])
            more = f"; and {len(differences) - 6} more" if len(differences) > 6 else ""
            raise ValueError(
                f"`tokenizer` must be the one the safety tokens were made with; got {shown}{more}"
            )


def _lines(text: str) -> list[str]:
    stripped = (line.strip() for line in text.splitlines())
    return [line for line in stripped if line and not line.startswith("#")]
