"""Measure entropy adaptive decoding: quality and time against the small model's share of tokens.

    python benchmarks/entropy.py LARGE SMALL TEXT [--window 256] [--windows 24] [--out RESULT.json]

`held_out`: the rule runs along TEXT as if it were written: each token is predicted by the model
whose turn it is, the first 32 of a window by none. Perplexity, and how often the likeliest token is
the large model's. `chance` is the mean and the standard deviation over 20 runs in which the same
turns stand elsewhere: the sequence of writers over all windows, rotated. Share and lengths of turns
are the same, only the place is not chosen by entropy. With the default dwell, and with one of 2.

`generated`: greedy texts of 128 tokens after the first 32 of a window, all thresholds in turn for
each prompt. Tokens per second are of the process's own time, which other programs disturb least.
`same_top`: how many tokens, up to the first loop, are the large model's likeliest after the same
text. `chance`: every prompt with the turns of the next prompt. `alone`: each model by itself.

Thresholds are quantiles of the large model's rolling means on TEXT, and both ends.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import record
import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectool.checkpoint.tensors import open_checkpoint
from spectool.data.text import read_text
from spectool.decode.generate import Runner
from spectool.decode.result import Result, loop_start
from spectool.decode.target.entropy import LARGE, EntropyConfig, EntropyTarget, PairCache, Switch
from spectool.decode.target.open import open_target
from spectool.machine import describe
from spectool.model.loading import hash_vocabulary, load_model, load_tokenizer

_PROMPT, _NEW_TOKENS, _ROTATIONS = 32, 128, 20
_SHORT_DWELL = 2
_QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass
class Predictions:
    """One model's predictions of the tokens of all windows, in a row, without the prompts'."""

    entropy: Tensor
    nll: Tensor
    top: Tensor


@torch.inference_mode()
def predict(model: PreTrainedModel, windows: Sequence[list[int]]) -> Predictions:
    """Return a model's predictions."""
    entropy, nll, top = [], [], []
    for window in windows:
        logits_LV = model(input_ids=torch.tensor([window])).logits[0, _PROMPT - 1 : -1].float()
        logp_LV = logits_LV.log_softmax(-1)
        entropy.append(torch.special.entr(logp_LV.exp()).sum(-1) / math.log(2))
        nll.append(-logp_LV.gather(1, torch.tensor(window[_PROMPT:])[:, None])[:, 0])
        top.append(logp_LV.argmax(-1))
    return Predictions(torch.cat(entropy), torch.cat(nll), torch.cat(top))


def choose_writers(both: Sequence[Predictions], config: EntropyConfig, length: int) -> Tensor:
    """Return which model writes each token, by the rule; windows have `length` tokens."""
    entropies = [each.entropy.tolist() for each in both]
    writers: list[int] = []
    for start in range(0, len(entropies[0]), length):
        switch = Switch.start(config)
        for at in range(start, start + length):
            writers.append(switch.active)
            switch.take(entropies[switch.active][at])
    return torch.tensor(writers)


def score(both: Sequence[Predictions], writers: Tensor) -> dict[str, float]:
    """Return perplexity and agreement with the large model of text by these writers."""
    large, small = both
    nll = torch.where(writers == LARGE, large.nll, small.nll)
    top = torch.where(writers == LARGE, large.top, small.top)
    same = (top == large.top).double().mean()
    return {"perplexity": float(nll.double().mean().exp()), "same_top": float(same)}


def measure_held_out(
    both: Sequence[Predictions], thresholds: Sequence[float], dwell: int, length: int
) -> list[dict[str, Any]]:
    """Measure the rule along held-out text, beside the same turns elsewhere."""
    noise, rows = torch.Generator().manual_seed(0), []
    for threshold in thresholds:
        writers = choose_writers(both, EntropyConfig(threshold=threshold, dwell=dwell), length)
        row: dict[str, Any] = {
            "dwell": dwell,
            "threshold": str(threshold),
            "small_share": float(writers.double().mean()),
            "switches_per_100": 100 * float((writers.diff() != 0).double().mean()),
            **score(both, writers),
        }
        if 0 < row["small_share"] < 1:
            shifts = torch.randint(length, len(writers) - length, (_ROTATIONS,), generator=noise)
            found = [score(both, writers.roll(int(shift))) for shift in shifts]
            row["chance"] = {
                key: [f(each[key] for each in found) for f in (statistics.mean, statistics.stdev)]
                for key in found[0]
            }
        rows.append(row)
    return rows


class Planned(EntropyTarget):
    """Two models that take turns as `plan` says: a writer for each new token."""

    plan: Sequence[int] = ()

    def cache(self, batch: int, context: int | None = None) -> PairCache:
        made = super().cache(batch, context)
        plan = self.plan

        class PlannedSwitch(Switch):
            def choose(self) -> int:
                return plan[min(self.num_tokens, len(plan) - 1)]

        return PairCache(
            made.caches, made.context, lambda: PlannedSwitch.start(EntropyConfig(dwell=1))
        )


def list_writers(result: Result) -> list[int]:
    """Return the writer of each token of a text that the large model began."""
    assert result.turns is not None
    return [sum(at >= s for s in result.turns.switches) % 2 for at in range(len(result.token_ids))]


@torch.inference_mode()
def count_same(model: PreTrainedModel, prompt: list[int], new: list[int]) -> tuple[int, int]:
    """Return how many tokens up to the first loop are the model's likeliest, and of how many."""
    new = new[: loop_start(new)]
    logits = model(input_ids=torch.tensor([[*prompt, *new]])).logits[0, len(prompt) - 1 : -1]
    return int((logits.argmax(-1) == torch.tensor(new)).sum()), len(new)


class Tally:
    """Texts of one way to decode, and their seconds."""

    def __init__(self) -> None:
        self.seconds, self.results, self.same = 0.0, list[Result](), [0, 0]

    def run(self, runner: Runner, prompt: list[int], large: PreTrainedModel) -> Result:
        """Continue a prompt and count."""
        began = time.process_time()
        (result,) = runner.generate([prompt], max_new_tokens=_NEW_TOKENS)
        self.seconds += time.process_time() - began
        self.results.append(result)
        for at, count in enumerate(count_same(large, prompt, result.token_ids)):
            self.same[at] += count
        return result

    def row(self) -> dict[str, Any]:
        """Return the figures."""
        tokens = sum(len(result.token_ids) for result in self.results)
        turns = [result.turns for result in self.results if result.turns is not None]
        row = {
            "tokens_per_second": tokens / self.seconds,
            "same_top": self.same[0] / max(1, self.same[1]),
            "tokens_before_loops": self.same[1],
        }
        if turns:
            row["small_share"] = sum(each.small_tokens for each in turns) / tokens
            row["caught_up_per_token"] = sum(each.caught_up for each in turns) / tokens
        return row


def measure_generated(
    models: Sequence[PreTrainedModel], thresholds: Sequence[float], prompts: Sequence[list[int]]
) -> dict[str, Any]:
    """Measure greedy texts and their time."""
    alone = [(Runner(model), Tally()) for model in models]
    rule = []
    for threshold in thresholds:
        target = EntropyTarget(*map(open_target, models), EntropyConfig(threshold=threshold))
        planned = Planned(*map(open_target, models))
        rule.append((Runner(target), Tally(), planned, Runner(planned), Tally()))
    for runner, *_ in (*alone, *rule):
        runner.generate([prompts[0]], max_new_tokens=4)
    plans: list[list[list[int]]] = [[] for _ in thresholds]
    for prompt in prompts:
        for runner, tally in alone:
            tally.run(runner, prompt, models[0])
        for number, (runner, tally, *_) in enumerate(rule):
            plans[number].append(list_writers(tally.run(runner, prompt, models[0])))
    for at, prompt in enumerate(prompts):
        for own, (*_, planned, runner, tally) in zip(plans, rule, strict=True):
            planned.plan = own[(at + 1) % len(own)]
            tally.run(runner, prompt, models[0])
    rows = []
    for threshold, (_, tally, *_, chance) in zip(thresholds, rule, strict=True):
        row = {"threshold": str(threshold), **tally.row()}
        if 0 < row["small_share"] < 1:
            row["chance"] = chance.row()
            # It ran after all others: only speeds that were measured in turn are comparable.
            del row["chance"]["tokens_per_second"]
        rows.append(row)
    return {
        "alone": {n: t.row() for n, (_, t) in zip(("large", "small"), alone, strict=True)},
        "rows": rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    parser.add_argument("large")
    parser.add_argument("small")
    parser.add_argument("text")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    checkpoints = [open_checkpoint(each) for each in (arguments.large, arguments.small)]
    tokenizer: Any = load_tokenizer(checkpoints[0])
    assert hash_vocabulary(tokenizer) == hash_vocabulary(load_tokenizer(checkpoints[1]))
    models = [load_model(each, dtype=torch.float32) for each in checkpoints]
    for model in models:
        # Texts of equal length: no token ends one.
        model.generation_config.eos_token_id = None
    ids = tokenizer(read_text([arguments.text], tokenizer)[: 1 << 18])["input_ids"]
    size = arguments.window
    windows = [ids[at * size : (at + 1) * size] for at in range(arguments.windows)]
    assert len(windows[-1]) == size, "the text is too short"
    both = [predict(model, windows) for model in models]
    means = both[LARGE].entropy.unfold(0, EntropyConfig().window, 1).mean(-1)
    quantiles = means.quantile(torch.tensor(_QUANTILES)).tolist()
    thresholds = [0.0, *(round(each, 2) for each in quantiles), math.inf]
    prompts = [window[:_PROMPT] for window in windows[: arguments.prompts]]
    result = {
        "benchmark": "entropy",
        "command": " ".join(
            ["python benchmarks/entropy.py", *(Path(word).name for word in sys.argv[1:])]
        ),
        "machine": describe(),
        "parameters": [model.num_parameters() for model in models],
        "window": EntropyConfig().window,
        "dwell": EntropyConfig().dwell,
        "held_out_tokens": len(both[LARGE].nll),
        "held_out": [
            row
            for dwell in (EntropyConfig().dwell, _SHORT_DWELL)
            for row in measure_held_out(both, thresholds, dwell, size - _PROMPT)
        ],
        "prompts": len(prompts),
        "generated": measure_generated(models, thresholds, prompts),
    }
    print(record.to_text(result))
    if arguments.out:
        record.write(arguments.out, result)


if __name__ == "__main__":
    main()
