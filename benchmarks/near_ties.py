"""Count texts that differ from plain decoding in bfloat16, and measure how close the choice was.

    python benchmarks/near_ties.py --shared FOLDER [--draft SPEC ...] [--out FILE.json]

In float32 greedy text with any drafter equals plain decoding. In bfloat16 a forward of several
tokens rounds differently from forwards of one, so that one of two almost equally likely tokens may
replace the other. Each text is compared with plain decoding up to its first difference. The gap
there between the target's two highest logits, from a pass over the plain text, is compared with the
gaps of all tokens: a bug of the decoder would change tokens at any gap.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record
import torch

from decode import write_prompts
from spectool.decode.generate import Runner
from spectool.machine import describe

DRAFTS = ("ngram", "recycle", "trigram", "jacobi", "skip")


@torch.inference_mode()
def compute_gaps(runner: Runner, prompt: Sequence[int], new: Sequence[int]) -> list[float]:
    """Return the gap between the two highest logits at every new token, by transformers."""
    ids = torch.tensor([[*prompt, *new]])
    logits_TV = runner.target.model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    best_T2 = logits_TV.topk(2).values
    gaps: list[float] = (best_T2[:, 0] - best_T2[:, 1]).tolist()
    return gaps


def compare(
    runner: Runner, draft: str, prompts: list[list[int]], plain: list[Any]
) -> dict[str, Any]:
    """Compare a drafter's texts with plain decoding and collect the gaps at first differences."""
    runner.use(draft)
    drafted = runner.generate(prompts, max_new_tokens=64)
    flips = []
    for prompt, ours, expected in zip(prompts, drafted, plain, strict=True):
        if ours.token_ids != expected.token_ids:
            pairs = enumerate(zip(ours.token_ids, expected.token_ids, strict=False))
            position = next(i for i, (one, other) in pairs if one != other)
            flips.append(compute_gaps(runner, prompt, expected.token_ids)[position])
    same = len(prompts) - len(flips)
    return {"draft": draft, "texts": len(prompts), "same": same, "gaps_at_flips": sorted(flips)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shared", type=Path, required=True)
    parser.add_argument("--draft", nargs="+", default=DRAFTS)
    parser.add_argument("--each", type=int, default=13)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    runner = Runner(given.shared / "models/codestory-10M", dtype=torch.bfloat16)
    path = Path("build/near_ties.jsonl")
    path.parent.mkdir(exist_ok=True)
    write_prompts(given.shared / "data", path, given.each)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    texts = [row["prompt"] if "prompt" in row else row["messages"][0]["content"] for row in rows]
    prompts = [runner.tokenizer(text)["input_ids"] for text in texts]
    plain = runner.generate(prompts, max_new_tokens=64)
    gaps = [
        gap
        for prompt, result in zip(prompts, plain, strict=True)
        for gap in compute_gaps(runner, prompt, result.token_ids)
    ]
    result: dict[str, Any] = {
        "machine": describe(),
        "tokens": len(gaps),
        "median_gap": statistics.median(gaps),
        "share_of_gaps_below": {
            str(limit): sum(gap <= limit for gap in gaps) / len(gaps)
            for limit in (0.0625, 0.125, 0.25)
        },
        "drafts": [compare(runner, draft, prompts, plain) for draft in given.draft],
    }
    for row in result["drafts"]:
        largest = max(row["gaps_at_flips"], default=0.0)
        print(f"{row['draft']}: {row['same']} of {row['texts']} texts the same", end="")
        print(f"; the widest gap that flipped is {largest:.4f}, the median of all is", end="")
        print(f" {result['median_gap']:.2f}")
    if given.out is not None:
        record.write(given.out, result)


if __name__ == "__main__":
    main()
