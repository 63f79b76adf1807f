"""The options of attach() as one object, and their values from flags or a file."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal

from torch import nn

from ...attach_options import PlainOptions, SafetySettings, default_penalty
from ...op import SafetyPenalty, read_json_object
from ...reference_cache import CachedReference
from ...tokens import SafetyTokens
from ..anchors import AnchorPrompts
from ..models import ReferenceFunction


def _object(*settings: str, because: str = "") -> dict[str, Any]:
    """Name the SafetySettings that an object field is made from, or say why there are none."""
    return {"made_of": settings, "because": because}


@dataclass(frozen=True, kw_only=True, eq=False)
class AttachOptions(PlainOptions):
    """The keywords of `attach`, checked on creation; see `attach` for what they mean.

    Rules that depend on the model are checked by `attach`.

    Raises:
        TypeError: a field is of the wrong type.
        ValueError: a field is wrong, or has no effect together with the others.
    """

    penalty: SafetyPenalty | None = field(
        default=None, metadata=_object("weight", "kind", "temperature", "delta")
    )
    ref_model: nn.Module | None = field(
        default=None, metadata=_object(because="`str-kernels finetune --full` copies the model")
    )
    reference: ReferenceFunction | Literal["start"] | None = field(
        default=None, metadata=_object("cache")
    )
    anchors: AnchorPrompts | Literal["default"] | None = field(
        default=None,
        metadata=_object(
            "anchors",
            "anchors_per_step",
            "harmless_anchors_per_step",
            "anchor_penalty_weight",
            "chat_template_kwargs",
            "answer_start",
            "anchor_weight",
        ),
    )
    tokenizer: Any = field(default=None, metadata=_object(because="a trainer has one"))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.penalty is not None and not isinstance(self.penalty, SafetyPenalty):
            raise TypeError(f"`penalty` must be a SafetyPenalty; got {type(self.penalty).__name__}")
        if self.ref_tokens is not None and self.reference is not None:
            raise ValueError(f"`ref_tokens` must be None beside `reference`; got {self.ref_tokens}")
        if self.reference == "start":
            if self.ref_model is not None:
                raise ValueError("`ref_model` must be None beside reference='start'; got a model")
        elif self.reference is not None and (
            self.ref_model is not None or not callable(self.reference)
        ):
            raise ValueError(
                "`reference` must be a function or 'start', and given without `ref_model`; got "
                f"{self.reference!r:.60}, ref_model {type(self.ref_model).__name__}"
            )

    def penalty_of(self, safety_tokens: SafetyTokens) -> SafetyPenalty:
        """Return the penalty to use, with the tokens' weights unless it has its own."""
        penalty = default_penalty(self.positions) if self.penalty is None else self.penalty
        return safety_tokens.weigh(penalty)

    def held_anchors(self) -> AnchorPrompts | None:
        """Return the anchors: those of the package where anchors are needed and none are given."""
        if self.anchors is None and self.positions != "none":
            return None
        if isinstance(self.anchors, AnchorPrompts):
            return self.anchors
        if self.anchors not in (None, "default"):
            raise TypeError(
                f"`anchors` must be AnchorPrompts or 'default'; got {self.anchors!r:.60}: read a "
                "file by AnchorPrompts.from_prompts(tokenizer, file)"
            )
        if self.tokenizer is None:
            raise ValueError(
                "`tokenizer` must be given (a trainer's `processing_class`) for the package's "
                "anchors, where the penalty stands by default; or pass `anchors`, or neither and "
                "positions='response', the paper's form"
            )
        return AnchorPrompts.default(self.tokenizer)


KEYWORDS = tuple(one.name for one in fields(AttachOptions))
"""The keywords of attach(), in order."""


def keywords_of(settings: SafetySettings, tokenizer: Any, seed: int = 0) -> dict[str, Any]:
    """Turn settings into keywords of `attach`.

    Args:
        settings: from flags, a file or a trainer's config.
        tokenizer: the model's, whose chat template renders the anchors.
        seed: of the anchors' order.
    """
    found = {one.name: getattr(settings, one.name) for one in fields(PlainOptions)}
    found["penalty"] = settings.penalty()
    if settings.cache is not None:
        found["reference"] = CachedReference(settings.cache)
    if settings.positions == "none" or settings.anchors is not None:
        found["anchors"] = AnchorPrompts.from_prompts(
            tokenizer,
            settings.anchors or "default",
            per_step=settings.anchors_per_step,
            harmless_per_step=settings.harmless_anchors_per_step,
            penalty_weight=settings.anchor_penalty_weight,
            chat_template_kwargs=read_json_object(
                "chat_template_kwargs", settings.chat_template_kwargs
            ),
            answer_start=settings.answer_start,
            seed=seed,
        )
    return found


def tokens_of(settings: SafetySettings, tokenizer: Any) -> SafetyTokens:
    """Return the SafetyTokens that the settings name."""
    if settings.tokens is not None:
        return SafetyTokens.load(settings.tokens, tokenizer)
    return SafetyTokens.from_templates(tokenizer, settings.templates)
