"""Measure what KV stores take and lose: bytes a token, and the divergence from dense ones.

    python benchmarks/kv.py MODEL TEXT [--stores dense int8 int8:group=16] [--out RESULT.json]

The text is cut into windows of the model's context, each of which passes once through an empty
cache: every token sees the tokens before it as the store keeps them. KL is that of the
probabilities with the first store against those with another, in nats a token; perplexities are of
the same tokens. `drafted_as_plain` counts the prompts (beginnings of windows) whose greedy text
with `--draft` equals plain decoding with the same store. Nothing is timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import record
import torch
from torch import Tensor

from spectool.checkpoint.tensors import open_checkpoint
from spectool.data.text import read_text
from spectool.decode import tree
from spectool.decode.generate import Runner
from spectool.machine import describe
from spectool.model.loading import load_model, load_tokenizer

_NEW_TOKENS = 60


@torch.inference_mode()
def read_windows(runner: Runner, windows: Sequence[list[int]]) -> list[Tensor]:
    """Return the log-probabilities [L, V] after each token of each window."""
    found = []
    for window in windows:
        draft = tree.chain(window, kind="deterministic")
        done = runner.target.verify(runner.target.cache(1), [draft])
        found.append(done.logits_BNV[0].float().log_softmax(-1))
    return found


def compare(exact: Sequence[Tensor], found: Sequence[Tensor], windows: Sequence[list[int]]) -> Any:
    """Return divergence, agreement and perplexity of `found`."""
    kl, same, nll = [], [], []
    for exact_LV, found_LV, window in zip(exact, found, windows, strict=True):
        kl.append((exact_LV.exp() * (exact_LV - found_LV)).sum(-1))
        same.append((exact_LV.argmax(-1) == found_LV.argmax(-1)).float())
        nll.append(-found_LV[:-1].gather(1, torch.tensor(window[1:])[:, None]))
    kl_L = torch.cat(kl)
    return {
        "kl_mean": float(kl_L.mean()),
        "kl_99_percent": float(kl_L.quantile(0.99)),
        "kl_max": float(kl_L.max()),
        "same_top_token": float(torch.cat(same).mean()),
        "perplexity": float(torch.cat(nll).mean().exp()),
    }


def count_equal(runner: Runner, draft: str, prompts: Sequence[list[int]]) -> int:
    """Count the prompts whose drafted greedy text is the plain text of the same store."""
    runner.use(draft)
    drafted = runner.generate(prompts, max_new_tokens=_NEW_TOKENS)
    runner.use(None)
    plain = runner.generate(prompts, max_new_tokens=_NEW_TOKENS)
    return sum(a.token_ids == b.token_ids for a, b in zip(drafted, plain, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("--stores", nargs="+", default=["dense", "int8"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--draft", default="ngram:min_n=1")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    checkpoint = open_checkpoint(arguments.model)
    tokenizer: Any = load_tokenizer(checkpoint)
    text = read_text([arguments.text], tokenizer)[: 1 << 17]
    rows: list[dict[str, Any]] = []
    for dtype in arguments.dtypes:
        model = load_model(checkpoint, dtype=dtype)
        exact: list[Tensor] = []
        for kv in arguments.stores:
            runner = Runner(model, tokenizer=tokenizer, kv=kv)
            length = runner.target.context
            ids = tokenizer(text)["input_ids"][: arguments.windows * length]
            windows = [ids[start : start + length] for start in range(0, len(ids), length)]
            found = read_windows(runner, windows)
            # The first store is what the others are compared with.
            exact = exact or found
            prompts = [window[:40] for window in windows]
            rows.append(
                {
                    "dtype": dtype,
                    "kv": kv,
                    "bytes_per_token": runner.target.kv_bytes_per_token,
                    **compare(exact, found, windows),
                    "drafted_as_plain": count_equal(runner, arguments.draft, prompts),
                    "prompts": len(prompts),
                }
            )
    result = {
        "benchmark": "kv",
        "command": " ".join(["python benchmarks/kv.py", *(Path(w).name for w in sys.argv[1:])]),
        "machine": describe(),
        "tokens": sum(map(len, windows)),
        "window": length,
        "draft": arguments.draft,
        "rows": rows,
    }
    print(record.to_text(result))
    if arguments.out:
        record.write(arguments.out, result)


if __name__ == "__main__":
    main()
