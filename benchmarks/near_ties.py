"""Where drafted text leaves plain text in bfloat16: how many texts, and how near the choice was.

    python benchmarks/near_ties.py --shared FOLDER [--draft SPEC ...] [--out FILE.json]

In float32 drafted greedy text is plain text. In bfloat16 a pass of several tokens rounds otherwise
than passes of one, and where the two likeliest tokens are all but equal the other may win. Each
text is compared with plain decoding's up to its first difference; there the gap between the
target's two highest logits is taken, from a pass over the plain text, and set beside the gaps of
all tokens. A fault of the decoder would flip tokens at any gap.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from decode import write_prompts
from spectool.decode.generate import Runner
from spectool.machine import describe

DRAFTS = ("ngram", "recycle", "trigram", "jacobi", "skip")


@torch.inference_mode()
def gaps_of(runner: Runner, prompt: Sequence[int], new: Sequence[int]) -> list[float]:
    """Of every new token, the target's highest logit less the second, as transformers finds it."""
    ids = torch.tensor([[*prompt, *new]])
    logits_TV = runner.target.model(ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    best_T2 = logits_TV.topk(2).values
    gaps: list[float] = (best_T2[:, 0] - best_T2[:, 1]).tolist()
    return gaps


def compare(
    runner: Runner, draft: str, prompts: list[list[int]], plain: list[Any]
) -> dict[str, Any]:
    runner.use(draft)
    found = runner.generate(prompts, max_new_tokens=64)
    flips = []
    for prompt, ours, theirs in zip(prompts, found, plain, strict=True):
        if ours.token_ids != theirs.token_ids:
            pairs = enumerate(zip(ours.token_ids, theirs.token_ids, strict=False))
            at = next(at for at, (one, other) in pairs if one != other)
            flips.append(gaps_of(runner, prompt, theirs.token_ids)[at])
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
    listed = Path("build/near_ties.jsonl")
    listed.parent.mkdir(exist_ok=True)
    write_prompts(given.shared / "data", listed, given.each)
    rows = [json.loads(line) for line in listed.read_text(encoding="utf-8").splitlines()]
    texts = [row["prompt"] if "prompt" in row else row["messages"][0]["content"] for row in rows]
    prompts = [runner.tokenizer(text)["input_ids"] for text in texts]
    plain = runner.generate(prompts, max_new_tokens=64)
    gaps = [
        gap
        for prompt, result in zip(prompts, plain, strict=True)
        for gap in gaps_of(runner, prompt, result.token_ids)
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
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
