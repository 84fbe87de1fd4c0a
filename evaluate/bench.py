"""`bench`: compare drafters on one machine, and check that the output is unchanged.

Plain decoding runs first and sets each prompt's limit: output is cut where it starts to repeat
itself, since any drafter is fast inside a loop. Then plain decoding, every drafter and, on request,
transformers' `generate` are timed in one process with the same prompts and limits. They alternate
on every batch of prompts, so that changes of the machine's speed affect all of them alike.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spectool.decode.generate import Result, Runner, loop_start
from spectool.decode.options import SamplingParams
from spectool.decode.policy.chain import FirstPath
from spectool.decode.policy.tuned import Tuned
from spectool.decode.protocol import Drafter
from spectool.errors import UsageError
from spectool.evaluate import baselines

Say = Callable[[str], None]

# A prompt is left out if the context has room for fewer new tokens than this, or than requested.
LEAST_ROOM = 16
# Category of prompts without one in a file with categories.
NO_CATEGORY = "other"


@dataclass(frozen=True, slots=True)
class Timed:
    """Results of some prompts, and the seconds in all and by part, as the runner measured them."""

    results: list[Result]
    seconds: float
    draft: float
    prompt: float
    target: float

    def __str__(self) -> str:
        tokens = sum(len(result.token_ids) for result in self.results)
        forwards = max(1, sum(result.forwards for result in self.results))
        return f"{tokens / self.seconds:.1f} tok/s, {tokens / forwards:.2f} tokens per forward"


def bench(
    runner: Runner,
    prompts: Sequence[str | Sequence[int]],
    drafts: Sequence[str],
    *,
    categories: Sequence[str | None] = (),
    ends: Sequence[Collection[int]] = (),
    max_new_tokens: int = 128,
    batch_size: int = 1,
    with_baselines: bool = False,
    sampling: SamplingParams | None = None,
    seed: int = 0,
    verify: str | None = None,
    lossy: bool = False,
    chain_lengths: int = 0,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """Time plain decoding, each drafter and the baselines; return `{baseline, drafters, ...}`.

    `categories`: the category of each prompt. `ends`: for each prompt, tokens that end its answer
    in addition to the model's EOS tokens. In the result, each of `categories` holds `baseline`,
    `drafters` and `baselines` like the whole, which is their sum. `identical` counts prompts with
    the same tokens as plain decoding; it is None when sampling, which promises equal distributions
    rather than equal tokens. `step_speedup` excludes the prefill, which drafting cannot shorten.
    Baselines run at batch size 1 only. With `chain_lengths` N, each drafter's `chain` lists its
    tokens per forward when only the first path of its trees is verified, cut to 1, 2, ..., N
    tokens.

    Raises:
        UsageError: an option is invalid, or no prompt fits in the context.
    """
    control = sampling or SamplingParams()
    sampled = control.as_dict()
    # Opened and checked before any forward, so that an invalid drafter or rule fails at once.
    drafters = [runner.open(draft) for draft in drafts]
    for drafter in drafters:
        runner.verification(drafter, verify=verify, lossy=lossy, **sampled)
    encoded = [runner._encode(prompt) for prompt in prompts]
    kept = _select_fitting(encoded, runner.target.context, min(LEAST_ROOM, max_new_tokens), say)
    texts = [encoded[i] for i in kept]
    kept_ends = [ends[i] if ends else () for i in kept]
    common: dict[str, Any] = {"batch_size": batch_size, "seed": seed, **sampled}
    plain = _make_decoder(runner, runner.open(None), common)
    # The same batches for all, since a sampled text depends on its row in the batch.
    batches = _batches([categories[i] if categories else None for i in kept], batch_size)
    say(f"plain decoding of {len(texts)} prompts, to find loops and to warm up")
    limits, lengths = [0] * len(texts), [0] * len(texts)
    for batch in itertools.chain(*batches.values()):
        free = plain(
            [texts[i] for i in batch],
            [max_new_tokens] * len(batch),
            [kept_ends[i] for i in batch],
        )
        for i, result in zip(batch, free, strict=True):
            lengths[i] = len(result.token_ids)
            limits[i] = max(1, loop_start(result.token_ids))

    contenders = [("none", plain)]
    for draft, drafter in zip(drafts, drafters, strict=True):
        drafter.attach(runner.target)
        decoder = _make_decoder(runner, drafter, {**common, "verify": verify, "lossy": lossy})
        contenders.append((draft, decoder))
    if with_baselines and batch_size == 1:
        opened = baselines.open_baselines(runner, drafters, control=control, seed=seed, say=say)
        contenders += opened.items()
    elif with_baselines:
        say(f"no baselines at batch size {batch_size}: transformers' run one prompt at a time here")
    for _, decode in contenders[1:]:
        # Warm-up: the first prompt allocates buffers, and is not timed.
        decode(texts[:1], limits[:1], kept_ends[:1])

    timed: list[list[Timed]] = [[] for _ in contenders]
    for category, category_batches in batches.items():
        parts: list[list[Timed]] = [[] for _ in contenders]
        for batch in category_batches:
            jobs = [(texts[i], limits[i], kept_ends[i]) for i in batch]
            for (_, decode), done in zip(contenders, parts, strict=True):
                done.append(_time(runner, decode, jobs))
        for (name, _), part, done in zip(contenders, parts, timed, strict=True):
            done.append(_sum(part))
            say(f"{category}, {name}: {done[-1]}" if category else f"{name}: {done[-1]}")
    names = [name for name, _ in contenders]
    whole = _compare(names, [_sum(parts) for parts in timed], len(drafts), control.greedy)
    for row, drafter in zip(whole["drafters"], drafters, strict=True):
        inner = drafter.drafter if isinstance(drafter, Tuned) else drafter
        if chain_lengths and not (
            inner.combines and set(inner.kinds(control)) == {"deterministic"}
        ):
            say(f"{row['name']}: no chains, since its drafts cannot be cut to their first path")
        elif chain_lengths:
            all_jobs = (texts, limits, kept_ends)
            row["chain"] = _measure_chains(runner, inner, chain_lengths, all_jobs, common)
            say(f"{row['name']}, chains: {' '.join(f'{rate:.2f}' for rate in row['chain'])}")
    return {
        **whole,
        "categories": [
            {
                "category": category,
                **_compare(names, [parts[index] for parts in timed], len(drafts), control.greedy),
            }
            for index, category in enumerate(batches)
            if category
        ],
        "prompts": len(texts),
        "prompts_left_out": len(prompts) - len(texts),
        "batch_size": batch_size,
        "dtype": str(runner.target.model.dtype).removeprefix("torch."),
        "kept_share": sum(map(min, limits, lengths)) / sum(lengths),
        "prompts_cut": sum(limit < length for limit, length in zip(limits, lengths, strict=True)),
    }


def _measure_chains(
    runner: Runner,
    drafter: Drafter,
    deepest: int,
    jobs: tuple[Sequence[Sequence[int]], Sequence[int], Sequence[Collection[int]]],
    options: dict[str, Any],
) -> list[float]:
    """Return the tokens per forward with drafts cut to chains of 1, 2, ..., `deepest` tokens."""
    rates = []
    for depth in range(1, deepest + 1):
        results = _make_decoder(runner, FirstPath(drafter, depth), options)(*jobs)
        tokens = sum(len(result.token_ids) for result in results)
        rates.append(tokens / sum(result.forwards for result in results))
    return rates


def list_mismatches(result: dict[str, Any]) -> list[str]:
    """List the lossless drafters whose float32 output differs from plain decoding."""
    if result["dtype"] != "float32":
        return []
    return [
        row["name"]
        for row in result["drafters"]
        if row["lossless"] and row["identical"] is not None and row["identical"] < row["prompts"]
    ]


def _select_fitting(
    encoded: Sequence[Sequence[int]], context: int, room: int, say: Say
) -> list[int]:
    """Return the indices of the prompts that leave room for `room` new tokens.

    Raises:
        UsageError: there are none.
    """
    kept = [i for i, ids in enumerate(encoded) if len(ids) + room <= context]
    if not kept:
        shortest = min(map(len, encoded), default=0)
        raise UsageError(
            f"no prompt fits in the context of {context} tokens with {room} new ones; the shortest "
            f"has {shortest}"
        )
    if len(kept) < len(encoded):
        say(
            f"{len(encoded) - len(kept)} of {len(encoded)} prompts left out: with {room} new "
            f"tokens they do not fit in the context of {context}"
        )
    return kept


def _batches(categories: Sequence[str | None], size: int) -> dict[str, list[list[int]]]:
    """Group the indices of the prompts by category ("" without categories) and into batches."""
    by_category: dict[str, list[list[int]]] = {}
    for index, category in enumerate(categories):
        name = category or (NO_CATEGORY if any(categories) else "")
        batches = by_category.setdefault(name, [[]])
        if len(batches[-1]) == size:
            batches.append([])
        batches[-1].append(index)
    return by_category


def _make_decoder(runner: Runner, drafter: Drafter, options: dict[str, Any]) -> baselines.Decode:
    def decode(
        prompts: Sequence[Sequence[int]],
        limits: Sequence[int],
        ends: Sequence[Collection[int]],
    ) -> list[Result]:
        # Not `use`, which would reset what the drafter adapts to this target.
        runner.drafter = drafter
        return runner.generate(prompts, max_new_tokens=limits, eos=ends, **options)

    return decode


def _time(
    runner: Runner,
    decode: baselines.Decode,
    jobs: Sequence[tuple[Sequence[int], int, Collection[int]]],
) -> Timed:
    before = dataclasses.replace(runner.timings)
    start = time.perf_counter()
    prompts, limits, ends = zip(*jobs, strict=True)
    results = decode(prompts, limits, ends)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return Timed(
        results,
        seconds,
        runner.timings.draft - before.draft,
        runner.timings.prompt - before.prompt,
        runner.timings.target - before.target,
    )


def _sum(parts: Sequence[Timed]) -> Timed:
    return Timed(
        [result for part in parts for result in part.results],
        sum(part.seconds for part in parts),
        sum(part.draft for part in parts),
        sum(part.prompt for part in parts),
        sum(part.target for part in parts),
    )


def _compare(
    names: Sequence[str], timed: Sequence[Timed], num_drafters: int, greedy: bool
) -> dict[str, Any]:
    """Compute the metrics of plain decoding, the drafters and the baselines, in this order."""
    first = timed[0].results
    rows = [_metrics(name, t.results, t.seconds) for name, t in zip(names, timed, strict=True)]
    for row, one in zip(rows, timed, strict=True):
        row["speedup"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        row["identical"] = None
        if greedy and row is not rows[0]:
            row["identical"] = sum(
                result.token_ids == plain.token_ids
                for result, plain in zip(one.results, first, strict=True)
            )
    ours, others = rows[: 1 + num_drafters], rows[1 + num_drafters :]
    speeds = {row["name"]: row["tokens_per_second"] for row in others}
    for row, one in zip(ours, timed, strict=False):
        row["draft_share"] = one.draft / one.seconds
        row["prompt_share"] = one.prompt / one.seconds
        row["target_share"] = one.target / one.seconds
        row["host_share"] = 1 - (one.draft + one.prompt + one.target) / one.seconds
        row["step_speedup"] = _step_speed(one) / _step_speed(timed[0])
        row["draft_ms"] = 1000 * one.draft / max(1, row["forwards"])
        if others:
            speed = row["tokens_per_second"]
            row["speedup_over_transformers"] = speed / speeds[baselines.PLAIN]
            row["speedup_over_prompt_lookup"] = speed / speeds[baselines.PROMPT_LOOKUP]
    return {"baseline": ours[0], "drafters": ours[1:], "baselines": others}


def _step_speed(timed: Timed) -> float:
    """Return tokens per second without the prefill and the first token, which prefill yields."""
    tokens = sum(len(result.token_ids) - 1 for result in timed.results)
    # At least 1, in case every output has a single token.
    return max(tokens, 1) / (timed.seconds - timed.prompt)


def _metrics(name: str, results: Sequence[Result], seconds: float) -> dict[str, Any]:
    tokens = sum(len(result.token_ids) for result in results)
    forwards = sum(result.forwards for result in results)
    return {
        "name": name,
        "prompts": len(results),
        "new_tokens": tokens,
        "forwards": forwards,
        "drafted": sum(result.drafted for result in results),
        "accepted": sum(result.accepted for result in results),
        "tokens_per_forward": tokens / max(1, forwards),
        "tokens_per_second": tokens / seconds,
        "seconds": seconds,
        "lossless": all(result.lossless for result in results),
    }
