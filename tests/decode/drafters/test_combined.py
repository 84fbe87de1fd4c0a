"""The merged tree is the union of its drafters' trees, in their order."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from transformers import PreTrainedModel

from spectool.decode.drafters.combined import Combined
from spectool.decode.drafters.ngram import NgramDrafter
from spectool.decode.drafters.recycle import RecycleDrafter
from spectool.decode.generate import Runner
from spectool.decode.protocol import Needs, Outcome
from spectool.decode.tree import Draft
from spectool.errors import UsageError

from ..conftest import request_of
from ..trees import path_to, trie

Scripted = Callable[..., Any]
Path = tuple[int, ...]


def paths_of(draft: Draft) -> list[Path]:
    """Return the path of tokens to each node, in the order of the nodes."""
    return [tuple(draft.tokens[at] for at in path_to(draft, node)) for node in range(len(draft))]


def random_paths(seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(3) for _ in range(rng.randint(1, 4))] for _ in range(5)]


def merged(scripted: Scripted, scripts: Sequence[list[list[int]]], nodes: int = 99) -> Draft:
    drafters = [scripted(lambda tokens, limit, paths=paths: paths) for paths in scripts]
    return Combined(drafters, nodes).propose([request_of([9])], [20])[0]


def test_the_tree_is_the_union_the_first_drafters_nodes_first(scripted: Scripted) -> None:
    for seed in range(0, 60, 3):
        scripts = [random_paths(seed + which) for which in range(3)]
        each = [paths_of(trie(9, paths, nodes=64)) for paths in scripts]
        draft = merged(scripted, scripts)
        found = paths_of(draft)
        assert found == list(dict.fromkeys(path for paths in each for path in paths))
        # Every node's source names the drafters that proposed it.
        assert draft.sources is not None
        assert list(draft.sources[1:]) == [
            tuple((which, ()) for which, paths in enumerate(each) if path in paths)
            for path in found[1:]
        ]


def test_own_sources_are_kept() -> None:
    def drafter_of(sources: list[Any]) -> Any:
        draft = Draft([9, 1, 2], [-1, 0, 1], ["deterministic"] * 3, sources=[(), *sources])
        stub = NgramDrafter()
        stub.propose = lambda requests, budget: [draft]  # type: ignore[method-assign]
        return stub

    combined = Combined([drafter_of(["a", "b"]), drafter_of([7, 8])], 9)
    draft = combined.propose([request_of([9])], [9])[0]
    assert draft.tokens == [9, 1, 2]
    assert draft.sources == [(), ((0, "a"), (1, 7)), ((0, "b"), (1, 8))]


@pytest.mark.parametrize("nodes", [1, 3, 7])
def test_nodes_are_bounded_and_a_nodes_source_names_all_its_proposers(
    scripted: Scripted, nodes: int
) -> None:
    for seed in range(0, 60, 2):
        scripts = [random_paths(seed), random_paths(seed + 1)]
        whole, cut = merged(scripted, scripts), merged(scripted, scripts, nodes)
        assert len(cut) == min(nodes + 1, len(whole))
        assert whole.sources is not None
        known = dict(zip(paths_of(whole), whole.sources, strict=True))
        assert cut.sources == [known[path] for path in paths_of(cut)]
        assert paths_of(cut) == paths_of(whole)[: len(cut)]


def test_needs_are_all_of_theirs(scripted: Scripted) -> None:
    needs = [Needs(top=8), Needs(layers=(3, -1), final=True), Needs(layers=(0, 3), probs=True)]
    drafters = [scripted(lambda tokens, limit: [], wanted) for wanted in needs]
    combined = Combined(drafters, 9)
    assert combined.needs == Needs(top=8, layers=(-1, 0, 3), final=True, probs=True)
    assert combined.name == "scripted+scripted+scripted"


def test_a_drafter_that_does_not_share_is_refused(scripted: Scripted) -> None:
    alone = scripted(lambda tokens, limit: [])
    alone.combines = False
    with pytest.raises(UsageError, match="--draft ngram\\+scripted: scripted does not share a"):
        Combined([NgramDrafter(), alone], 9)


def test_all_hear_of_everything(
    tiny: Callable[..., PreTrainedModel], endless: Any, scripted: Scripted
) -> None:
    """The outcome's draft is the merged one, so each drafter observes the others' nodes."""
    drafters = [scripted(lambda tokens, limit, n=n: [[n, n + 1]]) for n in (40, 50)]
    combined = Combined(drafters, 9)
    Runner(endless(tiny("llama")), draft=combined).generate([[5, 6]], max_new_tokens=9)
    outcomes: list[list[Outcome]] = [drafter.outcomes for drafter in drafters]
    assert outcomes[0] == outcomes[1] != []
    assert outcomes[0][0].draft.tokens[1:] == [40, 41, 50, 51]
    assert all(len(drafter.prompts) == 1 for drafter in drafters)


def test_closing_reaches_all_even_if_one_fails() -> None:
    closed = []

    class Closing(NgramDrafter):
        def close(self) -> None:
            closed.append(self)
            if len(closed) == 2:
                raise OSError("full")

    drafters = [Closing() for _ in range(3)]
    with pytest.raises(OSError, match="full"):
        Combined(drafters, 9).close()
    assert set(map(id, closed)) == set(map(id, drafters))


def test_greedy_text_is_plain_text(
    tiny: Callable[..., PreTrainedModel], endless: Any, prompt_of: Callable[..., list[int]]
) -> None:
    runner = Runner(endless(tiny("llama")))
    prompts = [prompt_of(15), prompt_of(8)]
    plain = runner.generate(prompts, max_new_tokens=40)
    runner.use(Combined([NgramDrafter(), RecycleDrafter()], 12))
    both = runner.generate(prompts, max_new_tokens=40, batch_size=2)
    assert [r.token_ids for r in both] == [r.token_ids for r in plain]
    assert all(r.accepted > 0 for r in both)
