"""The options of attach(), each defined once: for code, command-line flags and trainers' configs.

They are not defined next to attach(), so that a command can print its help without importing
transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, cast, get_args, get_type_hints

from .op import (
    Backend,
    PenaltyKind,
    SafetyPenalty,
    check_backend,
    check_chunk_bytes,
    read_json_object,
)

PathName = Literal["linear", "logits"]
"""Where attach() hooks into a model's forward: before its head, or at its logits."""

Positions = Literal["none", "response", "all"] | int
"""Which positions of the training rows have the penalty.

"none": no position (anchors alone). "response": every label, the paper's form. "all": every
position whose next token is not padding. An int m: the first m labels of each response.
"""

PREFIX = "safety_"
"""Prefix of the options' names in the config of a trainer, which has options of its own."""


def check_positions(positions: object) -> None:
    """Raise ValueError unless `positions` is one of Positions."""
    number = isinstance(positions, int) and not isinstance(positions, bool) and positions >= 1
    if not number and positions not in ("none", "response", "all"):
        raise ValueError(
            "`positions` must be 'none' (anchors alone), 'response' (the paper's form), 'all' or "
            f"an int >= 1; got {positions!r}"
        )


def read_positions(text: object) -> Positions:
    """Read positions from a flag or a YAML key; "3" becomes 3."""
    word = str(text)
    return int(word) if word.isdecimal() else word  # type: ignore[return-value] # to be checked


def check_path(path: object) -> None:
    """Raise ValueError unless `path` is one of PathName."""
    if path not in get_args(PathName):
        raise ValueError(f"`path` must be one of {', '.join(get_args(PathName))}; got {path!r}")


def default_penalty(positions: Positions) -> SafetyPenalty:
    """Return the penalty that is used if the caller passes none.

    At anchors alone it is what the study found best (docs/method.md), on rows the paper's form.
    """
    return SafetyPenalty(0.1, "coarse_kl") if positions == "none" else SafetyPenalty()


def chosen_penalty(
    positions: Positions,
    weight: float | None = None,
    kind: str | None = None,
    temperature: float = 1.0,
    delta: float = 1.0,
) -> SafetyPenalty:
    """Return the default penalty, changed by the arguments that are not None."""
    default = default_penalty(positions)
    return SafetyPenalty(
        default.weight if weight is None else weight,
        default.kind if kind is None else cast(PenaltyKind, kind),
        temperature,
        delta,
    )


def _option(
    default: Any,
    text: str,
    *,
    flag: str | None = None,
    values: tuple[str, ...] | None = None,
    of_anchors: bool = False,
    hidden: bool = False,
) -> Any:
    """Return a dataclass field with the metadata that flags and config keys need.

    An option has different names in commands and trainers, so its help `text` must describe other
    options and not name them.
    """
    more = {"flag": flag, "values": values, "of_anchors": of_anchors, "hidden": hidden}
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True, kw_only=True, eq=False)
class PlainOptions:
    """The options of attach() that are numbers or names, and so are the same in code and in files.

    Raises:
        TypeError: a field is of the wrong type.
        ValueError: a field is wrong, or has no effect with the values of the others.
    """

    positions: Positions = _option(
        "none",
        "Where the penalty is on the rows: none (at anchors alone), response (the paper's form), "
        "all, or N, the first N labels of each response.",
        values=("none", "response", "all", "N"),
    )
    ref_every: int = _option(1, "Ask the reference in every n-th forward only.")
    ref_tokens: int | None = _option(
        None, "Give the reference only this many tokens of each row, the first ones."
    )
    path: PathName = _option(
        "linear",
        "linear never computes all logits at once; logits is for heads that linear cannot read.",
        values=get_args(PathName),
    )
    chunk_bytes: int | None = _option(
        None, "Memory for one chunk's logits, bytes; by the device when unset."
    )
    backend: str = _option(
        "auto", "What computes the loss; `str-kernels doctor` tests it.", values=get_args(Backend)
    )

    def __post_init__(self) -> None:
        check_positions(self.positions)
        if self.positions == "none" and (self.ref_every, self.ref_tokens) != (1, None):
            raise ValueError(
                "`ref_every` and `ref_tokens` must be left out with positions='none', where the "
                f"reference does not read the rows; got {self.ref_every!r} and {self.ref_tokens!r}"
            )
        _check_count("ref_every", self.ref_every, 1)
        if self.ref_tokens is not None:
            _check_count("ref_tokens", self.ref_tokens, 1)
        check_path(self.path)
        check_chunk_bytes(self.chunk_bytes)
        check_backend(self.backend)


@dataclass(frozen=True, kw_only=True, eq=False)
class SafetySettings(PlainOptions):
    """The options of attach(), of the safety tokens and of the anchors, as flags or YAML keys.

    SETTINGS lists them for code that generates flags or keys.

    Raises:
        TypeError: a field is of the wrong type.
        ValueError: a field is wrong, or has no effect with the values of the others.

    Examples:
        >>> SafetySettings(positions="3").positions
        3
        >>> SafetySettings.of({"safety_path": "none"})
        Traceback (most recent call last):
            ...
        ValueError: `safety_path` must be one of linear, logits; got 'none'
    """

    weight: float | None = _option(
        None, "Weight of the penalty, 0.1 when unset; 0 is plain fine-tuning."
    )
    kind: str | None = _option(
        None,
        "Kind of the penalty; coarse_kl at anchors, mse on rows when unset.",
        values=get_args(PenaltyKind),
    )
    temperature: float = _option(1.0, "T of kind subset_kl.")
    delta: float = _option(1.0, "Drift beyond which kind huber is linear, logits.")
    tokens: str | None = _option(
        None,
        "A safety_tokens.json, instead of the templates.",
        flag="safety_tokens",  # in a command, tokens are those of a row
    )
    templates: str | None = _option(
        None, "A file of refusal templates, one a line, instead of the package's."
    )
    cache: str | None = _option(
        None, "A folder of `str-kernels cache build`, read instead of running the reference."
    )
    anchors: str | None = _option(
        None,
        "Prompts at which the model is held to the reference: 'default' for the package's, or a "
        "JSONL file. Unset: the package's if the penalty is at anchors alone, else none.",
        of_anchors=True,
    )
    anchors_per_step: int = _option(2, "Harmful anchors in each step.", of_anchors=True)
    harmless_anchors_per_step: int | None = _option(
        None,
        "Harmless anchors in each step, against over-refusal; 2 when unset, or as many as there "
        "are.",
        of_anchors=True,
    )
    anchor_penalty_weight: float | None = _option(
        None,
        "Separate weight of the penalty at the anchors; the penalty's weight when unset.",
        of_anchors=True,
    )
    chat_template_kwargs: str | None = _option(
        None,
        "Arguments of the chat template for the anchors, the same as in training and use: a JSON "
        'object such as {"enable_thinking": false}.',
        of_anchors=True,
    )
    answer_start: str | None = _option(
        None,
        "Text between an anchor's prompt and its answer, such as '</think>' and blank lines.",
        of_anchors=True,
    )
    anchor_weight: float | None = _option(
        None,
        "Not taken any more: the weight at the anchors is given by itself.",
        of_anchors=True,
        hidden=True,
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", read_positions(self.positions))
        super().__post_init__()
        if self.anchor_weight is not None:
            raise ValueError(
                "`anchor_weight` must be left out: it was relative to `weight`. Set "
                "`anchor_penalty_weight`, which is the anchors' weight by itself (before: "
                f"`weight` * {self.anchor_weight})"
            )
        self._check_anchors()
        if self.tokens is not None and self.templates is not None:
            raise ValueError("`templates` must not be given together with `tokens`; got both")
        self.penalty()

    def _check_anchors(self) -> None:
        alone = self.positions == "none"
        if alone and self.weight is not None and self.anchor_penalty_weight is not None:
            raise ValueError(
                "`anchor_penalty_weight` must be left out where the penalty stands at anchors "
                "alone and `weight` is given, which is theirs too; got "
                f"{self.anchor_penalty_weight!r}"
            )
        for one in fields(self):
            given = getattr(self, one.name)
            optional = one.metadata["of_anchors"] and one.default is None
            if not alone and self.anchors is None and optional and given is not None:
                raise ValueError(
                    f"`{one.name}` must be left out where there are no anchors; got {given!r}"
                )
        _check_count("anchors_per_step", self.anchors_per_step, 0)
        if self.harmless_anchors_per_step is not None:
            _check_count("harmless_anchors_per_step", self.harmless_anchors_per_step, 0)
        read_json_object("chat_template_kwargs", self.chat_template_kwargs)

    def penalty(self) -> SafetyPenalty:
        """Return the penalty that the fields describe."""
        return chosen_penalty(self.positions, self.weight, self.kind, self.temperature, self.delta)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> SafetySettings:
        """Make settings from prefixed names such as `safety_weight`, which errors then use too.

        Raises:
            TypeError: a name is unknown, or a value has the wrong type.
            ValueError: as in the class.
        """
        names = {one.name: one.field for one in SETTINGS}
        for name, value in given.items():
            if name not in names:
                raise TypeError(f"`{name}` must be one of {', '.join(names)}; got {name}={value!r}")
        try:
            return cls(**{names[name]: value for name, value in given.items()})
        except (TypeError, ValueError) as error:
            prefixed = {one: name for name, one in names.items()}
            said = re.sub(
                r"`(\w+)`", lambda found: f"`{prefixed.get(found[1], found[1])}`", str(error)
            )
            raise type(error)(said) from error


class Setting(NamedTuple):
    """A field of SafetySettings, described for code that makes a flag or a config key of it."""

    name: str
    """In TRL's config, Axolotl's YAML and ms-swift's register()."""
    flag: str
    """Of `str-kernels finetune` and in its YAML."""
    field: str
    """In SafetySettings."""
    annotation: Any
    """Its type; str if it has `values`, since TRL's parser takes no union with str."""
    default: Any
    help: str
    values: tuple[str, ...] | None
    of_anchors: bool
    hidden: bool

    @property
    def described(self) -> str:
        """The help with the list of values, for places that show no other list."""
        return f"{self.help} One of: {', '.join(self.values)}." if self.values else self.help


def _settings() -> tuple[Setting, ...]:
    hints = get_type_hints(SafetySettings)
    plain = {one.name for one in fields(PlainOptions)}
    found = []
    for one in sorted(fields(SafetySettings), key=lambda one: one.name in plain):
        more = dict(one.metadata)
        flag = more.pop("flag") or one.name
        annotation = hints[one.name]
        if more["values"] is not None:
            annotation = str if one.default is not None else str | None
        found.append(Setting(PREFIX + one.name, flag, one.name, annotation, one.default, **more))
    return tuple(found)


SETTINGS = _settings()
"""The options of SafetySettings itself first, then those of PlainOptions."""


def _check_count(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{name}` must be an int >= {least}; got {value!r}")
