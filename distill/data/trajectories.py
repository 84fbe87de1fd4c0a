"""Jacobi trajectories: how a model's greedy text appears, block by block, from random tokens.

A block of n tokens y is iterated as y <- (argmax p(. | text, y_<i))_i until it is its own image:
then it is the model's greedy continuation. Every iterate is a point of the block's trajectory; the
last one, the fixed point, is the text. Greedy Jacobi decoding with a cache computes the same
points, since accepted tokens never change again, so an engine records them while it decodes.

Source: Kou et al., CLLM, 2024 (arXiv:2403.00835), section 3.1.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectool.checkpoint import checksums
from spectool.checkpoint.tensors import read_tensors
from spectool.decode.cache import BatchCache
from spectool.decode.generate import Runner
from spectool.decode.options import SamplingParams
from spectool.decode.protocol import Drafter, Needs, Outcome, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.result import loop_start
from spectool.decode.tree import Draft, Kind, chain
from spectool.distill.data.regenerate import split_spans
from spectool.distill.data.samples import SHORTEST, Sample
from spectool.distill.data.store import read_store
from spectool.errors import CheckpointError

# Record of a store of trajectories.
TRAJECTORIES = "spectool_trajectories.json"
# A text ends where one token stands this many times in a row: such runs converge at once, and teach
# the model to repeat itself.
_RUN = 10
# Number of requests that are decoded together.
_BATCH = 8

Block = list[list[int]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """Tokens to continue, the data's own continuation, and tokens that end a turn."""

    tokens: list[int]
    reference: list[int]
    ends: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Trajectory:
    """A prompt and the blocks of its continuation: the points of each, from random to fixed.

    All points of a block have one length, `block` tokens but for the last block. `reference` is
    the continuation that the data has.
    """

    prompt: list[int]
    blocks: list[Block]
    reference: list[int] = field(default_factory=list)

    @property
    def text(self) -> list[int]:
        """Return the continuation: the fixed points."""
        return [token for points in self.blocks for token in points[-1]]


class TrajectoryDrafter(Drafter):
    """Drafter of fixed blocks of `block` tokens, which records their points by request index.

    A block begins with tokens drawn at random from the prompt.
    """

    name = "jacobi"
    needs = Needs(top=1)
    combines = False

    def __init__(self, block: int, seed: str) -> None:
        self.block, self.seed = block, seed
        self.points: dict[int, list[Block]] = {}

    def kinds(self, sampling: SamplingParams) -> tuple[Kind, ...]:
        return ("deterministic",)

    def add(self, prompts: Sequence[PrefilledPrompt], cache: BatchCache) -> None:
        for prompt in prompts:
            self.points[prompt.request.index] = []

    def remove(self, request: Request) -> None:
        """Do nothing: `take` removes what was recorded."""

    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        return [self._draft(each, most) for each, most in zip(requests, budget, strict=True)]

    def _draft(self, request: Request, most: int) -> Draft:
        """Return what is left of the point of the current block, a new one where it is complete."""
        blocks, new = self.points[request.index], request.new_tokens
        number, done = divmod(len(new), self.block)
        if number == len(blocks):
            rng = random.Random(f"{self.seed}/{request.index}/{number}")
            drawn = rng.choices(request.tokens[: request.num_prompt], k=self.block - done)
            blocks.append([new[number * self.block :] + drawn])
        left = blocks[number][-1][done : done + most]
        return chain([request.tokens[-1], *left], kind="deterministic")

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Record the next point: what the model predicts after each token of the last one."""
        for outcome in outcomes:
            blocks, new = self.points[outcome.request.index], outcome.request.new_tokens
            points, start = blocks[-1], (len(blocks) - 1) * self.block
            done = min(len(new) - start, self.block)
            # The draft began after the tokens that were committed before this pass.
            before = len(new) - len(outcome.path) - start
            predicted = [ids[0] for ids in outcome.top]
            point = points[-1][:before] + predicted
            point = new[start : start + done] + point[done:] + points[-1][len(point) :]
            if point[: self.block] != points[-1]:
                points.append(point[: self.block])

    def take(self, index: int, tokens: Sequence[int]) -> list[Block]:
        """Return the recorded blocks of a request that ended, cut to its new tokens."""
        blocks = []
        for number, points in enumerate(self.points.pop(index, [])):
            fixed = list(tokens[number * self.block : (number + 1) * self.block])
            cut = [point[: len(fixed)] for point in points] + [fixed]
            if fixed:
                # Points that differed beyond the cut are equal now.
                blocks.append([point for point, _ in itertools.groupby(cut)])
        return blocks


def read_trajectories(path: Path, key: Mapping[str, Any]) -> list[Trajectory] | None:
    """Read a store of trajectories with this key; None if it does not exist.

    Raises:
        UsageError: see `read_store`.
        CheckpointError: a damaged file.
    """
    record = read_store(path, TRAJECTORIES, key, "trajectories")
    if record is None:
        return None
    trajectories: list[Trajectory] = []
    for shard, digest in sorted(record["shards"].items()):
        if checksums.of_file(path / shard).sha256 != digest:
            raise CheckpointError(f"{path / shard}: does not match its checksum")
        trajectories += as_trajectories(read_tensors(path / shard))
    return trajectories


def list_prompts(samples: Sequence[Sample], *, longest: int) -> list[Prompt]:
    """List what a model is to continue: the samples up to each span in the loss, without repeats.

    Prompts have at most `longest` tokens; longer ones are left out.
    """
    found: dict[tuple[int, ...], Prompt] = {}
    for sample in samples:
        prefix: list[int] = []
        for before, answer in split_spans(sample):
            prefix = prefix + before
            if answer and 0 < len(prefix) <= longest:
                found.setdefault(tuple(prefix), Prompt(prefix, answer, sample.ends))
            prefix = prefix + answer
    return list(found.values())


def collect(
    runner: Runner,
    prompts: Sequence[Prompt],
    *,
    block: int,
    new_tokens: int,
    context: int,
    seed: str,
) -> list[Trajectory]:
    """Continue the prompts greedily by at most `new_tokens`, up to `context` in all.

    The texts are cut where they begin to repeat themselves; those with less than SHORTEST tokens
    left are left out.
    """
    drafter = TrajectoryDrafter(block, seed)
    runner.use(drafter)
    engine = runner.engine(_BATCH)
    requests = [
        runner.make_request(
            prompt.tokens,
            index=index,
            max_new_tokens=min(new_tokens, context - len(prompt.tokens)),
            eos=prompt.ends,
            live=False,
        )
        for index, prompt in enumerate(prompts)
    ]
    for request in requests:
        engine.submit(request)
    while engine.busy:
        for event in engine.step():
            if event.error is not None:
                raise event.error
            new = event.request.new_tokens
            if _repetition_start(new) < len(new):
                engine.cancel(event.request.id)
    found = []
    for prompt, request in zip(prompts, requests, strict=True):
        text = request.new_tokens[: _repetition_start(request.new_tokens)]
        blocks = drafter.take(request.index, text)
        if len(text) >= SHORTEST:
            found.append(Trajectory(prompt.tokens, blocks, prompt.reference))
    return found


def _repetition_start(tokens: Sequence[int]) -> int:
    """Return where tokens repeat an earlier run, or one token stands `_RUN` times in a row.

    Returns the number of tokens if they do neither.
    """
    length, run_start = 0, len(tokens)
    for at, token in enumerate(tokens):
        length = length + 1 if at and token == tokens[at - 1] else 1
        if length == _RUN:
            run_start = at + 1 - _RUN
            break
    return min(run_start, loop_start(tokens))


def as_tensors(trajectories: Sequence[Trajectory]) -> dict[str, Tensor]:
    """Concatenate trajectories into tensors of the smallest integers that hold them."""
    points = [(t, point) for t in trajectories for block in t.blocks for point in block]
    ids = {
        "prompts": [token for t in trajectories for token in t.prompt],
        "references": [token for t in trajectories for token in t.reference],
        "points": [token for _, point in points for token in point],
        "prompt_lengths": [len(t.prompt) for t in trajectories],
        "reference_lengths": [len(t.reference) for t in trajectories],
        "num_blocks": [len(t.blocks) for t in trajectories],
        "num_points": [len(block) for t in trajectories for block in t.blocks],
        "block_lengths": [len(block[0]) for t in trajectories for block in t.blocks],
    }
    return {
        name: torch.tensor(values, dtype=_integer(max(values, default=0)))
        for name, values in ids.items()
    }


def _integer(largest: int) -> torch.dtype:
    return next(d for d in (torch.int16, torch.int32) if largest <= torch.iinfo(d).max)


def as_trajectories(tensors: Mapping[str, Tensor]) -> list[Trajectory]:
    """Split the tensors of `as_tensors` into trajectories."""
    lists = {name: iter(tensor.tolist()) for name, tensor in tensors.items()}

    def take(name: str, count: int) -> list[int]:
        return [next(lists[name]) for _ in range(count)]

    made = []
    for num_blocks in tensors["num_blocks"].tolist():
        prompt = take("prompts", next(lists["prompt_lengths"]))
        reference = take("references", next(lists["reference_lengths"]))
        blocks = []
        for _ in range(num_blocks):
            (length,), (count,) = take("block_lengths", 1), take("num_points", 1)
            blocks.append([take("points", length) for _ in range(count)])
        made.append(Trajectory(prompt, blocks, reference))
    return made
