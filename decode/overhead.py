"""What the loop costs beside the model: plain decoding against bare forwards of the same tokens."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, PreTrainedModel

from spectool.decode.generate import Runner


@dataclass(frozen=True, slots=True, kw_only=True)
class Overhead:
    """Seconds per token, medians over the repeats."""

    loop: float
    bare: float

    @property
    def share(self) -> float:
        """The loop's extra time as a share of the bare forwards."""
        return self.loop / self.bare - 1


def measure_overhead(
    model: PreTrainedModel, prompt: Sequence[int], *, new_tokens: int = 64, repeats: int = 5
) -> Overhead:
    """Decode plainly and run transformers' bare forwards by turns, so drift hits both alike."""
    runner = Runner(model)
    tokens = runner.generate([prompt], max_new_tokens=new_tokens)[0].token_ids
    loop, bare = [], []
    for _ in range(repeats):
        started = time.perf_counter()
        runner.generate([prompt], max_new_tokens=new_tokens)
        between = time.perf_counter()
        _bare_forwards(model, prompt, tokens)
        loop.append((between - started) / len(tokens))
        bare.append((time.perf_counter() - between) / len(tokens))
    return Overhead(loop=statistics.median(loop), bare=statistics.median(bare))


@torch.inference_mode()
def _bare_forwards(model: PreTrainedModel, prompt: Sequence[int], tokens: Sequence[int]) -> None:
    cache = DynamicCache(config=model.config)
    for feed in [list(prompt), *([token] for token in tokens[:-1])]:
        ids = torch.tensor([feed], device=model.device)
        model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    if model.device.type == "cuda":
        torch.cuda.synchronize()
