"""SafetyTokens: which vocabulary ids are held to the reference, and where they came from."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .atomic import write_json
from .checks import check_id_values
from .contracts import SafetyPenalty, check_id_weights

SCHEMA_VERSION = 1
_TEMPLATES_FILE = "refusal_templates.txt"
# Two tokenizers with one vocabulary may still cut text differently; this text tells them apart.
_PROBE_TEXT = "I'm sorry, but I can't help with that. 12 345 naïve Übung\n\tdef f(x): return x"


class Tokenizer(Protocol):
    """What is used of a tokenizer; every Hugging Face tokenizer has it."""

    all_special_ids: list[int]

    def __len__(self) -> int:
        """Return the number of tokens, added ones included."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Cut a text into ids."""
        ...

    def decode(self, token_ids: list[int]) -> Any:
        """Return the text of ids."""
        ...

    def get_vocab(self) -> dict[str, int]:
        """Return every token's id."""
        ...


@dataclass(frozen=True, eq=False, init=False)
class SafetyTokens:
    """A set of distinct vocabulary ids whose logits the penalty holds.

    Args:
        ids: the K ids, int64 or a list of int; distinct, each >= 0 and inside the vocabulary.
        id_weights: (K,) factors a_k >= 0 of the penalty, or None for all ones.
        pieces: the text of each id, for people.
        source: how the ids were chosen, for people.
        vocab_size: number of tokens of the tokenizer they belong to.
        tokenizer_hash: its fingerprint, see `tokenizer_hash()`.

    Raises:
        TypeError: an id is not an integer.
        ValueError: ids repeat or fall outside the vocabulary, or a length differs from K.

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
    _on_device: dict[torch.device, Tensor] = field(repr=False)

    def __init__(
        self,
        ids: Tensor | Sequence[int],
        id_weights: Tensor | Sequence[float] | None = None,
        pieces: Sequence[str] | None = None,
        source: str = "given",
        vocab_size: int | None = None,
        tokenizer_hash: str | None = None,
    ) -> None:
        listed = _as_ids(ids)
        count = listed.shape[0]
        check_id_values("ids", listed.tolist(), vocab_size)
        weights = None
        if id_weights is not None:
            weights = _as_weights(id_weights)
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
            "_on_device": {},
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    def __len__(self) -> int:
        """Return K."""
        return int(self.ids.shape[0])

    def ids_on(self, device: torch.device | str) -> Tensor:  # (K,)
        """Return the ids on `device`, copied there once."""
        device = torch.device(device)
        if device not in self._on_device:
            self._on_device[device] = self.ids.to(device)
        return self._on_device[device]

    @classmethod
    def from_templates(
        cls,
        tokenizer: Tokenizer,
        templates: Path | str | Iterable[str] | None = None,
        *,
        tokens_per_template: int | None = None,
    ) -> SafetyTokens:
        """Take the tokens of refusal sentences, as they stand at a sentence's start and inside one.

        Each template is encoded as it is and after a space, without special tokens; the ids are
        kept in the order they first appear.

        Args:
            tokenizer: the model's tokenizer.
            templates: a text file with one template per line ("#" starts a comment), a list of
                sentences, or None for the file that comes with the package.
            tokens_per_template: use only this many tokens from each beginning; all when None.

        Returns:
            The SafetyTokens, with pieces, source and the tokenizer's fingerprint.

        Raises:
            ValueError: there is no template, or none leaves a token.

        References:
            Bach and Tran 2026, arXiv:2604.17210, takes the tokens of the aligned model's own
            rejection templates. Which templates, and how many tokens, is not known to us.
        """
        if templates is None:
            built_in = resources.files(__package__).joinpath("data", _TEMPLATES_FILE)
            sentences, source = _lines(built_in.read_text("utf-8")), "built-in refusal templates"
        elif isinstance(templates, (str, Path)):
            sentences = _lines(Path(templates).read_text(encoding="utf-8"))
            source = f"templates of {Path(templates).name}"
        else:
            sentences, source = list(templates), "templates given as a list"
        if not sentences:
            raise ValueError(f"`templates` must hold at least one sentence; got none ({source})")
        if tokens_per_template is not None and tokens_per_template < 1:
            raise ValueError(f"`tokens_per_template` must be >= 1; got {tokens_per_template}")
        special = set(tokenizer.all_special_ids)
        found: dict[int, None] = {}
        for sentence in sentences:
            for text in (sentence, " " + sentence):
                encoded = tokenizer.encode(text, add_special_tokens=False)
                found.update(dict.fromkeys(encoded[:tokens_per_template]))
        ids = [token for token in found if token not in special]
        if not ids:
            raise ValueError(f"`templates` must leave at least one token; got none ({source})")
        first = "" if tokens_per_template is None else f", first {tokens_per_template} tokens each"
        return cls._of(tokenizer, ids, f"{source} ({len(sentences)} sentences{first})")

    @classmethod
    def random(
        cls,
        tokenizer: Tokenizer,
        count: int,
        *,
        seed: int,
        exclude: SafetyTokens | None = None,
    ) -> SafetyTokens:
        """Draw ordinary tokens uniformly: the control that a claim about safety tokens needs.

        Args:
            tokenizer: the model's tokenizer.
            count: K, how many to draw.
            seed: of the draw; the same seed gives the same ids.
            exclude: tokens that must not be drawn, in general the ones compared against.

        Returns:
            The SafetyTokens, in ascending order of id.

        Raises:
            ValueError: there are fewer than `count` tokens to draw from.
        """
        taken = set(tokenizer.all_special_ids)
        if exclude is not None:
            taken.update(exclude.ids.tolist())
        pool = sorted(token for token in set(tokenizer.get_vocab().values()) if token not in taken)
        if not 1 <= count <= len(pool):
            raise ValueError(f"`count` must be in [1, {len(pool)}]; got {count}")
        ids = sorted(random.Random(seed).sample(pool, count))
        return cls._of(tokenizer, ids, f"random, seed {seed}")

    @classmethod
    def load(cls, path: Path | str, tokenizer: Tokenizer | None = None) -> SafetyTokens:
        """Read what `save` wrote.

        Args:
            path: the JSON file.
            tokenizer: the tokenizer the ids will be used with; compared with the one they came
                from when given.

        Returns:
            The SafetyTokens.

        Raises:
            ValueError: the file is not one of ours, is damaged, or belongs to another tokenizer;
                the message names the file and says what differs.
        """
        path = Path(path)
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            version = fields.pop("schema_version")
            if version != SCHEMA_VERSION:
                raise ValueError(
                    f"schema_version is {version}, this release reads {SCHEMA_VERSION}"
                )
            tokens = cls(**fields)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"`path` must be a safety tokens file; got {path}: {type(error).__name__}: {error}"
            ) from error
        if tokenizer is not None:
            tokens.verify(tokenizer)
        return tokens

    def save(self, path: Path | str) -> None:
        """Write everything as JSON with a schema version, whole or not at all."""
        weights = None if self.id_weights is None else self.id_weights.tolist()
        write_json(
            Path(path),
            {
                "schema_version": SCHEMA_VERSION,
                "source": self.source,
                "vocab_size": self.vocab_size,
                "tokenizer_hash": self.tokenizer_hash,
                "ids": self.ids.tolist(),
                "id_weights": weights,
                "pieces": None if self.pieces is None else list(self.pieces),
            },
        )

    def weigh(self, penalty: SafetyPenalty | None) -> SafetyPenalty:
        """Return the penalty with these tokens' weights, unless it has its own.

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
        """Check that the ids mean in `tokenizer` what they meant where they were made.

        Args:
            tokenizer: the tokenizer to be used with them.

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

    @classmethod
    def _of(cls, tokenizer: Tokenizer, ids: Sequence[int], source: str) -> SafetyTokens:
        return cls(
            ids=torch.tensor(ids, dtype=torch.int64),
            pieces=tuple(str(tokenizer.decode([token])) for token in ids),
            source=source,
            vocab_size=len(tokenizer),
            tokenizer_hash=tokenizer_hash(tokenizer),
        )


def tokenizer_hash(tokenizer: Tokenizer) -> str:
    """Return a SHA-256 over the vocabulary, the special ids and how a probe text is cut."""
    content = [
        sorted(tokenizer.get_vocab().items()),
        sorted(tokenizer.all_special_ids),
        tokenizer.encode(_PROBE_TEXT, add_special_tokens=False),
    ]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()


def _as_ids(ids: object) -> Tensor:
    if isinstance(ids, Tensor):
        if ids.dtype != torch.int64:
            raise TypeError(f"`ids` must be int64; got {ids.dtype}")
        values = ids.detach().cpu()
    else:
        listed = list(ids) if isinstance(ids, Iterable) else [ids]
        for value in listed:
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"`ids` must be integers; got {value!r}")
            if value >= 2**63:
                raise ValueError(f"`ids` must be below 2^63; got {value}")
        values = torch.tensor(listed, dtype=torch.int64)
    if values.dim() != 1:
        raise ValueError(f"`ids` must have shape (K,); got {tuple(values.shape)}")
    return values


def _as_weights(id_weights: Tensor | Sequence[float]) -> Tensor:
    try:
        weights = torch.as_tensor(id_weights, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`id_weights` must be numbers; got {id_weights!r}") from error
    check_id_weights(weights)
    return weights.detach().cpu()


def _lines(text: str) -> list[str]:
    stripped = (line.strip() for line in text.splitlines())
    return [line for line in stripped if line and not line.startswith("#")]
