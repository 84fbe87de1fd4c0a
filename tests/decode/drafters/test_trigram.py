"""Scores and trees against slow implementations of their definitions."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from spectool.decode import draft_state
from spectool.decode.drafters.trigram import TrigramDrafter, TrigramTable
from spectool.decode.generate import Runner
from spectool.decode.request import Request
from spectool.decode.tree import Draft
from spectool.errors import CheckpointError

from ..conftest import request_of
from ..trees import path_to

Begin = Callable[..., None]
Scores = dict[tuple[int, int], dict[int, float]]
Flat = dict[tuple[int, int, int], float]


def random_tokens(seed: int, size: int, vocab: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(vocab) for _ in range(size)]


def slow_scores(tokens: list[int]) -> Scores:
    """Count 0.25 per occurrence, up to 3; beyond 12 successors drop the lowest old one."""
    scores: Scores = {}
    for at in range(len(tokens) - 2):
        one, two, three = tokens[at : at + 3]
        after = scores.setdefault((one, two), {})
        after[three] = min(after.get(three, 0) + 0.25, 3.0)
        if len(after) == 13:
            others = [token for token in after if token != three]
            lowest = min(after[token] for token in others)
            del after[min(token for token in others if after[token] == lowest)]
    return scores


def slow_paths(scores: Scores, tokens: list[int], depth: int) -> dict[tuple[int, ...], float]:
    """Return all continuations of up to `depth` tokens, each with the product of its shares."""
    paths: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(depth):
        for path, share in list(paths.items()):
            one, two = (*tokens, *path)[-2:]
            after = scores.get((one, two), {})
            for three, score in after.items():
                paths[*path, three] = share * score / sum(after.values())
    del paths[()]
    return paths


def held(table: TrigramTable) -> Flat:
    return {(one, two, three): score for one, two, three, score in table}


def flat(scores: Scores) -> Flat:
    return {
        (*pair, three): score for pair, after in scores.items() for three, score in after.items()
    }


def paths_of(draft: Draft) -> list[tuple[int, ...]]:
    return [
        tuple(draft.tokens[at] for at in path_to(draft, node)[1:]) for node in range(1, len(draft))
    ]


@pytest.mark.parametrize(("size", "vocab"), [(42, 3), (123, 5), (431, 18), (900, 30)])
def test_scores_are_their_definition(size: int, vocab: int) -> None:
    """Learnt in pieces that overlap by two tokens, as steps bring them."""
    tokens, table = random_tokens(size, size, vocab), TrigramTable()
    # One pair gets more successors than are kept.
    tokens += [token for three in random_tokens(1, 90, 20) for token in (1, 2, three)]
    table.learn(tokens[:10])
    for start in range(10, len(tokens), 7):
        table.learn(tokens[start - 2 : start + 7])
    expected = slow_scores(tokens)
    assert held(table) == pytest.approx(flat(expected))
    for (one, two), scores in expected.items():
        total = sum(scores.values())
        after = table.after(one, two)
        assert after == sorted(after, reverse=True)
        assert {t: share for share, t in after} == pytest.approx(
            {t: score / total for t, score in scores.items()}
        )


def test_a_pair_keeps_12_successors_and_lets_new_ones_in() -> None:
    table = TrigramTable()
    for three in (*range(10, 22), *range(11, 22), 10):
        table.learn([1, 2, three])
    assert {token for _, token in table.after(1, 2)} == set(range(10, 22))
    # It has the lowest score, yet another one is dropped.
    table.learn([1, 2, 99])
    assert {token for _, token in table.after(1, 2)} == {*range(11, 22), 99}
    table.learn([1, 2, 98])
    assert {token for _, token in table.after(1, 2)} == {*range(11, 22), 98}


def test_a_score_ends_at_3() -> None:
    table = TrigramTable()
    table.learn([7] * 99)
    assert held(table) == {(7, 7, 7): pytest.approx(3.0)}


@pytest.mark.parametrize("nodes", [1, 6, 25, 1000])
def test_the_tree_is_the_best_of_its_size(begin: Begin, nodes: int) -> None:
    """Against all paths of up to three tokens; equally likely ones are interchangeable."""
    for seed in range(8):
        tokens = random_tokens(seed, 90, 4)
        drafter, request = (
            TrigramDrafter(TrigramDrafter.Config(nodes=nodes, depth=3)),
            request_of(tokens),
        )
        begin(drafter, [request])
        draft = drafter.propose([request], [9])[0]
        every = slow_paths(slow_scores(tokens), tokens, 3)
        found = paths_of(draft)
        assert len(found) == len(set(found)) == min(nodes, len(every))
        shares = [every[path] for path in found]
        assert shares == pytest.approx(sorted(every.values(), reverse=True)[:nodes])
        assert draft.sources is not None
        # In eighths; a share between two of them may be rounded either way.
        for source, share in zip(draft.sources[1:], shares, strict=True):
            assert source in (int(8 * share - 1e-6), int(8 * share + 1e-6))


def test_a_smaller_tree_is_a_beginning_of_a_larger(begin: Begin) -> None:
    request = request_of(random_tokens(3, 120, 6))
    drafts = []
    for nodes in (4, 11, 50):
        drafter = TrigramDrafter(TrigramDrafter.Config(nodes=nodes))
        begin(drafter, [request])
        drafts.append(drafter.propose([request], [9])[0])
    for small, large in itertools.pairwise(drafts):
        assert large.tokens[: len(small)] == small.tokens
        assert large.parents[: len(small)] == small.parents


def test_equal_inputs_equal_trees(begin: Begin) -> None:
    tokens = random_tokens(5, 200, 7)
    drafts = []
    for _ in range(2):
        drafter, request = TrigramDrafter(), request_of(tokens)
        begin(drafter, [request])
        drafts += [drafter.propose([request], [9])[0] for _ in range(2)]
    assert all(draft == drafts[0] for draft in drafts)
    assert len(drafts[0]) == 33


@pytest.mark.parametrize("limit", [0, 1, 2, 20])
def test_no_deeper_than_the_budget(begin: Begin, limit: int) -> None:
    drafter, request = TrigramDrafter(TrigramDrafter.Config(depth=5)), request_of([4, 5, 6] * 4)
    begin(drafter, [request])
    assert max(drafter.propose([request], [limit])[0].depths) == min(limit, 5)


@pytest.mark.parametrize("tokens", [[1], [1, 1], [1, 2, 3, 4]])
def test_nothing_known_is_an_empty_draft(begin: Begin, tokens: list[int]) -> None:
    drafter, request = TrigramDrafter(), request_of(tokens)
    begin(drafter, [request])
    assert drafter.propose([request], [9])[0].tokens == tokens[-1:]


def test_every_committed_trigram_counts_once(
    tiny: Callable[..., PreTrainedModel], endless: Any, prompt_of: Callable[..., list[int]]
) -> None:
    """Whatever a step brings; trigrams of the prompt and across steps included."""
    drafter, prompt = TrigramDrafter(), prompt_of(17)
    result = Runner(endless(tiny("llama")), draft=drafter).generate([prompt], max_new_tokens=60)[0]
    assert result.accepted > 0
    assert held(drafter.table) == pytest.approx(flat(slow_scores(prompt + result.token_ids)))


def kept(begin: Begin, request: Request, path: Path) -> tuple[TrigramDrafter, TrigramDrafter]:
    """Return a drafter that has learnt a text, and one that loaded its state."""
    first = TrigramDrafter(TrigramDrafter.Config(state=str(path)))
    begin(first, [request])
    first.close()
    return first, TrigramDrafter(TrigramDrafter.Config(state=str(path)))


def test_a_kept_table_is_the_same_to_the_last_bit(begin: Begin, tmp_path: Path) -> None:
    """Scores are stored in float32; storing them again gives equal bytes."""
    first, reloaded = kept(begin, request_of(random_tokens(9, 600, 8)), tmp_path / "one")
    scores = torch.tensor(list(held(first.table).values()), dtype=torch.float32)
    assert dict(zip(held(first.table), scores.tolist(), strict=True)) == held(reloaded.table)
    reloaded.config = TrigramDrafter.Config(state=str(tmp_path / "two"))
    reloaded.close()
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_kept_table_drafts_the_same(begin: Begin, tmp_path: Path) -> None:
    """Equally likely tokens included."""
    request = request_of(random_tokens(9, 600, 8))
    first, reloaded = (
        drafter.propose([request], [9])[0] for drafter in kept(begin, request, tmp_path / "t")
    )
    assert (first.tokens, first.parents) == (reloaded.tokens, reloaded.parents)


def test_an_empty_table_is_kept_too(begin: Begin, tmp_path: Path) -> None:
    path = str(tmp_path / "table")
    TrigramDrafter(TrigramDrafter.Config(state=path)).close()
    drafter, request = TrigramDrafter(TrigramDrafter.Config(state=path)), request_of([1, 2])
    begin(drafter, [request])
    assert drafter.propose([request], [9])[0].tokens == [2]


@pytest.mark.parametrize(
    "tensors",
    [
        {"trigrams": torch.zeros(2, 3, dtype=torch.int32)},
        {"scores": torch.zeros(2)},
        {"trigrams": torch.zeros(2, 3, dtype=torch.int32), "scores": torch.zeros(3)},
        {"trigrams": torch.zeros(2, 2, dtype=torch.int32), "scores": torch.zeros(2)},
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    path = tmp_path / "table"
    draft_state.save(path, "trigram", tensors)
    with pytest.raises(CheckpointError, match="not a table of trigrams with a score each"):
        TrigramDrafter(TrigramDrafter.Config(state=str(path)))


def test_a_kept_table_of_a_larger_vocabulary_is_refused(begin: Begin, tmp_path: Path) -> None:
    path = tmp_path / "table"
    first = TrigramDrafter(TrigramDrafter.Config(state=str(path)))
    first.table.learn([5, 320, 6])
    first.close()
    drafter = TrigramDrafter(TrigramDrafter.Config(state=str(path)))
    with pytest.raises(CheckpointError, match="holds token 320; the model has 320"):
        begin(drafter, [request_of([4])])
