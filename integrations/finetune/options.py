"""The options of `str-kernels finetune`: TRL's and ours, from flags and a YAML file.

Every field of SafetySFTConfig (which has all of SFTConfig's), of TRL's ModelConfig and of
RunOptions is both a flag and a key of the file. The most used ones have short names, ALIASES, which
work in the file too. A flag overrides the file, and the file overrides the DEFAULTS.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from trl import ModelConfig, TrlParser

from ...attach_options import SETTINGS
from ..trainers.trl_sft import SafetySFTConfig

_NAMES = {one.name for one in fields(SafetySFTConfig)}
# transformers 5.24 renamed this option and warns about the old name
_CHECKPOINTING = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if name in _NAMES
)

ALIASES = {
    "steps": "max_steps",
    "epochs": "num_train_epochs",
    "batch_size": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "lr": "learning_rate",
    "warmup": "warmup_steps",
    "checkpointing": _CHECKPOINTING,
    "gradient_checkpointing": _CHECKPOINTING,  # either name works
    "attention": "attn_implementation",
    "lora_rank": "lora_r",
    "model": "model_name_or_path",
    **{one.flag: one.name for one in SETTINGS if one.flag != one.name},
}
"""Short names of fields; other fields have only their full name."""

DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 8,
    "learning_rate": 2e-4,
    "use_peft": True,
    "lora_r": 8,
    "lora_alpha": None,  # twice the rank
    "lora_dropout": 0.0,
    "lora_target_modules": ["all-linear"],
    "dtype": "auto",
    "bf16": False,  # no autocast: training keeps the model's dtype
    _CHECKPOINTING: False,
    "logging_steps": 1,
    "save_steps": 0.1,  # as a fraction of all steps
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": True,
}
"""The defaults that differ from TRL's."""

LONG_CONTEXT: dict[str, Any] = {
    _CHECKPOINTING: True,
    "per_device_train_batch_size": 1,  # rows of different lengths need a mask, quadratic in length
    "per_device_eval_batch_size": 1,
    "max_length": None,  # all positions of the model
}
"""Set by `long_context` over the DEFAULTS; accumulation keeps the number of rows in a step."""

_STEPS = 100  # if neither steps nor epochs are given
_FULL_RATE = 2e-5  # learning rate when every weight is trained
_INSTEAD = {
    "output_dir": "--output is the folder",
    "resume_from_checkpoint": "--resume goes on from the last whole checkpoint",
    "trust_remote_code": "code of a model's folder is never run",
    "model_init_kwargs": "the model is loaded by --dtype, --attention and --load-in-4bit",
    "chat_template_path": "the tokenizer's chat template is used; put another into its folder",
    "eos_token": "the tokenizer's is used",
    "pad_token": "the tokenizer's is used",
    "truncation_mode": "rows lose their end",
    "dataset_text_field": "a whole text is the key 'text'",
    "dataset_kwargs": "rows are read and encoded before TRL sees them",
    "completion_only_loss": "a row of prompt and completion labels the completion alone",
    "assistant_only_loss": "a conversation labels the assistant's turns alone",
}
"""Options of TRL that would have no effect here, and what to do instead."""


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class RunOptions:
    """Options of a run that are neither TRL's nor the model's: its data, its folder, its checks.

    Raises:
        ValueError: two options exclude each other, or a number is out of its range.
    """

    data: str | None = _option(None, "Training rows: a file, a saved data set or a hub id.")
    data_split: str | None = _option(
        None, "Split of a data set that has several; 'train' if unset."
    )
    output: str = _option("str-kernels-run", "Folder to make.")
    eval_data: str | None = _option(None, "Rows for evaluation, as DATA.")
    eval_fraction: float = _option(0.0, "Fraction of DATA held out for evaluation.")
    early_stopping: int | None = _option(
        None, "Stop after this many evaluations without a better loss, and keep the best."
    )
    full: bool = _option(False, "Train every weight, not adapters.")
    long_context: bool = _option(
        False, "Gradient checkpointing and one row a forward: the least memory for long rows."
    )
    eval_refusals: int = _option(
        0, "Ask this many harmful and harmless probes before and after, and report the refusals."
    )
    resume: bool = _option(False, "Resume an unfinished run from its last whole checkpoint.")
    overwrite: bool = _option(False, "Replace a run's folder.")
    keep_checkpoints: bool = _option(False, "Keep the checkpoints of a finished run.")
    dry_run: bool = _option(False, "Print the plan and the first row, and train nothing.")

    def __post_init__(self) -> None:
        if not self.data:
            raise ValueError("`data` must be given: a file, a saved data set or a hub id")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"`eval_fraction` must be in [0, 1); got {self.eval_fraction}")
        if self.eval_data and self.eval_fraction:
            raise ValueError("`eval_fraction` must be 0 with `eval_data`; got both")
        if self.early_stopping is not None and self.early_stopping < 1:
            raise ValueError(f"`early_stopping` must be >= 1; got {self.early_stopping}")
        if self.early_stopping is not None and not self.evaluates:
            raise ValueError("`early_stopping` must have `eval_data` or `eval_fraction`")
        if self.eval_refusals < 0:
            raise ValueError(f"`eval_refusals` must be >= 0; got {self.eval_refusals}")

    @property
    def evaluates(self) -> bool:
        """Whether there are rows for evaluation."""
        return bool(self.eval_data or self.eval_fraction)


@dataclass(frozen=True)
class FinetuneOptions:
    """All options of a run; see `read_options`.

    Attributes:
        run: data and folder.
        training: TRL's options and those of the safety loss.
        model: options of the model and its adapters.
        chosen: names of the fields that were set by the caller or the file.
    """

    run: RunOptions
    training: SafetySFTConfig
    model: ModelConfig
    chosen: frozenset[str]


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        """Raise, where argparse would print the usage of all flags and exit."""
        said = re.sub(
            r"^argument --(\w+)[^:]*: invalid choice: (.*) \(choose from (.*)\)$",
            r"`\1` must be one of \3; got \2",
            message,
        )
        raise ValueError(re.sub(r"^argument --(\w+)[^:]*: ", r"`\1` must be valid; got an ", said))


def read_options(
    given: Mapping[str, Any], more: Sequence[str] = (), config: Path | str | None = None
) -> FinetuneOptions:
    """Make a run's options from names and values, further flags and a YAML file.

    Args:
        given: fields or ALIASES and their values; None counts as not given.
        more: flags as typed, such as ["--packing", "--lora_target_modules", "q_proj", "v_proj"].
        config: a YAML file with the same names.

    Returns:
        The options.

    Raises:
        ValueError: a name does not exist (the message suggests the nearest), or a value is wrong.

    Examples:
        >>> given = {"model": "builtin", "data": "rows.jsonl", "lr": 1e-3}
        >>> options = read_options(given, ["--lora_r", "4", "--use_cpu"])
        >>> options.training.learning_rate, options.model.lora_r, options.model.lora_alpha
        (0.001, 4, 8)
        >>> read_options(given, ["--learnig-rate", "1"])
        Traceback (most recent call last):
            ...
        ValueError: there is no option `--learnig-rate`; the nearest is `--learning-rate`
    """
    parser = _Parser([RunOptions, SafetySFTConfig, ModelConfig], allow_abbrev=False)
    flags = [_canonical(flag) for flag in more]
    typed = {**_by_field(given), **{_name(flag): True for flag in flags if flag.startswith("--")}}
    of_file = _read_config(config)
    if {"max_steps", "num_train_epochs"} <= set(typed):
        raise ValueError("`max_steps` must be left out with `num_train_epochs`; got both")
    if "num_train_epochs" in typed:
        of_file.pop("max_steps", None)  # flags override the file
    chosen = frozenset({*typed, *of_file})
    for name, instead in _INSTEAD.items():
        if name in chosen:
            raise ValueError(f"`{name}` must be left out: {instead}")
    by_epochs = "max_steps" not in chosen and "num_train_epochs" in chosen
    defaults = DEFAULTS | {"max_steps": -1 if by_epochs else _STEPS}
    args = [*_as_flags(of_file), *_as_flags(_by_field(given)), *flags]
    run, training, model, rest = _parsed(parser, args, defaults)
    if run.long_context:
        run, training, model, rest = _parsed(parser, args, defaults | LONG_CONTEXT)
    for word in rest:
        if word.startswith("-"):
            flag = word.partition("=")[0]
            raise ValueError(f"there is no option `{flag}`{_nearest(flag)}")
        raise ValueError(f"there must be an option before {word!r}; MODEL and DATA come first")
    _complete(run, training, model, chosen)
    return FinetuneOptions(run, training, model, chosen)


def _parsed(parser: TrlParser, args: list[str], defaults: dict[str, Any]) -> Any:
    parser.set_defaults_with_config(**defaults)
    return parser.parse_args_into_dataclasses(args=args, return_remaining_strings=True)


def _complete(
    run: RunOptions, training: SafetySFTConfig, model: ModelConfig, chosen: frozenset[str]
) -> None:
    """Set the options that depend on others, and check what TRL does not."""
    if not model.model_name_or_path:
        raise ValueError("`model` must be given: 'builtin', a folder or a hub id")
    if run.full and "learning_rate" not in chosen:
        training.learning_rate = _FULL_RATE
    if run.long_context and "gradient_accumulation_steps" not in chosen:
        rows = DEFAULTS["per_device_train_batch_size"]
        training.gradient_accumulation_steps = max(1, rows // training.per_device_train_batch_size)
    _check_numbers(training, model, chosen)
    for name in ("safety_tokens", "safety_templates"):
        file = getattr(training, name)
        if file is not None and not Path(file).is_file():
            raise ValueError(f"`{name}` must be a file; got {file}, which is not there")
    if run.full and (model.load_in_4bit or model.load_in_8bit):
        raise ValueError("`full` must be off for weights in 4 or 8 bits, which are not trained")
    if model.lora_task_type != "CAUSAL_LM":
        raise ValueError(f"`lora_task_type` must be CAUSAL_LM; got {model.lora_task_type!r}")
    if model.lora_alpha is None:
        model.lora_alpha = 2 * model.lora_r
    modules = model.lora_target_modules
    if isinstance(modules, str) and modules.isidentifier():
        # ModelConfig unwraps a list of one name, and PEFT would read a plain string as a pattern
        model.lora_target_modules = [modules]
    if run.full:
        model.use_peft = False
    training.dataloader_pin_memory = training.dataloader_pin_memory and torch.cuda.is_available()
    _choose_evaluation(run, training, chosen)


def _check_numbers(training: SafetySFTConfig, model: ModelConfig, chosen: frozenset[str]) -> None:
    for of, name in (
        (training, "learning_rate"),
        (training, "num_train_epochs"),
        (model, "lora_alpha"),
    ):
        value = getattr(of, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be finite and > 0; got {value}")
    counts = [(training, "per_device_train_batch_size"), (training, "gradient_accumulation_steps")]
    counts += [(model, "lora_r")] + [(training, "max_steps")] * ("max_steps" in chosen)
    for of, name in counts:
        if getattr(of, name) < 1:
            raise ValueError(f"`{name}` must be >= 1; got {getattr(of, name)}")
    if not 0 <= model.lora_dropout < 1:
        raise ValueError(f"`lora_dropout` must be in [0, 1); got {model.lora_dropout}")
    if training.max_length is not None and training.max_length < 2:
        raise ValueError(f"`max_length` must be >= 2; got {training.max_length}")


def _choose_evaluation(run: RunOptions, training: SafetySFTConfig, chosen: frozenset[str]) -> None:
    """Evaluate whenever a checkpoint is saved, unless the options say otherwise."""
    if not run.evaluates:
        if training.eval_strategy != "no":
            raise ValueError("`eval_strategy` must have rows: give `eval_data` or `eval_fraction`")
        return
    if "eval_strategy" not in chosen:
        training.eval_strategy = "steps" if "eval_steps" in chosen else training.save_strategy
        if training.eval_strategy == "no":
            training.eval_strategy = "epoch"
        if "eval_steps" not in chosen:
            training.eval_steps = training.save_steps
    if run.early_stopping is None:
        return
    for name, other in (("save_strategy", "eval_strategy"), ("save_steps", "eval_steps")):
        wanted = getattr(training, other)
        if name in chosen and getattr(training, name) != wanted:
            raise ValueError(
                f"`{name}` must be that of `{other}`, {wanted}, with `early_stopping`: the best is "
                f"one of the checkpoints; got {getattr(training, name)}"
            )
        setattr(training, name, wanted)
    training.load_best_model_at_end = True
    training.metric_for_best_model, training.greater_is_better = "eval_loss", False


def _read_config(config: Path | str | None) -> dict[str, Any]:
    if config is None:
        return {}
    try:
        found = yaml.safe_load(Path(config).read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        raise ValueError(f"`config` must be a YAML file; got {config}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"`config` must be a YAML file of names and values; got {config}")
    return _by_field({str(name).replace("-", "_"): value for name, value in found.items()})


def _by_field(given: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in given.items():
        if value is None:
            continue
        known = ALIASES.get(name, name)
        if known in found:
            raise ValueError(f"`{name}` must be given once; it is `{known}`, which is there too")
        found[known] = value
    return found


def _as_flags(values: Mapping[str, Any]) -> list[str]:
    """Return values as flags, so that one parser checks values from every source."""
    flags = []
    for name, value in values.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            flags.append(f"--{name}={json.dumps(value)}")
        else:
            flags.append(f"--{name}={value}")
    return flags


def _canonical(flag: str) -> str:
    """Replace a flag's short name by its field's name; return values unchanged."""
    if not flag.startswith("--"):
        return flag
    name, equals, value = flag[2:].partition("=")
    name = name.replace("-", "_")
    known = ALIASES.get(name.removeprefix("no_"))
    if known is not None and name.startswith("no_") and not equals:
        return f"--{known}=false"
    known = ALIASES.get(name)
    return flag if known is None else f"--{known}{equals}{value}"


def _name(flag: str) -> str:
    return flag[2:].partition("=")[0].replace("-", "_")


def _nearest(flag: str) -> str:
    kinds = (RunOptions, SafetySFTConfig, ModelConfig)
    names = {*ALIASES, *(one.name for kind in kinds for one in fields(kind))}
    known = [f"--{name}" for name in sorted(names)]
    known += [f"--{name.replace('_', '-')}" for name in sorted(names)]
    close = difflib.get_close_matches(flag, known, n=1)
    return f"; the nearest is `{close[0]}`" if close else ""


@contextlib.contextmanager
def short_names() -> Iterator[None]:
    """Make errors name options by their short names, as they are typed."""
    short = {name: alias for alias, name in ALIASES.items() if alias != name}
    try:
        yield
    except ValueError as error:
        said = re.sub(r"`(\w+)`", lambda found: f"`{short.get(found[1], found[1])}`", str(error))
        raise ValueError(said) from error
