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
    """Seconds per token, medians over the tokens."""

    loop: float
    bare: float

    @property
    def share(self) -> float:
        """The loop's extra time as a share of the bare forwards."""
        return self.loop / self.bare - 1


def measure_overhead(
    model: PreTrainedModel, prompt: Sequence[int], *, new_tokens: int = 128
) -> Overhead:
    """Decode plainly and time after each step transformers' own forward of the token it fed.

    By turns, token for token, so that whatever else the machine does hits both alike. The bare
    forward has a cache of transformers and no sampling, no stopping, no text.
    """
    bare = _Bare(model)
    loop_seconds, bare_seconds = [], []
    feed, started = list(prompt), time.perf_counter()

    def step(row: int, tokens: list[int], text: str) -> None:
        nonlocal feed, started
        between = time.perf_counter()
        bare.forward(feed)
        ended = time.perf_counter()
        loop_seconds.append(between - started)
        bare_seconds.append(ended - between)
        feed, started = tokens, time.perf_counter()

    Runner(model).generate([prompt], max_new_tokens=new_tokens, on_tokens=step)
    # The first is the prompt's pass, and warms up.
    return Overhead(
        loop=statistics.median(loop_seconds[1:]), bare=statistics.median(bare_seconds[1:])
    )


class _Bare:
    """Forwards of transformers with its own cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache = DynamicCache(config=model.config)

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int]) -> None:
        ids = torch.tensor([list(tokens)], device=self.model.device)
        self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
