"""Heads against loops over the equations, their alignment, and drafting that changes nothing."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from spectool.checkpoint.artifact import write_safetensors
from spectool.checkpoint.headers import HEADS, HEADS_FILE
from spectool.decode.drafters.medusa import MedusaDrafter, MedusaHeads
from spectool.decode.generate import Runner
from spectool.decode.heads import artifact as shared_code
from spectool.decode.heads.artifact import HeadsRecord, open_heads, read_finite_tensors
from spectool.decode.heads.base import TOP
from spectool.decode.target.attention import AttentionTarget
from spectool.decode.tree import RankTree, best_paths
from spectool.distill.losses import compute_loss, rank_labels, ranks_of
from spectool.distill.teacher import read_features
from spectool.errors import CheckpointError, NotFinite
from spectool.training import TrainingBatch

from ...conftest import VOCAB
from . import bare
from .bare import bare_model, check_loss, make_batch

PATHS = [[0], [1], [0, 0], [2], [0, 1], [1, 0], [0, 0, 0], [0, 0, 0, 0], [3], [0, 0, 1]]
TREE = [(path, 0.1) for path in PATHS]
make_heads = functools.partial(bare.make_heads, MedusaHeads)


def guesses_of(heads: MedusaHeads, state_D: torch.Tensor) -> list[list[int]]:
    """Return the best guesses of each head."""
    return [
        heads.guess(heads.step(state_D[None], k), k, TOP)[0, 0].tolist()
        for k in range(heads.num_heads)
    ]


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("options", [{}, {"num_layers": 3}, {"shared_head": True}])
def test_untrained_heads_predict_what_the_target_predicts(
    tiny: Callable[..., PreTrainedModel], family: str, options: dict[str, Any]
) -> None:
    model = tiny(family)
    heads = MedusaHeads(MedusaHeads.Config(**options), model, None).eval()
    target = AttentionTarget(model)
    tokens_BL = torch.randint(2, VOCAB, (1, 9))
    final_D = read_features(target, tokens_BL, heads.needs)["final"][0, -1]
    with torch.inference_mode():
        logits_V = model(tokens_BL).logits[0, -1]
        guesses = guesses_of(heads, final_D)
    assert all(guess[0] == logits_V.argmax() for guess in guesses)


def test_loss_and_gradient_are_those_of_the_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of three positions against one sum over heads and positions."""
    monkeypatch.setattr("spectool.distill.losses._CHUNK_BYTES", 3 * 4 * 17)
    batch = make_batch()
    heads = make_heads(bare_model(bias=True), num_heads=3, num_layers=2)

    def by_head() -> Iterator[tuple[list[torch.Tensor], int]]:
        for k, head in enumerate(heads.heads):
            losses, right = [], 0
            for row, position in itertools.product(range(3), range(23)):
                ahead = position + 2 + k
                if ahead < 23 and batch.loss_mask_BL[row, ahead]:
                    state_D = batch.features["final"][row, position]
                    for block in head.blocks:
                        z_D = block.weight @ state_D + block.bias
                        state_D = state_D + z_D * torch.sigmoid(z_D)
                    logits_V = head.lm_head.weight @ state_D + head.lm_head.bias
                    label = batch.tokens_BL[row, ahead]
                    losses.append(-torch.log_softmax(logits_V, -1)[label])
                    right += int(logits_V.argmax() == label)
            yield losses, right

    check_loss(heads, batch, by_head, decay=0.8, tolerance=1e-4)


@pytest.mark.parametrize("size", [None, 5])
def test_ranks_are_those_of_sorted_guesses(size: int | None) -> None:
    batch = make_batch()
    token_map = None if size is None else torch.tensor([1, 4, 8, 9, 16])
    heads = make_heads(bare_model(), token_map=token_map, num_heads=2)
    found = rank_labels(heads, batch).tolist()
    wanted = []
    for row, position in itertools.product(range(3), range(23)):
        # x_{t+1}, which the target predicts, and the tokens of both heads.
        if position + 3 >= 23 or not batch.loss_mask_BL[row, position + 1 : position + 4].all():
            continue
        guesses = guesses_of(heads, batch.features["final"][row, position])
        ranks = []
        for k in range(2):
            token = int(batch.tokens_BL[row, position + 2 + k])
            ranks.append(guesses[k].index(token) if token in guesses[k] else None)
        wanted.append(ranks)
    assert len(found) == len(wanted) > 10
    for ours, theirs in zip(found, wanted, strict=True):
        for mine, want in zip(ours, theirs, strict=True):
            if want is None:
                # Worse than the guesses that are kept, or outside the vocabulary.
                assert mine >= TOP
            else:
                assert mine == want


def test_heads_learn_the_token_at_their_own_distance_and_no_other() -> None:
    """On a cycle, head k is always right about x_{t+2+k}, from states that only reveal x_t."""
    period, num_heads = 11, 4
    tokens_BL = (torch.arange(60) * 3 % period)[None]
    batch = TrainingBatch(
        tokens_BL=tokens_BL,
        loss_mask_BL=torch.ones_like(tokens_BL, dtype=torch.bool),
        features={"final": torch.eye(12)[tokens_BL]},
    )
    heads = make_heads(bare_model(12, period), num_heads=num_heads)
    optimizer = torch.optim.AdamW(heads.parameters(), lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        done = compute_loss(heads, batch)
        optimizer.step()
    assert done.right == done.counts
    assert (rank_labels(heads, batch) == 0).all()
    for token in range(period):
        guesses = guesses_of(heads, torch.eye(12)[token])
        assert [guess[0] for guess in guesses] == [(token + 3 * (2 + k)) % period for k in range(4)]


def test_best_paths_are_the_best_tree_of_every_size() -> None:
    """Against all parent-closed sets of paths."""
    generator = torch.Generator().manual_seed(0)
    ranks_RK = torch.randint(0, 4, (40, 3), generator=generator)
    paths = [path for path, _ in best_paths(ranks_RK, nodes=64, top=3)]
    assert all(rank < 3 for path in paths for rank in path)

    def gain(chosen: tuple[tuple[int, ...], ...]) -> int:
        """Count accepted draft tokens over all texts."""
        total = 0
        for ranks in ranks_RK.tolist():
            depth = 0
            while depth < 3 and tuple(ranks[: depth + 1]) in chosen:
                depth += 1
            total += depth
        return total

    for size in (1, 2, 3):
        closed = [
            chosen
            for chosen in itertools.combinations(paths, size)
            if all(len(path) == 1 or path[:-1] in chosen for path in chosen)
        ]
        assert gain(tuple(paths[:size])) == max(map(gain, closed))
    shares = [share for _, share in best_paths(ranks_RK, nodes=7, top=3)]
    assert sum(shares) == pytest.approx(gain(tuple(paths[:7])) / 40)
    RankTree(paths)


def test_heads_that_know_the_text_bring_a_whole_path_every_step(
    tiny: Callable[..., PreTrainedModel],
    endless: Callable[[PreTrainedModel], PreTrainedModel],
    prompt_of: Callable[..., list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runner = Runner(endless(tiny("llama")))
    prompt = prompt_of(9)
    (plain,) = runner.generate([prompt], max_new_tokens=41)
    whole = prompt + plain.token_ids
    drafter = MedusaDrafter(make_heads(runner.target.model), TREE)
    runner.use(drafter)

    committed = [len(prompt) + 1]

    def know(state: torch.Tensor, k: int, count: int) -> torch.Tensor:
        return torch.tensor([[[whole[committed[0] + k], 0, 1, 2]]])

    def observe(outcomes: Any) -> None:
        committed[0] += len(outcomes[0].path)
        MedusaDrafter.observe(drafter, outcomes)

    monkeypatch.setattr(drafter._heads, "guess", know)
    monkeypatch.setattr(drafter, "observe", observe)
    (result,) = runner.generate([prompt], max_new_tokens=41)
    assert result.token_ids == plain.token_ids
    # The prompt's pass brings one token, every other pass four drafted ones and one more.
    assert result.forwards == 1 + 40 / 5


@pytest.fixture
def stored(tmp_path: Path, checkpoint: Callable[..., Path]) -> Callable[..., Path]:
    """Write a heads directory for the tiny Llama, as training would."""

    def write(*, change: dict[str, Any] | None = None, **options: Any) -> Path:
        runner = Runner(checkpoint("llama"))
        assert runner.tokenizer is not None
        token_map = None
        if options.get("draft_vocab"):
            token_map = torch.arange(0, 3 * options["draft_vocab"], 3)
        heads = make_heads(runner.target.model, token_map=token_map, **options)
        opened = runner.target.checkpoint
        assert opened is not None
        record = HeadsRecord(
            method="medusa",
            options=heads.config.as_dict(),
            target={
                "lineage": shared_code.lineage(opened),
                "fingerprint": opened.fingerprint(),
                "hidden_size": 32,
                "vocab_size": VOCAB,
                "tokenizer": shared_code.loading.hash_vocabulary(runner.tokenizer),
                **(change or {}),
            },
            accuracy=[0.5] * 4,
            tree=PATHS,
            shares=[0.1] * len(PATHS),
            training={},
        )
        path = tmp_path / "heads"
        path.mkdir()
        (path / HEADS).write_bytes(record.as_bytes())
        write_safetensors(path / HEADS_FILE, heads.state_dict(), {})
        return path

    return write


@pytest.mark.parametrize("options", [{}, {"draft_vocab": 40}, {"shared_head": True}])
def test_stored_heads_draft_the_same(
    stored: Callable[..., Path], checkpoint: Callable[..., Path], options: dict[str, Any]
) -> None:
    path = stored(**options)
    runner = Runner(checkpoint("llama"), draft=f"{path}:nodes=7,depth=3")
    token_map = torch.arange(0, 120, 3) if options.get("draft_vocab") else None
    reloaded = make_heads(runner.target.model, token_map=token_map, **options)
    drafter: Any = runner.drafter
    for state_D in torch.randn(3, 32):
        assert guesses_of(drafter._heads, state_D) == guesses_of(reloaded, state_D)
    assert drafter.config == MedusaDrafter.Config(nodes=7, depth=3)
    (result,) = runner.generate([[5, 6, 7]], max_new_tokens=20)
    runner.use(None)
    assert runner.generate([[5, 6, 7]], max_new_tokens=20)[0].token_ids == result.token_ids
    assert result.drafted > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 64}, "target with hidden_size 64, this one has 32"),
        ({"vocab_size": 9}, "target with vocab_size 9, this one has 320"),
        ({"tokenizer": "sha256:0"}, "trained with another tokenizer"),
        ({"lineage": "sha256:0"}, "trained for another checkpoint than"),
    ],
)
def test_heads_of_another_target_are_refused(
    stored: Callable[..., Path],
    checkpoint: Callable[..., Path],
    change: dict[str, Any],
    message: str,
) -> None:
    path = stored(change=change)
    with pytest.raises(CheckpointError, match=message):
        Runner(checkpoint("llama"), draft=str(path))
    if "lineage" in change:
        runner = Runner(checkpoint("llama"), draft=str(path), allow_other_target=True)
        assert runner.drafter_name == "medusa"
    else:
        with pytest.raises(CheckpointError, match=message):
            Runner(checkpoint("llama"), draft=str(path), allow_other_target=True)


def record_with(tree: list[list[int]]) -> str:
    return HeadsRecord(
        method="medusa", options={}, target={}, accuracy=[], tree=tree,
        shares=[0.1] * len(tree), training={},
    ).as_bytes().decode()  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "have format None"),
        ('{"format_version": 9}', "have format 9"),
        ('{"format_version": 1}', "is not the record of draft heads"),
        (record_with([[0, 0]]), "is not the record of draft heads"),
        (record_with([[0], [0]]), "is not the record of draft heads"),
        (record_with([[99]]), "is not the record of draft heads"),
        (record_with([[-1]]), "is not the record of draft heads"),
        (record_with([[]]), "is not the record of draft heads"),
    ],
)
def test_damaged_records_are_refused(
    tmp_path: Path, checkpoint: Callable[..., Path], text: str, message: str
) -> None:
    (tmp_path / HEADS).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        Runner(checkpoint("llama"), draft=str(tmp_path))


def test_weights_that_are_not_the_records_are_refused(
    stored: Callable[..., Path], checkpoint: Callable[..., Path]
) -> None:
    path = stored()
    write_safetensors(path / HEADS_FILE, {"heads.0.lm_head.weight": torch.zeros(2, 2)}, {})
    with pytest.raises(CheckpointError, match="expected"):
        open_heads(
            path,
            "",
            target=AttentionTarget(Runner(checkpoint("llama")).target.model),
            tokenizer=None,
            allow_other_target=False,
        )


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("heads.0.blocks.0.weight", lambda t: t * torch.nan, "weights are NaN or infinite"),
        ("heads.0.blocks.0.weight", lambda t: t + torch.inf, "weights are NaN or infinite"),
        ("token_map", lambda t: t + 300, "not distinct ids of 320 tokens"),
        ("token_map", lambda t: t * 0, "not distinct ids of 320 tokens"),
        ("token_map", lambda t: t.flip(0), "does not ascend"),
    ],
)
def test_weights_that_no_training_leaves_are_refused(
    stored: Callable[..., Path],
    checkpoint: Callable[..., Path],
    name: str,
    damage: Callable[[torch.Tensor], torch.Tensor],
    message: str,
) -> None:
    path = stored(draft_vocab=30)
    tensors = read_finite_tensors(path / HEADS_FILE)
    write_safetensors(path / HEADS_FILE, {**tensors, name: damage(tensors[name])}, {})
    with pytest.raises(CheckpointError, match=message):
        Runner(checkpoint("llama"), draft=str(path))


def test_ranks_among_nan_logits_are_refused() -> None:
    states_RD, weight_VD = torch.ones(2, 4), torch.full((5, 4), torch.nan)
    with pytest.raises(NotFinite, match="NaN or infinite on held-out text"):
        ranks_of(states_RD, weight_VD, None, torch.tensor([1, 2]))
