from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from spectool.data.states import StateCodec
from spectool.data.stored_log_probs import LogProbsWriter, StoredLogProbs, expected_bytes
from spectool.data.windows import Batch, Windows, cut
from spectool.errors import CheckpointError, InputError, SpectoolError, UsageError
from spectool.evaluate.fidelity import LogProbsReference, StoredReference, score

VOCABULARY = 7


def windows(bos: int | None = 3) -> Windows:
    ids = torch.randint(0, VOCABULARY, (41,), generator=torch.Generator().manual_seed(1)).tolist()
    return cut(ids, length=6, bos=bos)


def save(log_probs: Any, path: Path, top_k: int, bos: int | None = 3) -> StoredLogProbs:
    with LogProbsWriter(path, windows(bos), VOCABULARY, top_k=top_k) as writer:
        score(windows(bos), log_probs(3), VOCABULARY, sink=writer.add)
        writer.finish(source="sha256:0", tokenizer="0")
    return StoredLogProbs(path)


@pytest.mark.parametrize("bos", [None, 3])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_lossless_file_stands_for_the_reference(
    tmp_path: Path, table_probs: Any, bos: int | None, batch_size: int
) -> None:
    saved = save(table_probs, tmp_path / "ref", 0, bos)
    assert [g.tolist() for g in saved.windows.groups] == [g.tolist() for g in windows(bos).groups]
    ours = table_probs(2)
    live = score(windows(bos), ours, VOCABULARY, reference=LogProbsReference(table_probs(3)))
    read = score(
        saved.windows, ours, VOCABULARY, reference=StoredReference(saved), batch_size=batch_size
    )
    assert read.figures.keys() == live.figures.keys()
    for name, expected_N in live.figures.items():
        torch.testing.assert_close(read.figures[name], expected_N, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("top_k", [1, 3, 6])
def test_top_k_bounds_the_kl_from_below_and_keeps_the_rest_exact(
    tmp_path: Path, table_probs: Any, top_k: int
) -> None:
    saved = save(table_probs, tmp_path / "ref", top_k)
    ours = table_probs(2)
    live = score(windows(), ours, VOCABULARY, reference=LogProbsReference(table_probs(3)))
    read = score(saved.windows, ours, VOCABULARY, reference=StoredReference(saved))
    exact = {"nll", "reference_nll", "delta_p_squared", "same_top"} | (
        {"top5"} if top_k >= 5 else set()
    )
    assert read.figures.keys() == exact | {"kl"}
    for name in exact:
        torch.testing.assert_close(read.figures[name], live.figures[name])
    assert read.figures["kl"].gt(-1e-6).all()
    assert (read.figures["kl"] <= live.figures["kl"] + 1e-5).all()
    # With all but one token kept the rest is that token: nothing is lost.
    if top_k == VOCABULARY - 1:
        assert read.mean("kl") == pytest.approx(live.mean("kl"), rel=1e-4)


@pytest.mark.parametrize("top_k", [0, 3])
def test_the_stated_size_is_the_files_size(tmp_path: Path, table_probs: Any, top_k: int) -> None:
    save(table_probs, tmp_path / "ref", top_k)
    stated = expected_bytes(windows(), VOCABULARY, top_k)
    header = 1000
    assert stated <= (tmp_path / "ref").stat().st_size <= stated + header


class LinearLogProbs:
    """Model whose logits are a product of a state of the last token, capped or not."""

    def __init__(self, cap: float | None = None) -> None:
        generator = torch.Generator().manual_seed(5)
        self.lm_head = torch.randn(60, 4, generator=generator), torch.zeros(60)
        logits_VV = torch.randn(60, 4, generator=generator) @ self.lm_head[0].T
        if cap is not None:
            logits_VV = cap * torch.tanh(logits_VV / cap)
        self.logp_VV = torch.log_softmax(logits_VV, -1)

    def __call__(self, batch: Batch) -> Tensor:
        return self.logp_VV[batch.ids_BL[:, -1 - batch.scored : -1]]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_states_stand_for_all_log_probabilities(tmp_path: Path, batch_size: int) -> None:
    model, path = LinearLogProbs(), tmp_path / "ref"
    with LogProbsWriter(path, windows(), 60, top_k=0) as writer:
        writer.keep_states(StateCodec(*model.lm_head))
        score(windows(), cast(Any, model), 60, sink=writer.add, batch_size=batch_size)
        writer.finish(source="sha256:0", tokenizer="0")
    saved = StoredLogProbs(path)
    assert saved.is_complete and saved.record.width == 4 and 0 < saved.record.error < 2e-5
    # 4 numbers a position, and the lm_head once.
    assert path.stat().st_size < expected_bytes(windows(), 4, 0) + 4 * 60 * 5 + 1200
    for batch in windows().batches(60, batch_size=2):
        found = saved.read("logp", batch.group, batch.rows)
        assert (found - model(batch).flatten(0, 1)).abs().max() <= saved.record.error
    found_kl = score(windows(), cast(Any, model), 60, reference=StoredReference(saved)).mean("kl")
    assert abs(found_kl) < 1e-5


def test_states_that_do_not_give_the_log_probabilities_back_are_refused(tmp_path: Path) -> None:
    model = LinearLogProbs(cap=1.0)
    with LogProbsWriter(tmp_path / "ref", windows(), 60, top_k=0) as writer:
        writer.keep_states(StateCodec(*model.lm_head))
        with pytest.raises(SpectoolError, match="no product with its lm_head"):
            score(windows(), cast(Any, model), 60, sink=writer.add)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept(tmp_path: Path, table_probs: Any) -> None:
    (tmp_path / "ref").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        save(table_probs, tmp_path / "ref", 0)
    assert (tmp_path / "ref").read_text() == "mine"


def test_another_safetensors_file_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "other")
    with pytest.raises(CheckpointError, match="not a reference file"):
        StoredLogProbs(tmp_path / "other")


def test_a_place_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        LogProbsWriter(tmp_path / "absent" / "ref", windows(), VOCABULARY, top_k=0)


def test_an_unfinished_file_leaves_nothing(tmp_path: Path, table_probs: Any) -> None:
    with LogProbsWriter(tmp_path / "ref", windows(), VOCABULARY, top_k=0) as writer:
        score(windows(), table_probs(3), VOCABULARY, sink=writer.add)
    assert list(tmp_path.iterdir()) == []
