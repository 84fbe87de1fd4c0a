"""`spectool audit`: what compression changed in a model's answers, and what outputs give away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import typer

from spectool.cli.common import Output, prepare_torch
from spectool.cli.derive import Command, configs_of, derive
from spectool.evaluate.audit.options import FeaturesOptions, LogprobsOptions, TrustOptions
from spectool.shared_options import LoadOptions

if TYPE_CHECKING:
    from spectool.evaluate.audit.features import Features
    from spectool.evaluate.audit.logprobs import Logprobs
    from spectool.evaluate.audit.scoring import Rates
    from spectool.evaluate.audit.trust import Trust
    from spectool.evaluate.gates import Checked


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


def logprobs(output: Output, options: LogprobsOptions, load: LoadOptions) -> None:
    """Audit what MODEL's log-probabilities give away: its width, all others, its prompt."""
    prepare_torch(load.threads)
    from spectool.evaluate.audit.logprobs import audit_logprobs
    from spectool.evaluate.results import as_json

    result = audit_logprobs(load, options, reporter=output)
    for line in _logprobs_lines(result):
        output.show(line)
    _finish(output, as_json(result), result.gates)


def features(output: Output, options: FeaturesOptions, load: LoadOptions) -> None:
    """Audit how much of a text can be read back from MODEL's hidden states, by layer."""
    prepare_torch(load.threads)
    from spectool.evaluate.audit.features import audit_features
    from spectool.evaluate.results import as_json

    result = audit_features(load, options, reporter=output)
    for line in _features_lines(result):
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


def _trust_lines(result: Trust) -> list[str]:
    lines = []
    for name, each in result.dimensions.items():
        left_out = f", {each.unscored} without a score" if each.unscored else ""
        lines.append(
            f"{name} ({each.items} items{left_out}): {each.reference:.1f} -> "
            f"{each.model:.1f}, change {each.delta:+.1f}, Holm's p "
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
            f"choices that changed: {flips.share:.2%}; {flips.right_to_wrong} from right to "
            f"wrong, {flips.wrong_to_right} from wrong to right"
        )
    lines.append(
        f"text of {drift.tokens} tokens: KL {drift.kl:.4g} nats, 99% below {drift.kl_99:.4g}; "
        f"top-1 agreement {drift.top1_agreement:.2%}"
    )
    lines += [f"not measured: {name}: {why}" for name, why in result.not_measured.items()]
    if result.unscored_share:
        lines.append(f"items without a score: {result.unscored_share:.1%} of {result.items}")
    allowed = result.thresholds
    lines += [
        f"limits: {result.limits}",
        f"pass: the interval excludes a loss of {allowed['pass_loss']:g} points "
        f"({allowed['utility_loss']:g} of utility), {allowed['least_scored']:g} items or more have "
        f"a score, and at most {allowed['most_unscored']:.0%} have none; fail: the loss is over "
        f"{allowed['fail_loss']:g} and the interval excludes none, or replies are degenerate; "
        "warn: neither",
        f"verdict: {result.verdict} ({result.failed} fail, {result.warned} warn)",
    ]
    return lines


def _logprobs_lines(result: Logprobs) -> list[str]:
    inversion = result.inversion
    places = ", ".join(f"{each.value:.0%}" for each in inversion.by_position)
    return [
        f"rank of the log-probabilities: {result.rank}, where the singular values fall by a factor "
        f"of {result.step:.0f}; width {result.width}, vocabulary {result.vocabulary}",
        f"all {result.vocabulary} from {result.shown} of them: error at most "
        f"{result.reconstruction_error:.1e}, KL {result.reconstruction_kl:.1e} nats, over "
        f"{result.positions} positions",
        f"prompt tokens that an inverter reads from the log-probabilities of {inversion.watched} "
        f"generated tokens: {inversion.accuracy:.1%}, from those of the first "
        f"{inversion.first_only:.1%}",
        f"by place in the prompt, first to last: {places}; whole prompts {inversion.exact:.1%}",
        f"without what belongs to the prompt: {inversion.control:.1%}; the most frequent tokens: "
        f"{inversion.chance:.1%}; {inversion.prompts} held-out prompts of "
        f"{inversion.prompt_tokens} tokens",
    ]


def _features_lines(result: Features) -> list[str]:
    places = ", ".join("own" if place == 0 else f"{place} before" for place in result.places)
    lines = [f"tokens read back, by their place: {places} (control: tokens of other states)"]
    for layer in result.layers:
        read = ", ".join(f"{each:.1%}" for each in layer.read)
        control = ", ".join(f"{each.value:.1%}" for each in layer.control)
        lines.append(f"{layer.name}: {read} (control {control})")
    return [
        *lines,
        f"the most frequent token: {result.chance:.1%}; {result.held_out} of {result.positions} "
        "positions held out",
        "stored states are as secret as their text: give a store of features (train-heads "
        "--features offline:DIR) the text's permissions, and delete it after the training",
    ]


def _replies(before: Rates, after: Rates) -> str:
    names = ("refused", "unparsed", "empty", "repeating")
    shares = [f"{n} {getattr(before, n):.0%} -> {getattr(after, n):.0%}" for n in names]
    return ", ".join([*shares, f"tokens {before.mean_tokens:.1f} -> {after.mean_tokens:.1f}"])


COMMANDS: dict[str, Callable[..., None]] = {
    "trust": trust,
    "logprobs": logprobs,
    "features": features,
}

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
