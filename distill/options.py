"""Options of trainings, of draft heads and of weights. Imports nothing heavy."""

from __future__ import annotations

import re
import urllib.parse
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from spectool.errors import UsageError
from spectool.options import option, same_option
from spectool.shared_options import TextOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusOptions(TextOptions):
    """The text that a training reads."""

    PANEL: ClassVar = "Data"

    data: tuple[str, ...] = option(
        (), "Training text: .txt, .jsonl, .parquet (also .gz, .xz) or hub:DATASET; repeatable"
    )
    seq_len: int = option(1024, "Maximum tokens per training sequence", minimum=32)
    held_out: int = option(
        32, "Maximum number of texts held out for evaluation, at most a fifth", minimum=1
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions(CorpusOptions):
    """The text that draft heads are trained and evaluated on."""

    PANEL: ClassVar = "Data"

    regenerate: bool = option(
        False, "Train on answers that MODEL generates in place of those in the data", switch=True
    )
    regenerate_url: str | None = option(
        None,
        "OpenAI-compatible server that generates the answers to train on: http://HOST:PORT/v1",
    )
    regenerate_model: str | None = option(
        None, "Model name on the --regenerate-url server; required if it serves several"
    )
    temperature: float = option(
        0.8, "Sampling temperature for --regenerate and --regenerate-url", minimum=0
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadsOptions(DataOptions):
    """Options of a training of draft heads that every method has, apart from where it runs.

    Raises:
        UsageError: no data, options that exclude each other, or a malformed URL.
    """

    PANEL: ClassVar = "Training"

    init_from: str | None = option(
        None,
        "Draft heads to start from, a directory or a hub id, in spectool's, vLLM's Medusa, EAGLE-3 "
        "or speculators format",
    )
    steps: int | None = option(None, "Optimizer steps; 0: write untrained heads", minimum=0)
    epochs: int = option(1, "Passes over the training text, instead of --steps", minimum=1)
    batch_tokens: int = option(4096, "Maximum tokens per step, padding included", minimum=32)
    sequence_packing: bool = option(
        False, "Pack several texts into each sequence, masked from each other", switch=True
    )
    features: str = option(
        "online",
        "Hidden states of MODEL that the heads read: computed at every step (online), computed "
        "once and stored for this run (hybrid), or stored in a directory for later runs too "
        "(offline:DIR)",
    )
    learning_rate: float | None = option(
        None, "Peak learning rate; default: set by the method", minimum=0
    )
    warmup: float = option(
        0.05, "Share of the steps with a rising learning rate", minimum=0, maximum=1
    )
    optimizer: Literal["adamw", "adamw8bit"] = option(
        "adamw", "Optimizer; adamw8bit, of bitsandbytes, keeps its moments in 8 bits"
    )
    autocast: Literal["bfloat16"] | None = option(
        None, "Dtype the heads compute in, bfloat16; default: float32, as their weights"
    )
    seed: int = option(0, "Random seed")

    def validate(self) -> None:
        """Check what involves more than one option; `regenerate_url` implies `regenerate`."""
        _check_data(self)
        _check_length(self)
        if self.regenerate_url is not None:
            parts = urllib.parse.urlsplit(self.regenerate_url)
            if parts.scheme not in ("http", "https") or not parts.netloc:
                raise UsageError(
                    f"--regenerate-url {self.regenerate_url}: expected http://HOST:PORT/v1 or https"
                )
            object.__setattr__(self, "regenerate", True)
        elif self.regenerate_model is not None:
            raise UsageError("--regenerate-model: only with --regenerate-url, which is not given")
        kind, colon, path = self.features.partition(":")
        if (kind, colon, bool(path)) not in (
            ("online", "", False), ("hybrid", "", False), ("offline", ":", True),
        ):  # fmt: skip
            raise UsageError(
                f"--features {self.features}: expected online, hybrid or offline:DIRECTORY"
            )

    @property
    def store(self) -> Path | None:
        """Return the directory of an offline feature store, if one is used."""
        kind, _, path = self.features.partition(":")
        return Path(path) if kind == "offline" else None


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptanceOptions(CorpusOptions):
    """Options of a training of an acceptance head, apart from where it runs.

    Raises:
        UsageError: no data, or options that exclude each other.
    """

    PANEL: ClassVar = "Training"

    draft_model: str = option(..., "Checkpoint that drafts for MODEL, with the same tokenizer")
    regenerate: bool = same_option(DataOptions, "regenerate")
    temperature: float = option(
        1.0, "Temperature of drafting and acceptance, and of --regenerate; 0: greedy", minimum=0
    )
    steps: int | None = option(None, "Optimizer steps; 0: write an untrained head", minimum=0)
    epochs: int = same_option(HeadsOptions, "epochs")
    batch_tokens: int = same_option(HeadsOptions, "batch_tokens")
    learning_rate: float | None = same_option(HeadsOptions, "learning_rate")
    warmup: float = same_option(HeadsOptions, "warmup")
    optimizer: Literal["adamw", "adamw8bit"] = same_option(HeadsOptions, "optimizer")
    seed: int = same_option(HeadsOptions, "seed")

    def validate(self) -> None:
        """Check what involves more than one option."""
        _check_data(self)
        _check_length(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgeOptions(TextOptions):
    """Options of a training of a judge head, apart from where it runs.

    Raises:
        UsageError: no data, or `answer` is no regular expression.
    """

    PANEL: ClassVar = "Training"

    draft_model: str = same_option(AcceptanceOptions, "draft_model")
    data: tuple[str, ...] = option(
        (), 'Prompts with checkable answers, rows as {"prompt": ..., "answer": ...}; repeatable'
    )
    answer: str = option(
        r"-?\d+(?:[.,]\d+)*",
        "Regular expression of the answer in a reply: its last match, or the group that took part",
    )
    max_new_tokens: int = option(256, "Maximum number of tokens of a reply", minimum=1)
    held_out: int = option(
        200, "Maximum number of prompts held out for the threshold, at most a fifth", minimum=1
    )
    seed: int = same_option(HeadsOptions, "seed")

    def validate(self) -> None:
        """Check the data and the regular expression."""
        if not self.data:
            raise UsageError("no data", hint="--data FILE, prompts with checkable answers")
        try:
            matches_nothing = re.compile(self.answer).fullmatch("") is not None
        except (re.error, OverflowError, RecursionError) as error:
            raise UsageError(f"--answer {self.answer}: no regular expression: {error}") from None
        if matches_nothing:
            raise UsageError(
                f"--answer {self.answer!r} matches an empty text, as every reply has at its end"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsOptions(CorpusOptions):
    """Options of a training of weights that every objective has, apart from where it runs.

    Raises:
        UsageError: options that exclude each other.
    """

    PANEL: ClassVar = "Training"

    teacher: str | None = option(
        None,
        "Checkpoint whose probabilities to learn in place of the text's tokens, or a file of them "
        "with their text, of eval --save-reference; of MODEL's tokenizer",
    )
    steps: int | None = option(None, "Optimizer steps", minimum=1)
    epochs: int = option(1, "Passes over the training text, instead of --steps", minimum=1)
    batch_tokens: int = option(2048, "Maximum tokens per step, padding included", minimum=32)
    learning_rate: float | None = option(
        None, "Peak learning rate; default: set by the method", minimum=0
    )
    optimizer: Literal["adamw", "adamw8bit"] = option(
        "adamw", "Optimizer; adamw8bit, of bitsandbytes, keeps its moments in 8 bits"
    )
    seed: int = option(0, "Random seed")

    def validate(self) -> None:
        """Check what involves more than one option."""
        _check_length(self)


def _check_data(options: HeadsOptions | AcceptanceOptions) -> None:
    """Raise UsageError if there is no text."""
    if not options.data:
        raise UsageError("no data", hint="--data FILE, with text like that to be generated")


def _check_length(options: HeadsOptions | AcceptanceOptions | WeightsOptions) -> None:
    """Raise UsageError if two options tell the length of a training."""
    if options.steps is not None and options.epochs != 1:
        raise UsageError("--steps and --epochs exclude each other")
