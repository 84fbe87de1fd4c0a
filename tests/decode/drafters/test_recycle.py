"""The table holds the model's latest predictions; trees hold its likeliest ranks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectool.decode import draft_state
from spectool.decode.drafters import recycle
from spectool.decode.drafters.recycle import RANKS, RecycleDrafter, make_rank_tree
from spectool.decode.generate import Runner
from spectool.decode.protocol import Outcome, PrefilledPrompt
from spectool.decode.target.attention import AttentionTarget
from spectool.decode.tree import Draft
from spectool.errors import CheckpointError

from ..conftest import request_of
from ..trees import path_to

Tiny = Callable[..., PreTrainedModel]
Begin = Callable[..., None]
PromptOf = Callable[..., list[int]]


@pytest.mark.parametrize("family", ["llama", "gemma2", "mamba2"])
def test_a_text_of_one_token_costs_what_plain_decoding_costs(
    tiny: Tiny, prompt_of: PromptOf, family: str
) -> None:
    """lm_head reads only a prompt's last token, unless a second token is to be generated."""
    model, read = tiny(family), []
    lm_head = model.get_output_embeddings()
    hook = lm_head.register_forward_hook(lambda module, x, out: read.append(out.shape[-2]))
    for draft in (None, "recycle", "trigram+recycle"):
        Runner(model, draft=draft).generate([prompt_of(20)], max_new_tokens=1)
    assert read == [1, 1, 1]
    Runner(model, draft="recycle").generate([prompt_of(20)], max_new_tokens=2)
    assert read[3:5] == [1, 20], "then the table learns the whole prompt"
    hook.remove()


def known(drafter: RecycleDrafter, token: int) -> list[int]:
    return list(drafter.table[token * RANKS : (token + 1) * RANKS])


def assert_likeliest(ids: list[int], logits_V: Tensor) -> None:
    """Check for the ids of the largest logits in order, up to swaps of rounding size."""
    assert len(set(ids)) == RANKS
    torch.testing.assert_close(logits_V[ids], logits_V.topk(RANKS).values, atol=1e-4, rtol=1e-5)


@torch.inference_mode()
def logits_of(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """Return the logits [T, V] after every token, by the model alone."""
    logits: Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0]
    return logits


def filled(begin: Begin, entries: dict[int, list[int]], **options: Any) -> RecycleDrafter:
    """Make a drafter whose table holds these entries; the first one's token is the root."""
    drafter, request = (
        RecycleDrafter(RecycleDrafter.Config(**options)),
        request_of([next(iter(entries))]),
    )
    begin(drafter, [request])
    for token, ids in entries.items():
        draft = Draft([token], [-1], ["deterministic"])
        drafter.observe([Outcome(request=request, draft=draft, path=[0], next_token=0, top=[ids])])
    return drafter


def test_the_prompt_is_in_the_table(tiny: Tiny) -> None:
    """Each token has what was likeliest after its last occurrence."""
    model, prompt = tiny("llama"), [5, 9, 5, 7, 9, 31]
    target, drafter = AttentionTarget(model), RecycleDrafter()
    done = target.prefill(target.cache(1), [prompt], drafter.needs)
    first = int(done.logits_BV[0].argmax())
    request = request_of([*prompt, first])
    drafter.add(
        [PrefilledPrompt(request=request, logits_V=done.logits_BV[0], top=done.top[0])],
        target.cache(1),
    )
    logits = logits_of(model, prompt)
    for token, last in {5: 2, 7: 3, 9: 4, 31: 5}.items():
        assert_likeliest(known(drafter, token), logits[last])
    unseen = set(range(320)) - set(prompt)
    assert all(known(drafter, token) == [-1] * RANKS for token in unseen)


class Checked(RecycleDrafter):
    """Drafter that, after every step, compares the table with the model's logits."""

    def __init__(self, config: RecycleDrafter.Config, model: PreTrainedModel) -> None:
        super().__init__(config)
        self.model = model
        self.rejected = self.repeated = 0

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        super().observe(outcomes)
        for outcome in outcomes:
            draft, path = outcome.draft, outcome.path
            before = outcome.request.tokens[: -len(path)]
            # Each token's deepest accepted node, or else its last rejected one.
            last = {draft.tokens[node]: node for node in range(len(draft))}
            last |= {draft.tokens[node]: node for node in path}
            for token, node in last.items():
                leading = [draft.tokens[above] for above in path_to(draft, node)[1:]]
                assert_likeliest(known(self, token), logits_of(self.model, before + leading)[-1])
            self.rejected += len(set(last.values()) - set(path))
            self.repeated += len(draft) - len(last)


def test_the_table_holds_the_logits_of_every_verified_node(
    tiny: Tiny, endless: Any, prompt_of: PromptOf
) -> None:
    model = endless(tiny("llama"))
    drafter = Checked(RecycleDrafter.Config(nodes=24), model)
    result = Runner(model, draft=drafter).generate([prompt_of(20)], max_new_tokens=40)[0]
    assert result.accepted > 0
    assert drafter.rejected > 0
    assert drafter.repeated > 0


@pytest.mark.parametrize("path", [[0], [0, 1], [0, 1, 3]])
def test_of_a_token_at_several_nodes_the_deepest_accepted_counts(
    begin: Begin, path: list[int]
) -> None:
    """The root counts as accepted."""
    drafter, request = RecycleDrafter(), request_of([7])
    begin(drafter, [request])
    draft = Draft([7, 8, 9, 7, 8, 7], [-1, 0, 0, 1, 2, 3], ["deterministic"] * 6)
    top = [[10 * node + rank for rank in range(RANKS)] for node in range(6)]
    drafter.observe([Outcome(request=request, draft=draft, path=path, next_token=1, top=top)])
    assert known(drafter, 7) == top[max(node for node in path if draft.tokens[node] == 7)]
    assert known(drafter, 8) == top[1 if 1 in path else 4]
    assert known(drafter, 9) == top[2]


def test_what_was_never_seen_is_not_drafted(begin: Begin) -> None:
    drafter, request = RecycleDrafter(), request_of([7])
    begin(drafter, [request])
    assert drafter.propose([request], [9])[0].tokens == [7]
    # With a tiny vocabulary there are fewer ids than ranks.
    drafter = filled(begin, {7: [3, 0, 4], 3: [7, 5]}, depth=3, nodes=64)
    draft = drafter.propose([request], [9])[0]
    assert sorted(draft.tokens[node] for node in range(len(draft)) if draft.parents[node] == 0) == [
        0,
        3,
        4,
    ]
    assert set(draft.tokens) == {0, 3, 4, 5, 7}
    paths = {tuple(draft.tokens[at] for at in path_to(draft, node)) for node in range(len(draft))}
    assert paths == {
        (7,), (7, 3), (7, 0), (7, 4), (7, 3, 7), (7, 3, 5), (7, 3, 7, 3), (7, 3, 7, 0), (7, 3, 7, 4)
    }  # fmt: skip


def test_a_tree_is_filled_from_the_table(begin: Begin) -> None:
    """Each node's token stands at its rank in the table entry of its parent's token."""
    table = {token: [(7 * token + rank + 1) % 60 for rank in range(RANKS)] for token in range(60)}
    drafter = filled(begin, table, nodes=40, depth=4)
    draft = drafter.propose([request_of([0])], [9])[0]
    assert draft.sources is not None
    assert draft.sources[1:] == make_rank_tree(40, 4)
    for node in range(1, len(draft)):
        path: Any = draft.sources[node]
        assert draft.sources[draft.parents[node]] == path[:-1]
        assert draft.tokens[node] == table[draft.tokens[draft.parents[node]]][path[-1]]


@pytest.mark.parametrize("limit", [0, 1, 3, 9])
def test_no_deeper_than_the_budget(begin: Begin, limit: int) -> None:
    table = {token: [(token + rank + 1) % 20 for rank in range(RANKS)] for token in range(20)}
    drafter = filled(begin, table, depth=5)
    assert max(drafter.propose([request_of([0])], [limit])[0].depths) == min(limit, 5)


@pytest.mark.parametrize(("nodes", "depth"), [(1, 1), (7, 2), (33, 3), (80, 6), (300, 8)])
def test_rank_trees_are_nested(nodes: int, depth: int) -> None:
    """A smaller tree is a prefix of a larger one; better ranks come first."""
    whole = make_rank_tree(nodes, depth)
    assert len(whole) == len(set(whole)) == min(nodes, 8 if depth == 1 else nodes)
    assert all(make_rank_tree(size, depth) == whole[:size] for size in range(1, len(whole) + 1, 6))
    for at, path in enumerate(whole):
        assert 1 <= len(path) <= depth
        assert len(path) == 1 or path[:-1] in whole[:at]
        assert path[-1] == 0 or (*path[:-1], path[-1] - 1) in whole[:at]
        assert path[-1] < RANKS


def test_a_rank_tree_has_the_likeliest_paths() -> None:
    """Against all paths of ranks."""
    every = [
        math.prod(recycle._SHARES[rank] for rank in path)
        for length in (1, 2, 3)
        for path in itertools.product(range(RANKS), repeat=length)
    ]
    found = [math.prod(recycle._SHARES[rank] for rank in path) for path in make_rank_tree(100, 3)]
    assert found == pytest.approx(sorted(every, reverse=True)[:100])


def test_the_size_of_the_tree_never_changes_the_text(
    tiny: Tiny, endless: Any, prompt_of: PromptOf
) -> None:
    runner = Runner(endless(tiny("llama")))
    plain = runner.generate([prompt_of(14)], max_new_tokens=40)[0]
    drafted = set()
    for nodes in (1, 3, 16, 80):
        runner.use(f"recycle:nodes={nodes}")
        result = runner.generate([prompt_of(14)], max_new_tokens=40)[0]
        assert result.token_ids == plain.token_ids
        drafted.add(result.drafted)
    assert len(drafted) == 4


def test_requests_that_share_the_table_keep_their_own_text(
    tiny: Tiny, endless: Any, prompt_of: PromptOf
) -> None:
    """Entries learnt from one text are used in the others."""
    runner = Runner(endless(tiny("llama")))
    prompts = [prompt_of(14), prompt_of(9), prompt_of(14)[3:]]
    plain = runner.generate(prompts, max_new_tokens=40)
    drafter = RecycleDrafter()
    runner.use(drafter)
    together = runner.generate(prompts, max_new_tokens=40, batch_size=3)
    assert [r.token_ids for r in together] == [r.token_ids for r in plain]
    assert all(r.accepted > 0 for r in together)


def test_a_table_of_32000_tokens_takes_at_most_2_mb() -> None:
    drafter = RecycleDrafter()
    none: Any = None
    drafter.add([PrefilledPrompt(request=request_of([1]), logits_V=torch.zeros(32000))], none)
    assert drafter.table.itemsize == 4
    assert drafter.table.itemsize * len(drafter.table) == 32000 * RANKS * 4 <= 2_000_000


def test_a_kept_table_drafts_the_same(begin: Begin, tmp_path: Path) -> None:
    path = tmp_path / "table"
    table = {
        token: [(3 * token + rank) % 320 for rank in range(RANKS)] for token in range(0, 320, 2)
    }
    first = filled(begin, table, state=str(path))
    first.close()
    reloaded = RecycleDrafter(RecycleDrafter.Config(state=str(path)))
    assert reloaded.table == first.table
    begin(reloaded, [request_of([4])])
    expected, found = (drafter.propose([request_of([4])], [9])[0] for drafter in (first, reloaded))
    assert len(found) > 9
    assert (found.tokens, found.parents) == (expected.tokens, expected.parents)


def test_a_kept_table_of_another_vocabulary_is_refused(begin: Begin, tmp_path: Path) -> None:
    path = tmp_path / "table"
    draft_state.save(path, "recycle", {"table": torch.zeros(99, RANKS, dtype=torch.int32)})
    drafter = RecycleDrafter(RecycleDrafter.Config(state=str(path)))
    with pytest.raises(CheckpointError, match="a table of 99 tokens; the model has 320"):
        begin(drafter, [request_of([4])])


@pytest.mark.parametrize(
    "table",
    [torch.zeros(320, 7, dtype=torch.int32), torch.zeros(320, RANKS), torch.zeros(320 * RANKS)],
)
def test_what_is_no_table_is_refused(tmp_path: Path, table: Tensor) -> None:
    path = tmp_path / "table"
    draft_state.save(path, "recycle", {"table": table})
    with pytest.raises(CheckpointError, match="not a table of 8 ids per token"):
        RecycleDrafter(RecycleDrafter.Config(state=str(path)))
    path.write_bytes(b"something else altogether")
    with pytest.raises(CheckpointError, match=r"damaged or not safetensors"):
        RecycleDrafter(RecycleDrafter.Config(state=str(path)))


def test_nothing_is_kept_unasked(begin: Begin, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    filled(begin, {7: [1, 2]}).close()
    RecycleDrafter(RecycleDrafter.Config(state="table")).close()
    assert list(tmp_path.iterdir()) == []
