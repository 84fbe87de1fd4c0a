"""Measure the overhead of the decode loop: plain decoding against bare forwards of the model.

    python benchmarks/loop_overhead.py [--out benchmarks/results/...json]

A random Llama of about 134 M parameters runs plain decoding. After each step, transformers' forward
of the same token is timed, with a cache of its own and without sampling, stopping or text. The two
alternate token by token, so that other load on the machine affects both. The floor of a step is the
weights' bytes over the memory bandwidth, measured by summing a tensor of as many bytes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import record
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from spectool.decode.generate import Runner
from spectool.decode.target.attention import AttentionTarget
from spectool.machine import describe

NEW_TOKENS = 128


class _Bare:
    """Forwards by transformers with its own cache."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cache = {AttentionTarget(model).cache_name: DynamicCache(config=model.config)}

    @torch.inference_mode()
    def forward(self, tokens: Sequence[int]) -> None:
        """Run the model on the next tokens, and wait until it is done."""
        ids = torch.tensor([list(tokens)], device=self.model.device)
        self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **self.cache)
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()


def measure(model: PreTrainedModel, prompt: Sequence[int]) -> tuple[float, float]:
    """Return the median seconds per token of the loop and of bare forwards."""
    bare = _Bare(model)
    loop_seconds, bare_seconds = [], []
    feed, started = list(prompt), time.perf_counter()

    def step(request: int, tokens: list[int], text: str, drafted: int) -> None:
        nonlocal feed, started
        between = time.perf_counter()
        bare.forward(feed)
        ended = time.perf_counter()
        loop_seconds.append(between - started)
        bare_seconds.append(ended - between)
        feed, started = tokens, time.perf_counter()

    Runner(model).generate([prompt], max_new_tokens=NEW_TOKENS, on_tokens=step)
    # Without the first step, which is the prefill and a warm-up.
    return statistics.median(loop_seconds[1:]), statistics.median(bare_seconds[1:])


def read_seconds(num_bytes: int) -> float:
    """Return the seconds to read `num_bytes` from memory, the floor of a token's step."""
    block = torch.ones(num_bytes // 4)
    block.sum()
    times = []
    for _ in range(5):
        began = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12,
        vocab_size=32000, max_position_embeddings=1024, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    loop, bare = measure(model, list(range(5, 37)))
    result = {
        "benchmark": "loop_overhead",
        "command": "python benchmarks/loop_overhead.py",
        "machine": describe(),
        "parameters": parameters,
        "dtype": "float32",
        "loop_ms_per_token": 1e3 * loop,
        "bare_ms_per_token": 1e3 * bare,
        "overhead_share": loop / bare - 1,
        "floor_ms_per_token": 1e3 * read_seconds(4 * parameters),
        "new_tokens": NEW_TOKENS,
    }
    text = record.to_text(result)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
