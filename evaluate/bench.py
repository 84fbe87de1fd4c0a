"""`bench`: compare drafters on one machine, and check that the output is unchanged.

Plain decoding runs first and sets each prompt's limit: output is cut where it starts to repeat
itself, since any drafter is fast inside a loop. Then plain decoding, every drafter and, on request,
transformers' `generate` are timed in one process with the same prompts and limits. They alternate
on every batch of prompts, so that changes of the machine's speed affect all of them alike.

By a protocol (`speed_protocols.py`) nothing is cut, and each contender answers every turn of a
question after its own answers to the turns before.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from spectool.data.text import Prompt
from spectool.decode.generate import Runner
from spectool.decode.options import SamplingParams, VerifyOptions
from spectool.decode.policy.chain import FirstPath
from spectool.decode.prompts import encode
from spectool.decode.protocol import Drafter
from spectool.decode.result import Result, loop_start
from spectool.errors import UsageError
from spectool.evaluate import baselines, speed_protocols
from spectool.evaluate.baselines import Decode, Job
from spectool.evaluate.speed_protocols import Asked, Scores
from spectool.evaluate.turns import LEAST_ROOM, Timed, add_times, make_job, time_batch
from spectool.model.kernels import precision_of
from spectool.model.loading import describe_runtime
from spectool.report import (
    SILENT,
    ChainRates,
    NoBaselines,
    PlainDecoding,
    PromptsLeftOut,
    Reporter,
    Timing,
)

# Category of prompts without one in a file with categories.
NO_CATEGORY = "other"
TOKENS_PER_FORWARD = (
    "tokens per forward: new tokens, the first and each token that the model adds included, by "
    "passes of the model, prefills included; plain decoding has 1"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of a comparison.

    With `chain_lengths` N, each drafter's `chain` lists its tokens per forward when only the first
    path of its trees is verified, cut to 1, 2, ..., N tokens. `baselines`: also run transformers'
    `generate`, at batch size 1 only. `protocol`: the name of one of `speed_protocols.PROTOCOLS`.
    """

    drafts: Sequence[str] = ()
    max_new_tokens: int = 128
    batch_size: int = 1
    baselines: bool = False
    sampling: SamplingParams = field(default_factory=SamplingParams)
    verification: VerifyOptions = field(default_factory=VerifyOptions)
    chain_lengths: int = 0
    protocol: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way to decode, measured on some prompts.

    `identical` counts prompts with the same tokens as plain decoding; it is None for plain decoding
    itself and when sampling, which promises equal distributions rather than equal tokens.
    `acceptance_by_depth[d]`: of the steps that drafted d + 1 tokens deep, the share that accepted
    as deep. `scores` are those of a protocol. The shares are those of the seconds; `step_speedup`
    excludes the prefill, which drafting cannot shorten; these are None for the baselines.
    """

    name: str
    prompts: int
    new_tokens: int
    forwards: int
    drafted: int
    accepted: int
    tokens_per_forward: float
    tokens_per_second: float
    seconds: float
    lossless: bool
    speedup: float
    identical: int | None
    acceptance_by_depth: list[float] = field(default_factory=list)
    scores: Scores | None = None
    prompt_share: float | None = None
    draft_share: float | None = None
    target_share: float | None = None
    host_share: float | None = None
    step_speedup: float | None = None
    draft_ms: float | None = None
    speedup_over_transformers: float | None = None
    speedup_over_prompt_lookup: float | None = None
    chain: list[float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Plain decoding, the drafters and transformers' `generate` on the prompts of a category."""

    category: str | None = None
    baseline: Row
    drafters: list[Row]
    baselines: list[Row]

    @property
    def rows(self) -> list[Row]:
        return [self.baseline, *self.drafters, *self.baselines]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run(Part):
    """A comparison on all prompts, which is the sum of its categories.

    `turns`: answers that plain decoding gave, `turns_left_out` of which the context had no room.
    `definitions`: what the figures of several meanings mean here.
    """

    model: str
    runtime: str
    protocol: str | None = None
    definitions: dict[str, str]
    categories: list[Part]
    prompts: int
    prompts_left_out: int
    turns: int
    turns_left_out: int
    batch_size: int
    dtype: str
    activations: str
    kv: str
    kv_bytes_per_token: int | None
    kept_share: float
    prompts_cut: int


def bench(
    runner: Runner,
    prompts: Sequence[Prompt],
    options: Options,
    *,
    reporter: Reporter = SILENT,
) -> Run:
    """Time plain decoding, each drafter and the baselines.

    Raises:
        UsageError: an option is invalid, or no prompt fits in the context.
    """
    if options.protocol is not None:
        speed_protocols.check_sampling(options.protocol, options.sampling)
    # Opened and checked before any forward, so that an invalid drafter or rule fails at once.
    drafters = [runner.open(draft) for draft in options.drafts]
    for drafter in drafters:
        rule, lossy = options.verification.verify, options.verification.lossy
        runner.verification(drafter, options.sampling, verify=rule, lossy=lossy)
    jobs = [
        make_job(prompt, tokens, options.max_new_tokens)
        for prompt, tokens in select_fitting(runner, prompts, options.max_new_tokens, reporter)
    ]
    # The same batches for all, since a sampled text depends on its row in the batch.
    batches = _make_batches(jobs, options.batch_size)
    plain = _make_decoder(runner, runner.open(None), _as_plain(options))
    lengths = []
    if options.protocol is None:
        reporter.event(PlainDecoding(len(jobs)))
        for batch in itertools.chain(*batches.values()):
            for job, result in zip(batch, plain(batch), strict=True):
                job.limit = max(1, loop_start(result.token_ids))
                lengths.append((len(result.token_ids), job.limit))
    contenders = [("none", plain), *_open_contenders(runner, drafters, options, reporter)]
    for _, decode in contenders[1:]:
        # Warm-up: the first prompt allocates buffers, and is not timed.
        decode(jobs[:1])
    timed = {
        name: _time(runner, contenders, each, name, reporter) for name, each in batches.items()
    }
    names = [name for name, _ in contenders]
    parts = [
        _compare(names, each, len(drafters), options, name) for name, each in timed.items() if name
    ]
    joined = [list(itertools.chain(*each)) for each in zip(*timed.values(), strict=True)]
    whole = _compare(names, joined, len(drafters), options)
    turns, answered = sum(job.num_turns for job in jobs), sum(len(t.results) for t in joined[0])
    definitions = {"tokens_per_forward": TOKENS_PER_FORWARD}
    if options.protocol is not None:
        definitions["scores"] = speed_protocols.PROTOCOLS[options.protocol].definition
    return Run(
        model=runner.target.model.config._name_or_path,
        runtime=describe_runtime(runner.target.model),
        protocol=options.protocol,
        definitions=definitions,
        baseline=whole.baseline,
        drafters=[
            _add_chain(row, runner, drafter, jobs, options, reporter)
            for row, drafter in zip(whole.drafters, drafters, strict=True)
        ],
        baselines=whole.baselines,
        categories=parts,
        prompts=len(jobs),
        prompts_left_out=len(prompts) - len(jobs),
        turns=answered,
        turns_left_out=turns - answered,
        batch_size=options.batch_size,
        dtype=str(runner.target.model.dtype).removeprefix("torch."),
        activations=precision_of(runner.target.model),
        kv=runner.target.kv,
        kv_bytes_per_token=runner.target.kv_bytes_per_token,
        kept_share=sum(map(min, lengths)) / sum(length for length, _ in lengths)
        if lengths
        else 1.0,
        prompts_cut=sum(limit < length for length, limit in lengths),
    )


def select_fitting(
    runner: Runner, prompts: Sequence[Prompt], max_new_tokens: int, reporter: Reporter
) -> list[tuple[Prompt, list[int]]]:
    """Return the prompts that leave room for new tokens, each with its tokens.

    Raises:
        UsageError: there are none.
    """
    context, room = runner.target.context, min(LEAST_ROOM, max_new_tokens)
    encoded = [encode(prompt.given, runner.tokenizer) for prompt in prompts]
    fitting = [
        (prompt, tokens)
        for prompt, tokens in zip(prompts, encoded, strict=True)
        if len(tokens) + room <= context
    ]
    if not fitting:
        shortest = min(map(len, encoded), default=0)
        raise UsageError(
            f"no prompt fits in the context of {context} tokens with {room} new ones; the shortest "
            f"has {shortest}"
        )
    if len(fitting) < len(prompts):
        left_out = len(prompts) - len(fitting)
        reporter.event(PromptsLeftOut(left_out, len(prompts), room, context))
    return fitting


def _make_batches(jobs: Sequence[Job], size: int) -> dict[str | None, list[list[Job]]]:
    """Group the prompts by category (None without categories) and into batches."""
    unnamed = NO_CATEGORY if any(job.category for job in jobs) else None
    by_category: dict[str | None, list[list[Job]]] = {}
    for job in jobs:
        batches = by_category.setdefault(job.category or unnamed, [[]])
        if len(batches[-1]) == size:
            batches.append([])
        batches[-1].append(job)
    return by_category


def _as_plain(options: Options) -> Options:
    exact = VerifyOptions(seed=options.verification.seed)
    return dataclasses.replace(options, verification=exact)


def _make_decoder(runner: Runner, drafter: Drafter, options: Options) -> Decode:
    def decode(jobs: Sequence[Job]) -> list[Result]:
        # Not `use`, which would reset what the drafter adapts to this target.
        runner.drafter = drafter
        return runner.generate(
            [job.tokens for job in jobs],
            max_new_tokens=[job.limit for job in jobs],
            eos=[job.ends for job in jobs],
            batch_size=options.batch_size,
            **options.verification.as_dict(),
            **options.sampling.as_dict(),
        )

    return decode


def _open_contenders(
    runner: Runner, drafters: Sequence[Drafter], options: Options, reporter: Reporter
) -> Iterator[tuple[str, Decode]]:
    """Yield the drafters and then the baselines, each with its name."""
    for draft, drafter in zip(options.drafts, drafters, strict=True):
        drafter.attach(runner.target)
        yield draft, _make_decoder(runner, drafter, options)
    if options.baselines and options.batch_size == 1:
        seed = options.verification.seed
        yield from baselines.open_baselines(
            runner, drafters, control=options.sampling, seed=seed, reporter=reporter
        ).items()
    elif options.baselines:
        reporter.event(NoBaselines(options.batch_size))


def _time(
    runner: Runner,
    contenders: Sequence[tuple[str, Decode]],
    batches: Sequence[Sequence[Job]],
    category: str | None,
    reporter: Reporter,
) -> list[list[Timed]]:
    """Time all contenders on each batch of a category, in turns."""
    timed: list[list[Timed]] = [[] for _ in contenders]
    for batch in batches:
        for (_, decode), done in zip(contenders, timed, strict=True):
            done.append(time_batch(runner, decode, batch))
    for (name, _), each in zip(contenders, timed, strict=True):
        whole = add_times(each)
        speed = whole.tokens_per_second, whole.tokens_per_forward
        reporter.event(Timing(name, category, *speed))
    return timed


def _compare(
    names: Sequence[str],
    batches: Sequence[Sequence[Timed]],
    num_drafters: int,
    options: Options,
    category: str | None = None,
) -> Part:
    """Compute the metrics of plain decoding, the drafters and the baselines, in this order.

    `batches` has the times of each of them, batch by batch.
    """
    timed, greedy = [add_times(each) for each in batches], options.sampling.greedy
    rows = [
        _make_row(name, each, timed[0], greedy) for name, each in zip(names, timed, strict=True)
    ]
    if options.protocol is not None:
        asked = [[Asked(part.answers, part.seconds) for part in each] for each in batches]
        rows = [
            dataclasses.replace(row, scores=speed_protocols.score(options.protocol, each, asked[0]))
            for row, each in zip(rows, asked, strict=True)
        ]
    rows, others = rows[: 1 + num_drafters], rows[1 + num_drafters :]
    speeds = {row.name: row.tokens_per_second for row in others}

    def over(row: Row, peer: str) -> float | None:
        return row.tokens_per_second / speeds[peer] if peer in speeds else None

    rows = [
        dataclasses.replace(
            row,
            prompt_share=each.prompt / each.seconds,
            draft_share=each.draft / each.seconds,
            target_share=each.target / each.seconds,
            host_share=1 - (each.draft + each.prompt + each.target) / each.seconds,
            step_speedup=each.step_speed / timed[0].step_speed,
            draft_ms=1000 * each.draft / max(1, row.forwards),
            speedup_over_transformers=over(row, baselines.PLAIN),
            speedup_over_prompt_lookup=over(row, baselines.PROMPT_LOOKUP),
        )
        for row, each in zip(rows, timed, strict=False)
    ]
    return Part(category=category, baseline=rows[0], drafters=rows[1:], baselines=others)


def _make_row(name: str, timed: Timed, plain: Timed, greedy: bool) -> Row:
    pairs = zip(timed.answers, plain.answers, strict=True)
    same = sum(_list_tokens(ours) == _list_tokens(theirs) for ours, theirs in pairs)
    return Row(
        name=name,
        prompts=len(timed.answers),
        new_tokens=timed.new_tokens,
        forwards=timed.count("forwards"),
        drafted=timed.count("drafted"),
        accepted=timed.count("accepted"),
        tokens_per_forward=timed.tokens_per_forward,
        tokens_per_second=timed.tokens_per_second,
        seconds=timed.seconds,
        lossless=all(result.lossless for result in timed.results),
        speedup=timed.tokens_per_second / plain.tokens_per_second,
        identical=same if greedy and timed is not plain else None,
        acceptance_by_depth=_acceptance_by_depth(timed.results),
    )


def _list_tokens(answers: Sequence[Result]) -> list[list[int]]:
    return [result.token_ids for result in answers]


def _acceptance_by_depth(results: Sequence[Result]) -> list[float]:
    """Return, for each depth from 1 on, the share of accepted among the steps offered as deep."""
    offered, accepted = (
        [sum(each) for each in itertools.zip_longest(*counts, fillvalue=0)]
        for counts in ([r.offered_at for r in results], [r.accepted_at for r in results])
    )
    return [taken / given for taken, given in zip(accepted, offered, strict=True)]


def _add_chain(
    row: Row,
    runner: Runner,
    drafter: Drafter,
    jobs: Sequence[Job],
    options: Options,
    reporter: Reporter,
) -> Row:
    """Add the tokens per forward with drafts cut to chains of 1, 2, ... tokens."""
    if not options.chain_lengths:
        return row
    kinds = drafter.kinds(options.sampling)
    if not (drafter.can_be_cut and set(kinds) == {"deterministic"}):
        reporter.event(ChainRates(row.name, None))
        return row
    policies, rates = drafter.policies, []
    untuned = [policy for policy in policies if not policy.tunes]
    for depth in range(1, options.chain_lengths + 1):
        drafter.policies = [*untuned, FirstPath(depth)]
        results = _make_decoder(runner, drafter, _as_plain(options))(jobs)
        tokens = sum(len(result.token_ids) for result in results)
        rates.append(tokens / sum(result.forwards for result in results))
    drafter.policies = policies
    reporter.event(ChainRates(row.name, rates))
    return dataclasses.replace(row, chain=rates)
