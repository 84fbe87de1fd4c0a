"""`bench`: drafters side by side on one machine, with the check that the output is unchanged.

Plain decoding runs first and sets the texts; prompts whose plain output starts to repeat itself are
cut there, since any drafter does well inside a loop. Then plain decoding and every drafter are
timed on the same prompts with the same limits, one after another in one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from spectool.decode.generate import Result, Runner, loop_start
from spectool.decode.sampling import Control, Law

Say = Callable[[str], None]


def bench(
    runner: Runner,
    prompts: Sequence[str | Sequence[int]],
    drafts: Sequence[str],
    *,
    max_new_tokens: int = 128,
    batch_size: int = 1,
    law: Law | None = None,
    seed: int = 0,
    verify: str | None = None,
    lossy: bool = False,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """`{baseline, drafters, prompts, kept_share, …}`; drafters in the order given.

    `identical` counts prompts whose tokens equal plain decoding's; None when sampling, where equal
    laws and not equal tokens are promised.
    """
    law = law or Law()
    greedy = Control(**law).greedy
    # Before any pass: a drafter or a rule that will not do is found at once.
    drafters = [runner.open(draft) for draft in drafts]
    for drafter in drafters:
        runner.pairing(drafter, verify=verify, lossy=lossy, **law)
    runner.use(None)
    say(f"plain decoding of {len(prompts)} prompts, to find loops and to warm up")
    plain, _ = _run(runner, prompts, [max_new_tokens] * len(prompts), law, seed, batch_size)
    limits = [max(1, loop_start(result.token_ids)) for result in plain]
    made = sum(len(result.token_ids) for result in plain)
    kept = sum(map(min, limits, (len(result.token_ids) for result in plain)))
    baseline_results, seconds = _run(runner, prompts, limits, law, seed, batch_size)
    baseline = _figures("none", baseline_results, seconds)
    say(_line(baseline))
    rows = []
    for draft, drafter in zip(drafts, drafters, strict=True):
        runner.use(drafter)
        options: dict[str, Any] = {"verify": verify, "lossy": lossy}
        # The first prompt once untimed: buffers are made then.
        _run(runner, prompts[:1], limits[:1], law, seed, 1, **options)
        results, seconds = _run(runner, prompts, limits, law, seed, batch_size, **options)
        row = _figures(draft, results, seconds)
        plain_speed = baseline["tokens_per_second"]
        row["speedup"] = row["tokens_per_second"] / plain_speed if plain_speed else 1.0
        row["identical"] = None
        if greedy:
            row["identical"] = sum(
                ours.token_ids == plain_one.token_ids
                for ours, plain_one in zip(results, baseline_results, strict=True)
            )
        rows.append(row)
        say(_line(row))
    return {
        "baseline": baseline,
        "drafters": rows,
        "prompts": len(prompts),
        "batch_size": batch_size,
        "dtype": str(runner.target.model.dtype).removeprefix("torch."),
        "kept_share": kept / made if made else 1.0,
        "prompts_cut": sum(
            limit < len(result.token_ids) for limit, result in zip(limits, plain, strict=True)
        ),
    }


def broken_promises(result: dict[str, Any]) -> list[str]:
    """Drafters that promise plain decoding's output and did not keep it, in float32."""
    if result["dtype"] != "float32":
        return []
    return [
        row["name"]
        for row in result["drafters"]
        if row["lossless"] and row["identical"] is not None and row["identical"] < row["prompts"]
    ]


def _run(
    runner: Runner,
    prompts: Sequence[str | Sequence[int]],
    limits: Sequence[int],
    law: Law,
    seed: int,
    batch_size: int,
    *,
    verify: str | None = None,
    lossy: bool = False,
) -> tuple[list[Result], float]:
    start = time.perf_counter()
    results = runner.generate(
        prompts,
        max_new_tokens=limits,
        batch_size=batch_size,
        seed=seed,
        verify=verify,
        lossy=lossy,
        **law,
    )
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return results, time.perf_counter() - start


def _figures(name: str, results: Sequence[Result], seconds: float) -> dict[str, Any]:
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


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['name']}: {row['tokens_per_second']:.1f} tok/s, "
        f"{row['tokens_per_forward']:.2f} tokens per forward"
    )
