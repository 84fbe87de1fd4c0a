"""Extra rows: how trees are chosen, and that no node attends to extra rows."""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from spectool.decode.drafters.hidden_transfer import HiddenTransferDrafter, HiddenTransferHeads
from spectool.decode.drafters.ppd import PPDDrafter, PPDHeads
from spectool.decode.generate import Runner
from spectool.decode.heads.inpass import (
    InPassDrafter,
    SparseTree,
    _assign_rows,
    choose_trees,
    find_stationary,
    tokens_per_step,
)
from spectool.decode.protocol import Needs
from spectool.decode.target.attention import AttentionTarget
from spectool.decode.tree import Draft, best_paths
from spectool.distill.losses import compute_loss
from spectool.distill.teacher import TextCache, read_extra_rows, read_features
from spectool.errors import UnsupportedError
from spectool.training import TrainingBatch

from .bare import disturb

Make = Callable[..., Any]
METHODS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "ppd": (PPDHeads, PPDDrafter, {}),
    "ppd-ensemble": (PPDHeads, PPDDrafter, {"ensemble": 3, "num_heads": 2}),
    "hidden-transfer": (HiddenTransferHeads, HiddenTransferDrafter, {"layers": "1-1-1"}),
}
TREE = [((0,), 0.6), ((0, 0), 0.4), ((1,), 0.2), ((0, 1), 0.15), ((0, 0, 0), 0.1), ((2,), 0.1)]


def make_heads(model: Any, name: str) -> Any:
    kind, _, options = METHODS[name]
    return disturb(kind(kind.Config(**options), model, None)).eval()


def make_drafter(model: Any, name: str, **options: Any) -> Any:
    return METHODS[name][1](make_heads(model, name), TREE, InPassDrafter.Config(**options))


def random_paths(seed: int) -> list[tuple[tuple[int, ...], float]]:
    ranks_RK = torch.randint(0, 4, (60, 3), generator=torch.Generator().manual_seed(seed))
    return best_paths((ranks_RK - 1).clamp(min=0), nodes=64, top=10)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("rows", "width"), [(5, 1), (12, 1), (30, 1), (30, 2), (200, 1)])
def test_every_tree_keeps_the_budget(seed: int, rows: int, width: int) -> None:
    paths = random_paths(seed)
    trees = choose_trees(paths, num_heads=3, rows=rows, width=width)
    assert len(trees) == 4 and trees[0].paths == []
    for state, tree in enumerate(trees):
        assert len(tree.paths) + width * sum(tree.ahead) <= rows
        assert len(tree.ahead) == len(tree.ends) == 1 + len(tree.paths)
        assert all(len(path) <= state for path in tree.paths)
        assert all(path[:-1] in [(), *tree.paths] for path in tree.paths)
        assert sum(tree.ends) == pytest.approx(1)
        assert tree.expected == pytest.approx(1 + sum(dict(paths)[path] for path in tree.paths))
    probs_S = find_stationary(trees)
    assert probs_S.sum().item() == pytest.approx(1)
    moved_S = torch.zeros(4, dtype=torch.float64)
    for share, tree in zip(probs_S.tolist(), trees, strict=True):
        for end, ahead in zip(tree.ends, tree.ahead, strict=True):
            moved_S[ahead] += share * end
    torch.testing.assert_close(moved_S, probs_S)


def test_tokens_per_step_are_those_of_a_simulation() -> None:
    trees = choose_trees(random_paths(1), num_heads=3, rows=9)
    rng, state, tokens, steps = random.Random(0), 0, 0.0, 40_000
    for _ in range(steps):
        tree = trees[state]
        tokens += tree.expected
        state = rng.choices(tree.ahead, tree.ends)[0]
    assert tokens / steps == pytest.approx(tokens_per_step(trees), rel=0.01)


def test_rows_are_taken_where_they_are_worth_least() -> None:
    """Against all ways to assign four rows to three nodes."""
    ends, expected = [0.2, 0.5, 0.3], [1.0, 1.6, 2.0, 2.1]
    found = _assign_rows(ends, expected, 4)

    def worth(ahead: Any) -> float:
        return sum(end * expected[ahead] for end, ahead in zip(ends, ahead, strict=True))

    ways = [way for way in itertools.product(range(4), repeat=3) if sum(way) == 4]
    assert sum(found) == 4 and worth(found) == pytest.approx(max(map(worth, ways)))


def test_more_candidates_are_taken_only_where_they_pay() -> None:
    """No guess is ever right: all extra rows belong to the root, and no tree has nodes."""
    trees = choose_trees([((0,), 0.0), ((0, 0), 0.0)], num_heads=2, rows=6)
    assert all(tree.paths == [] for tree in trees)
    assert tokens_per_step(trees) == pytest.approx(1)
    assert isinstance(trees[0], SparseTree)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "opt"])
def test_no_node_attends_to_extra_rows(tiny: Make, prompt_of: Make, family: str, name: str) -> None:
    """Logits of a tree's nodes with and without extra rows, for unequal texts of a batch."""
    model = tiny(family)
    target = AttentionTarget(model)
    drafter = make_drafter(model, name, nodes=14)
    prompts = [prompt_of(21), prompt_of(5)]
    cache = target.cache(2)
    target.prefill(cache, prompts)
    guesses = [[[5, 6, 7], [8, 9, 10], [11, 12, 13]][: drafter._heads.num_heads]] * 2
    drafts = [drafter._draft(3, guesses[0], 9), drafter._draft(4, [], 9)]
    assert all(draft.extra_rows for draft in drafts) and len(drafts[0]) > 2
    bare = [Draft(d.tokens, d.parents, d.kinds) for d in drafts]
    logits_BNV = target.verify(cache, drafts, drafter.needs).logits_BNV
    alone_BNV = target.verify(cache, bare, Needs()).logits_BNV
    for row, draft in enumerate(drafts):
        torch.testing.assert_close(
            logits_BNV[row, : len(draft)], alone_BNV[row, : len(draft)], rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "gpt2", "opt"])
def test_training_computes_the_states_that_drafting_does(
    tiny: Make, prompt_of: Make, family: str, name: str
) -> None:
    """States at positions of whole texts give the guesses that a step makes there."""
    model = tiny(family)
    target, heads = AttentionTarget(model), make_heads(model, name)
    texts = [prompt_of(23), prompt_of(23, seed=8)]
    batch = batch_of(target, heads, torch.tensor(texts))
    position = 20
    batch_R, position_R = torch.tensor([0, 0, 1]), torch.tensor([3, position, position])
    with torch.no_grad():
        states = list(heads.states(batch, batch_R, position_R))
    drafter = METHODS[name][1](heads, TREE, InPassDrafter.Config(nodes=40))
    cache = target.cache(2)
    target.prefill(cache, [text[:position] for text in texts])
    drafts = [drafter._draft(text[position], [], 9) for text in texts]
    logits_BNV = target.verify(cache, drafts, heads.needs).logits_BNV
    width = len(heads.extra_rows) // heads.num_heads
    for row in range(2):
        extra_logits_NV = logits_BNV[row, 1 : drafts[row].num_rows]
        mean_KV = extra_logits_NV.view(heads.num_heads, width, -1).mean(1)
        for k, state_RD in enumerate(states):
            found_V = heads.frozen.logits(heads.frozen.output(state_RD[1 + row]))
            torch.testing.assert_close(found_V, mean_KV[k], rtol=1e-3, atol=1e-4)


def batch_of(target: AttentionTarget, heads: Any, tokens_BL: torch.Tensor) -> Any:
    kept = TextCache(target.num_layers)
    features = read_features(target, tokens_BL, heads.needs, keep=kept)
    return TrainingBatch(
        tokens_BL=tokens_BL,
        loss_mask_BL=torch.ones_like(tokens_BL, dtype=torch.bool),
        features=features,
        extra_rows=functools.partial(read_extra_rows, target, kept),
    )


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_is_the_cross_entropy_against_the_target(
    tiny: Make, prompt_of: Make, name: str
) -> None:
    """Against the equation at each position and head."""
    model = tiny("llama")
    heads = make_heads(model, name)
    batch = batch_of(
        AttentionTarget(model), heads, torch.tensor([prompt_of(14), prompt_of(14, seed=2)])
    )
    model.requires_grad_(False)
    try:
        done = compute_loss(heads, batch)
    finally:
        model.requires_grad_(True)
    batch_R, position_R = torch.ones(2, 14 - 2).nonzero(as_tuple=True)
    with torch.no_grad():
        states = list(heads.states(batch, batch_R, position_R))
        for k, state_RD in enumerate(states):
            losses = []
            for at, (row, position) in enumerate(zip(batch_R, position_R, strict=True)):
                if position + 2 + k < 14:
                    logits_LV = model(batch.tokens_BL[row][None]).logits[0]
                    probs_V = logits_LV[position + 1 + k].softmax(-1)
                    logq_V = model.lm_head(state_RD[at]).log_softmax(-1)
                    losses.append(float(-(probs_V * logq_V).sum()))
            assert done.counts[k] == len(losses)
            assert done.loss[k] == pytest.approx(sum(losses), rel=1e-4)


def test_positions_are_chosen_anew_and_no_more_than_asked(tiny: Make) -> None:
    heads = PPDHeads(PPDHeads.Config(anchors=3), tiny("llama"), None)
    batch_R = torch.tensor([0] * 9 + [2] * 2)
    position_R = torch.arange(11)
    chosen = [heads.choose(batch_R, position_R) for _ in range(4)]
    for rows, positions in chosen:
        assert rows.tolist() == [0, 0, 0, 2, 2]
        assert positions[:3].tolist() == sorted(set(positions[:3].tolist())) and positions[
            3:
        ].tolist() == [
            9,
            10,
        ]
    assert len({tuple(positions.tolist()) for _, positions in chosen}) > 1


def test_recurrent_targets_are_refused(tiny: Make) -> None:
    model = tiny("mamba2")
    with pytest.raises(UnsupportedError, match="ppd cannot draft for mamba2"):
        Runner(model, draft=make_drafter(model, "ppd"))
