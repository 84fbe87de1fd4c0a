"""EAGLE-3 against drafting step by step, its tree against a search, and unchanged output."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PreTrainedModel

from spectool.decode.drafters.eagle3 import Eagle3Drafter, Eagle3Heads
from spectool.decode.generate import Runner
from spectool.decode.heads import layer
from spectool.distill.teacher import read_features
from spectool.errors import UsageError

from ...conftest import VOCAB
from ..trees import path_to
from . import bare
from .bare import bare_model, check_loss, make_batch, rms

make_heads = functools.partial(bare.make_heads, Eagle3Heads)


def turn(x_HE: Tensor, position: int, theta: float) -> Tensor:
    """Apply rotary positions, one pair of channels at a time."""
    half = x_HE.shape[-1] // 2
    out = x_HE.clone()
    for pair in range(half):
        angle = position * theta ** (-pair / half)
        a, b = x_HE[:, pair], x_HE[:, pair + half]
        out[:, pair] = a * math.cos(angle) - b * math.sin(angle)
        out[:, pair + half] = b * math.cos(angle) + a * math.sin(angle)
    return out


class StepByStep:
    """The equations, one row after the other: first rows of the text, then of a drafted chain."""

    def __init__(self, heads: Eagle3Heads, features: dict[str, Tensor], tokens: list[int]) -> None:
        """Fuse the `features` [L, D] of the text's tokens."""
        self.heads, self.layer = heads, heads.midlayer
        states = torch.cat([features[f"layer {n}"] for n in heads.needs.layers], -1)
        self.fused = [heads.fc.weight @ state for state in states]
        self.tokens = tokens

    def chain(self, position: int, drafted: list[int]) -> list[Tensor]:
        """Compute y of x_{t+1} and of each drafted token after it, with t the given position."""
        rows: list[tuple[Tensor, Tensor]] = []
        out = None
        for t in range(position + 1):
            out = self._row(rows, t, self.tokens[t + 1], self.fused[t])
        assert out is not None
        found = [out]
        for step, token in enumerate(drafted, start=1):
            out = self._row(rows, position + step, token, out)
            found.append(out)
        return found

    def _row(
        self, rows: list[tuple[Tensor, Tensor]], position: int, token: int, state_D: Tensor
    ) -> Tensor:
        layer, attention = self.layer, self.layer.self_attn
        embedded = self.heads.frozen.embed(torch.tensor(token))
        read = torch.cat([rms(embedded, layer.input_layernorm), rms(state_D, layer.hidden_norm)])
        width = attention.head_width
        theta = 10000.0
        q = turn((attention.q_proj.weight @ read).view(-1, width), position, theta)
        k = turn((attention.k_proj.weight @ read).view(-1, width), position, theta)
        v = (attention.v_proj.weight @ read).view(-1, width)
        rows.append((k, v))
        out = []
        for head in range(len(q)):
            of = head * len(k) // len(q)
            scores = torch.stack([q[head] @ k[of] for k, _ in rows]) / math.sqrt(width)
            out.append(sum(w * v[of] for w, (_, v) in zip(scores.softmax(0), rows, strict=True)))
        y = state_D + attention.o_proj.weight @ torch.cat(out)  # type: ignore[arg-type]
        z = rms(y, layer.post_attention_layernorm)
        mlp: Any = layer.mlp
        gated = nn.functional.silu(mlp.gate_proj.weight @ z) * (mlp.up_proj.weight @ z)
        whole: Tensor = y + mlp.down_proj.weight @ gated
        return whole

    def logits(self, y_D: Tensor) -> Tensor:
        weight_VD, _ = self.heads.output(0)
        return weight_VD @ rms(y_D, self.heads.norm)


@pytest.mark.parametrize(("size", "kept"), [(None, 1 << 26), (5, 1 << 26), (None, 0)])
def test_training_is_drafting_step_by_step(
    size: int | None, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses and gradients of all positions at once against one position's chain at a time."""
    # Scores are kept, or recomputed for the gradient.
    monkeypatch.setattr(layer, "_SCORE_BYTES", kept)
    token_map = None if size is None else torch.tensor([1, 4, 8, 9, 16])
    model = bare_model(bias=True)
    heads = make_heads(model, token_map=token_map, ttt_steps=3)
    batch = make_batch(rows=2, length=10, needs=heads.needs)
    known = list(range(17)) if token_map is None else token_map.tolist()
    skipped = 0
    losses: list[list[Tensor]] = [[] for _ in range(3)]
    for row, position in itertools.product(range(2), range(8)):
        tokens = batch.tokens_BL[row].tolist()
        features = {name: value[row] for name, value in batch.features.items()}
        steps = StepByStep(heads, features, tokens).chain(
            position, tokens[position + 2 : position + 4]
        )
        for s, y_D in enumerate(steps):
            ahead = position + 2 + s
            if ahead >= 10 or not batch.loss_mask_BL[row, ahead]:
                continue
            teacher_V = model.output(features["final"][ahead - 1]).detach()
            if int(teacher_V.argmax()) not in known:
                skipped += 1
                continue
            weight_VD, _ = heads.output(s)
            logq_V = (weight_VD @ rms(y_D, heads.norm)).log_softmax(0)
            losses[s].append(-(teacher_V[known].softmax(0) * logq_V).sum())
    assert (skipped > 0) == (size is not None)
    check_loss(heads, batch, lambda: ((values, None) for values in losses), decay=0.8)


def search(
    heads: Eagle3Heads, step: StepByStep, config: Eagle3Drafter.Config, depth: int
) -> list[tuple[tuple[int, ...], float]]:
    """Return EAGLE-2's tree by expanding and reranking one path after the other."""
    position = len(step.tokens) - 2
    token_map = range(VOCAB) if heads.token_map is None else heads.token_map.tolist()
    level: list[tuple[tuple[int, ...], float]] = [((), 0.0)]
    found: list[tuple[tuple[int, ...], float]] = []
    for _ in range(depth):
        children = []
        for path, score in level:
            logq_V = step.logits(step.chain(position, list(path))[-1]).log_softmax(0)
            best = logq_V.topk(config.width)
            for value, at in zip(best.values.tolist(), best.indices.tolist(), strict=True):
                children.append(((*path, token_map[at]), score + value))
        found += children
        level = sorted(children, key=lambda pair: -pair[1])[: config.width]
    return sorted(found, key=lambda pair: -pair[1])[: config.nodes]


@pytest.mark.parametrize("options", [{}, {"draft_vocab": 40}, {"shared_head": True}])
def test_trees_are_those_of_a_search(
    tiny: Callable[..., PreTrainedModel],
    prompt_of: Callable[..., list[int]],
    options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The layer's cache holds exactly the committed tokens."""
    model = tiny("llama")
    token_map = torch.arange(0, 120, 3) if "draft_vocab" in options else None
    heads = make_heads(model, token_map=token_map, **options)
    config = Eagle3Drafter.Config(nodes=9, depth=3, width=3)
    drafter = Eagle3Drafter(heads, [], config)
    runner = Runner(model, draft=drafter)
    propose, seen = drafter.propose, [0]

    def checked(rows: Any, budget: Any) -> Any:
        drafts, deepest = propose(rows, budget), min(3, max(budget))
        if deepest == 0:
            return drafts
        assert drafter._draft_cache._cache.lengths == [len(request.tokens) - 1 for request in rows]
        for request, draft, limit in zip(rows, drafts, budget, strict=True):
            read = read_features(runner.target, torch.tensor([request.tokens[:-1]]), heads.needs)
            features = {name: value[0] for name, value in read.items()}
            step = StepByStep(heads, features, request.tokens)
            wanted = search(heads, step, config, deepest)
            paths = [
                tuple(draft.tokens[n] for n in path_to(draft, node)[1:])
                for node in range(len(draft))
            ]
            assert paths[1:] == [path for path, _ in wanted if len(path) <= limit]
            seen[0] += len(draft) - 1
        return drafts

    monkeypatch.setattr(drafter, "propose", checked)
    with torch.inference_mode():
        runner.generate([prompt_of(n) for n in (9, 14, 2)], max_new_tokens=[6, 4, 5], batch_size=3)
    assert seen[0] > 40


@pytest.mark.parametrize(
    ("num_layers", "asked", "outputs"),
    [
        (32, "", (1, 15, 28)),
        (8, "", (1, 3, 7)),
        (5, "", (0, 2, 4)),
        (2, "", (0, 1)),
        (1, "", (0,)),
        (32, "31-2-16", (1, 15, 30)),
    ],
)
def test_fused_layers(num_layers: int, asked: str, outputs: tuple[int, ...]) -> None:
    model = bare_model()
    model.config.num_hidden_layers = num_layers
    assert Eagle3Heads(Eagle3Heads.Config(layers=asked), model, None).needs.layers == outputs


@pytest.mark.parametrize("asked", ["2-x", "2.3", "0-1-2", "3-9"])
def test_layers_that_are_none(asked: str) -> None:
    with pytest.raises(UsageError, match=f"--layers {asked}"):
        Eagle3Heads(Eagle3Heads.Config(layers=asked), bare_model(), None)


def test_parameters_of_llama_3_8b() -> None:
    """425 M as published, 294 M without the lm_head of 32000 tokens."""
    with torch.device("meta"):
        model = bare_model(4096, 128256)
        model.config = LlamaConfig(
            hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
            num_key_value_heads=8, num_hidden_layers=32, vocab_size=128256,
        )  # fmt: skip
        size = Eagle3Heads.draft_vocab_size(Eagle3Heads.Config(), 128256)
        heads = Eagle3Heads(Eagle3Heads.Config(), model, torch.empty(size, dtype=torch.long))
    found = sum(p.numel() for p in heads.parameters())
    assert found / 1e6 == pytest.approx(425, abs=0.5)
    assert (found - size * 4096) / 1e6 == pytest.approx(294, abs=0.5)
