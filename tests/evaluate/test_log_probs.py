from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import spectool
from spectool.checkpoint.tensors import open_checkpoint
from spectool.data.windows import cut
from spectool.errors import TextError
from spectool.evaluate.log_probs import BlockwiseLogProbs, ResidentLogProbs
from spectool.quantize.job import QuantizeJob
from spectool.quantize.methods.rtn import RTN
from spectool.quantize.run import quantize


def test_without_start_token_the_rest_is_dropped() -> None:
    windows = cut(list(range(23)), length=5, bos=None)
    assert [group.tolist() for group in windows.groups] == [
        [list(range(i, i + 5)) for i in range(0, 20, 5)]
    ]
    assert windows.num_tokens == 4 * 4


def test_with_start_token_every_token_is_scored_once() -> None:
    windows = cut(list(range(10, 33)), length=5, bos=1)
    scored = [token for group in windows.groups for row in group for token in row[1:].tolist()]
    assert scored == list(range(10, 33))
    assert all((group[:, 0] == 1).all() for group in windows.groups)
    assert windows.num_tokens == 23


@pytest.mark.parametrize("bos", [None, 1])
def test_a_text_shorter_than_a_window_is_refused(bos: int | None) -> None:
    with pytest.raises(TextError, match="fewer than one window of 8"):
        cut([5] * 6, length=8, bos=bos)


def test_batches_cover_all_windows_in_order() -> None:
    windows = cut(list(range(29)), length=4, bos=0)
    batches = list(windows.batches(vocabulary=10, batch_size=3))
    assert torch.equal(torch.cat([b.ids_BL for b in batches if b.group == 0]), windows.groups[0])
    assert [b.ids_BL.shape[0] for b in batches] == [3, 3, 3, 1]


@pytest.mark.parametrize("family", ["llama-tied", "gemma3", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("activations", [None, "exact", "int8"])
def test_block_by_block_equals_resident(
    family: str, activations: str | None, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = checkpoint(family)
    if activations is not None:
        path = tmp_path / "packed"
        job = QuantizeJob(method="rtn", config=RTN.Config())
        quantize(open_checkpoint(checkpoint(family)), path, job)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 300, (90,), generator=generator).tolist()
    windows = cut(ids, length=20, bos=0)
    model = spectool.load(path, activations=activations or "auto")
    # As block by block. The default, grouped products, calls the BLAS with other shapes: that moves
    # the last bits on a processor without AVX-512 (by 1.9e-6; MKL_ENABLE_INSTRUCTIONS=AVX2).
    model.set_experts_implementation("eager")
    resident = ResidentLogProbs(model)
    blockwise = BlockwiseLogProbs(
        open_checkpoint(path),
        windows,
        dtype=torch.float32,
        device=torch.device("cpu"),
        activations=activations,
    )
    assert blockwise.activations == resident.activations
    for batch in windows.batches(320, batch_size=4):
        assert torch.equal(blockwise(batch), resident(batch))
