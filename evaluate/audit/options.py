"""Options of the audits. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from spectool.errors import UsageError
from spectool.evaluate.options import EvalOptions
from spectool.options import option, same_option
from spectool.shared_options import TextOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditTextOptions(TextOptions):
    """The text that an audit runs on, and conditions on what it finds."""

    text: tuple[str, ...] = option(
        (),
        "Text that the model reads: .txt, .jsonl, .parquet (also .gz, .xz) or hub:DATASET; "
        "repeatable; default: the built-in text",
    )
    limit: int | None = same_option(EvalOptions, "limit")
    gate: tuple[str, ...] = option(
        (),
        "Condition on a number of the JSON by its path, such as 'drift.kl.upper<=0.01': exit code "
        "3 if it does not hold; repeatable",
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrustOptions(AuditTextOptions):
    """The checkpoint to compare with, the items, and what counts as a loss."""

    reference: str = option(..., "Checkpoint to compare with: MODEL before it was compressed")
    suite: tuple[str, ...] = option(
        (), "Items: .jsonl file, or directory of such files; repeatable; default: the smoke suite"
    )
    seeds: tuple[int, ...] = option(
        (),
        "Seeds of further replies to each item of task generate, sampled at temperature 1; a list "
        "such as 0,1,2; default: the greedy reply alone",
    )
    max_new_tokens: int = option(48, "Maximum number of new tokens of a reply", minimum=1)
    scorer: str | None = option(
        None,
        "MODULE:FUNCTION that scores a prompt and a reply from 0 to 1 (best), for items without a "
        "rule of their own, such as toxicity",
    )
    pass_loss: float = option(
        3.0, "A dimension passes if its interval excludes a loss of so many points", minimum=0
    )
    utility_loss: float = option(2.0, "The same for the dimension utility", minimum=0)
    fail_loss: float = option(
        5.0,
        "A dimension fails if it lost more points than this and its interval excludes no loss",
        minimum=0,
    )
    most_unscored: float = option(
        0.1,
        "A dimension does not pass if more than this share of its items has no score",
        minimum=0,
        maximum=1,
    )
    outputs: Path | None = option(
        None,
        "File to write all log-likelihoods and replies to; what it holds already is not run "
        "again, only scored again",
    )

    def validate(self) -> None:
        if max(self.pass_loss, self.utility_loss) > self.fail_loss:
            raise UsageError(
                f"--fail-loss {self.fail_loss:g}: must be at least --pass-loss and --utility-loss"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobsOptions(AuditTextOptions):
    """Options of `audit logprobs`: how much an observer sees, how the inverter is trained."""

    spare: int = option(
        100, "Log-probabilities shown of a position, beyond the model's width", minimum=1
    )
    prompts: int = option(4000, "Prompts cut from the text, at most", minimum=50)
    prompt_tokens: int = option(8, "Tokens of a prompt that the inverter guesses", minimum=1)
    watched: int = option(
        8, "Generated tokens whose log-probabilities the inverter sees", minimum=1
    )
    steps: int = option(600, "Training steps of the inverter", minimum=1)
    seed: int = option(0, "Seed of the tokens shown, the prompts' order and the inverter")


@dataclass(frozen=True, slots=True, kw_only=True)
class FeaturesOptions(AuditTextOptions):
    """Options of `audit features`: the tokens that are read back from states."""

    places: tuple[int, ...] = option(
        (0, 1, 2, 4), "How many places before a state's own the tokens are that are read"
    )
    seed: int = option(0, "Seed of the control's order of tokens")

    def validate(self) -> None:
        if not self.places or min(self.places) < 0:
            given = ",".join(map(str, self.places))
            raise UsageError(f"--places {given}: expected numbers from 0 on, as 0,1,2")
