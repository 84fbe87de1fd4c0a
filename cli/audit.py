"""`spectool audit`: what compression changed in a model's answers, and what outputs give away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import typer

from spectool.cli.common import Output, prepare_torch
from spectool.cli.derive import Command, configs_of, derive
from spectool.evaluate.audit.options import TrustOptions
from spectool.shared_options import LoadOptions

if TYPE_CHECKING:
    from spectool.evaluate.audit.scoring import Rates
    from spectool.evaluate.audit.trust import Trust
    from spectool.evaluate.gates import Checked
    from spectool.evaluate.intervals import Interval


def trust(output: Output, options: TrustOptions, load: LoadOptions) -> None:
    """Compare MODEL's answers with its reference's: eight dimensions of trust, flips, drift."""
    prepare_torch(load.threads)
    from spectool.evaluate.audit.trust import audit_trust
    from spectool.evaluate.results import as_json

    output.show_plan = lambda plan: output.say(
        f"{len(plan.suite.items)} items of the suite {plan.suite.name}, and "
        f"{plan.windows.num_tokens} tokens of text, for both checkpoints"
    )
    result = audit_trust(load, options, reporter=output)
    for line in _trust_lines(result):
        output.show(line)
    _finish(output, as_json(result), result.gates)


def _finish(output: Output, result: dict[str, Any], gates: Sequence[Checked]) -> None:
    """Show the gates, write the result, and exit with 3 if a gate does not hold."""
    for checked in gates:
        word = "holds" if checked.holds else "does not hold"
        output.show(f"gate {checked.expression}: {word} ({checked.value:.4g})")
    output.result(result)
    if not all(checked.holds for checked in gates):
        raise typer.Exit(3)


def _points(interval: Interval, sign: str = "") -> str:
    value, lower, upper = (
        f"{x + 0.0:{sign}.1f}" for x in (interval.value, interval.lower, interval.upper)
    )
    return f"{value} [{lower}, {upper}]"


def _share(interval: Interval) -> str:
    return f"{interval.value:.2%} [{interval.lower:.2%}, {interval.upper:.2%}]"


def _trust_lines(result: Trust) -> list[str]:
    lines = []
    for name, each in result.dimensions.items():
        left_out = f", {each.unscored} unscored" if each.unscored else ""
        lines.append(
            f"{name} ({each.items} items{left_out}): {_points(each.reference)} -> "
            f"{_points(each.model)}, change {_points(each.delta, '+')}, Holm's p "
            f"{each.p_holm:.2g}: {each.verdict}{', degenerate' if each.degenerate else ''}"
        )
        if each.reference_replies is not None and each.model_replies is not None:
            lines.append(f"{name}: {_replies(each.reference_replies, each.model_replies)}")
        if each.delta_by_reply is not None:
            changes = ", ".join(f"{change:+.1f}" for change in each.delta_by_reply)
            lines.append(f"{name}: change of the greedy replies, then by seed: {changes}")
    flips, drift = result.flips, result.drift
    if flips.share.value == flips.share.value:
        lines.append(
            f"choices that changed: {_share(flips.share)}; {flips.right_to_wrong} from right to "
            f"wrong, {flips.wrong_to_right} from wrong to right"
        )
    lines += [
        f"text of {drift.tokens} tokens: KL {drift.kl} nats, 99% below {drift.kl_99:.4g}; top-1 "
        f"agreement {_share(drift.top1_agreement)}",
        f"likeliest tokens from right to wrong: {_share(drift.right_to_wrong)}, from wrong to "
        f"right: {_share(drift.wrong_to_right)}",
    ]
    lines += [f"not measured: {name}: {why}" for name, why in result.not_measured.items()]
    allowed = result.thresholds
    lines += [
        f"limits: {result.limits}",
        f"pass: the interval excludes a loss of {allowed['pass_loss']:g} points "
        f"({allowed['utility_loss']:g} of utility); fail: the loss is over "
        f"{allowed['fail_loss']:g} and the interval excludes none, or replies are degenerate; "
        "warn: neither",
        f"verdict: {result.verdict} ({result.failed} fail, {result.warned} warn)",
    ]
    return lines


def _replies(before: Rates, after: Rates) -> str:
    names = ("refused", "unparsed", "empty", "repeating")
    shares = [f"{n} {getattr(before, n):.0%} -> {getattr(after, n):.0%}" for n in names]
    return ", ".join([*shares, f"tokens {before.mean_tokens:.1f} -> {after.mean_tokens:.1f}"])


COMMANDS: dict[str, Callable[..., None]] = {"trust": trust}

AUDIT = typer.Typer(
    help="Audit a checkpoint: what compression changed in its answers, what its outputs give away",
    no_args_is_help=True,
)
# Without a callback typer would make a single subcommand the command itself.
AUDIT.callback()(lambda: None)
for name, body in COMMANDS.items():
    line = (body.__doc__ or "").removesuffix(".")
    AUDIT.command(name, cls=Command, help=line)(
        derive(body, configs_of(body), words=("audit", name))
    )
