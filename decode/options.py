"""Options of decoding: how tokens are sampled and drafts verified, and which drafter runs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict, cast

from spectool import methods
from spectool.errors import UsageError
from spectool.options import Config, option
from spectool.shared_options import LoadOptions

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers.generation.logits_process import LogitsProcessor

    from spectool.decode.control.base import Control

# Beyond these temperatures the probabilities are one-hot or flat to the last bit of fp32; quotients
# become NaN only further out.
_COLDEST, _HOTTEST = 1e-30, 1e30


class SamplingOptions(TypedDict, total=False):
    """The options of `SamplingParams`, as keyword arguments of functions that make one."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    no_repeat_ngram_size: int


class DecodingOptions(SamplingOptions, total=False):
    """Options that all prompts of a call share, as keyword arguments."""

    seed: int
    stop: Sequence[str]
    verify: str | None
    lossy: bool


# Without slots, so that `warpers` is made once.
@dataclass(frozen=True, kw_only=True)
class SamplingParams(Config):
    """The logits processors before the verifier, in transformers' order.

    Temperature 0 means greedy; the filters `top_k`, `top_p` and `min_p` then change nothing.

    Raises:
        UsageError: a value outside its range.
    """

    PANEL: ClassVar = "Sampling"

    temperature: float = option(0.0, "Sampling temperature; 0: greedy decoding", minimum=0)
    top_k: int = option(0, "Sample from the K most likely tokens only; 0: from all", minimum=0)
    top_p: float = option(
        1.0,
        "Sample from the most likely tokens up to this total probability; 1: from all",
        minimum=0,
        maximum=1,
    )
    min_p: float = option(
        0.0,
        "Drop tokens below this share of the most likely token's probability; 0: none",
        minimum=0,
        maximum=1,
    )
    repetition_penalty: float = option(
        1.0, "Factor that makes tokens of the prompt and the output less likely; 1: off"
    )
    no_repeat_ngram_size: int = option(
        0, "Let no n-gram of this size occur twice; 0: off", minimum=0
    )

    def validate(self) -> None:
        """Check the ranges without their lower end."""
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) <= 0:
                raise UsageError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: expected a positive number "
                    "(1: off)"
                )

    @functools.cached_property
    def warpers(self) -> tuple[LogitsProcessor, ...]:
        """The processors of the logits of a sampled token."""
        from transformers.generation import logits_process

        warpers: list[LogitsProcessor] = []
        if self.temperature not in (0.0, 1.0):
            bounded = min(max(float(self.temperature), _COLDEST), _HOTTEST)
            warpers.append(logits_process.TemperatureLogitsWarper(bounded))
        if self.top_k:
            warpers.append(logits_process.TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(logits_process.TopPLogitsWarper(self.top_p))
        if self.min_p > 0:
            warpers.append(logits_process.MinPLogitsWarper(self.min_p))
        return tuple(warpers)

    @property
    def greedy(self) -> bool:
        """Return whether decoding is greedy."""
        return self.temperature == 0

    def controls(self) -> list[Control[Any]]:
        """Return the penalties as controls, in transformers' order."""
        from spectool.decode.control.penalties import NoRepeatNgram, RepetitionPenalty

        found: list[Control[Any]] = []
        if self.repetition_penalty != 1:
            found.append(RepetitionPenalty(float(self.repetition_penalty)))
        if self.no_repeat_ngram_size:
            found.append(NoRepeatNgram(self.no_repeat_ngram_size))
        return found

    def probs(self, logits_BNV: Tensor) -> Tensor:
        """Return the probabilities of the token after each node, fp32 [B, N, V].

        `logits_BNV` are what the request's controls left of the model's. When greedy they are
        returned as they are: one-hot rows would cost a vocabulary a node and say no more.
        """
        if self.greedy:
            return logits_BNV
        scores_NV = logits_BNV.flatten(0, 1).float()
        if self.temperature != 1:
            # With 0 as the largest score no quotient overflows upwards, however cold it gets.
            scores_NV = scores_NV - scores_NV.amax(-1, keepdim=True)
        for warper in self.warpers:
            # None of the four reads the token ids.
            ids: torch.LongTensor = cast("torch.LongTensor", None)
            scores_NV = warper(ids, cast("torch.FloatTensor", scores_NV))
        return scores_NV.softmax(-1).view(logits_BNV.shape)


# How decoder layers may run (`target/fused.py`).
FORWARDS = ("auto", "fused", "modules")


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOptions(Config):
    """Options of the verification of drafted tokens."""

    PANEL: ClassVar = "Sampling"

    verify: str | None = option(
        None, "Rule that accepts drafted tokens; default: the exact one for the drafter"
    )
    lossy: bool = option(
        False, "Allow a verification rule that changes the output distribution", switch=True
    )
    seed: int = option(0, "Random seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions(VerifyOptions):
    """Options of a request besides its prompt and its sampling."""

    PANEL: ClassVar = "Sampling"

    stop: tuple[str, ...] = option((), "Stop the output before this text; repeatable")
    logit_bias: tuple[str, ...] = option(
        (),
        "TOKEN=VALUE: add a number to the logit of a token id, -inf to exclude it; repeatable",
    )
    ban: tuple[str, ...] = option((), "Text that the output never completes; repeatable")


@dataclass(frozen=True, slots=True, kw_only=True)
class StrategyOptions(Config):
    """A second model, and the rule by which both write one text."""

    PANEL: ClassVar = "Model"

    strategy: str | None = option(
        None, "Let two models take turns, NAME[:key=value,...]: entropy; lossy, without a drafter"
    )
    small: str | None = option(
        None, "Smaller checkpoint for --strategy with MODEL's tokenizer: directory or hub id"
    )

    def validate(self) -> None:
        """Check that both are given, and the strategy's name and options, before anything loads."""
        if (self.strategy is None) != (self.small is None):
            given, missing = ("--small", "--strategy") if self.small else ("--strategy", "--small")
            hint = "--strategy entropy --small CHECKPOINT"
            raise UsageError(f"{given} needs {missing}", hint=hint)
        if self.strategy is not None:
            name, _, pairs = self.strategy.partition(":")
            methods.get_method(name, "strategy")
            if pairs:
                # Imported here: strategies need torch, which the check of a name does without.
                methods.import_method(name, "strategy").Config.from_text(pairs)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions(LoadOptions):
    """A model, and how its cache keeps keys and values."""

    PANEL: ClassVar = "Model"

    kv: str = option(
        "dense",
        f"Store of keys and values, NAME[:key=value,...]: {', '.join(methods.list_methods('kv'))}",
    )
    forward: str = option(
        "auto",
        "How decoder layers run: fused (one call in C each), modules (transformers' own), or auto "
        "(fused where a layer's steps are known and compute the same)",
    )

    def validate(self) -> None:
        """Check the store, its options and the forward before anything is loaded."""
        if self.forward not in FORWARDS:
            raise UsageError(f"--forward {self.forward}: expected one of {', '.join(FORWARDS)}")
        methods.get_method(self.kv.partition(":")[0], "kv")
        if ":" in self.kv:
            # Imported here: stores need torch, which the default does without.
            from spectool.decode.kv.base import parse_kv

            parse_kv(self.kv)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerOptions(CacheOptions):
    """A model to decode with."""

    PANEL: ClassVar = "Model"

    context: int | None = option(
        None, "Maximum number of tokens of prompt and output together", minimum=1
    )
    allow_other_target: bool = option(
        False, "Run draft heads that were trained for another model", switch=True
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterOptions(RunnerOptions):
    """A model to decode with, and its drafter."""

    PANEL: ClassVar = "Model"

    draft: str = option(
        "auto", "Drafter, directory of draft heads or smaller checkpoint: NAME[:key=value,...]"
    )
