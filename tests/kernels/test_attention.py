"""Attention of few rows against its specification, and a row against its mates."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from spectool.kernels import attention, build

pytestmark = pytest.mark.skipif(build.missing() is not None, reason="no kernels here")

HIDDEN = torch.finfo(torch.float32).min


def parts(
    *, batch: int = 2, heads: int = 6, groups: int = 2, rows: int, keys: int, width: int = 20
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + keys)
    q, k, v = (
        torch.randn(batch, count, length, width, generator=generator)
        for count, length in ((heads, rows), (groups, keys), (groups, keys))
    )
    mask = torch.zeros(batch, 1, rows, keys)
    mask.masked_fill_(torch.rand(mask.shape, generator=generator) < 0.3, HIDDEN)
    mask[..., 0] = 0
    return q, k, v, mask


@torch.inference_mode()
def attend(*given: Any) -> Tensor:
    assert attention.supports(*given)
    return attention.attend(*given, 0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "keys"), [(1, 1), (3, 70), (64, 65)])
@pytest.mark.parametrize("width", [1, 16, 20, 128])
def test_it_computes_what_the_twin_does(
    dtype: torch.dtype, rows: int, keys: int, width: int
) -> None:
    q, k, v, mask = parts(rows=rows, keys=keys, width=width)
    q, k, v = (part.to(dtype) for part in (q, k, v))
    # Biases that hide nothing are added.
    mask[..., -1] = -1.5
    expected = attention.twin(q, k, v, mask, 0.3)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(attend(q, k, v, mask), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_the_keys_that_it_sees_only(dtype: torch.dtype) -> None:
    q, k, v, mask = parts(rows=30, keys=90)
    q, k, v = (part.to(dtype) for part in (q, k, v))
    together = attend(q, k, v, mask)
    for row in range(30):
        for text in range(2):
            seen = mask[text, 0, row] == 0
            alone = attend(
                q[text : text + 1, :, row : row + 1],
                k[text : text + 1, :, seen],
                v[text : text + 1, :, seen],
                torch.zeros(1, 1, 1, int(seen.sum())),
            )
            assert torch.equal(alone[0, 0], together[text, row])


def test_hidden_keys_may_hold_anything() -> None:
    q, k, v, mask = parts(rows=2, keys=9)
    expected = attend(q, k, v, mask)
    mask[..., 4] = HIDDEN
    without = attend(q, k, v, mask)
    k[:, :, 4], v[:, :, 4] = torch.nan, torch.inf
    assert torch.equal(attend(q, k, v, mask), without)
    assert not torch.equal(without, expected)


def test_strided_keys_are_read_as_their_values() -> None:
    q, k, v, mask = parts(rows=3, keys=8)
    wide = torch.cat([k, v], 2)
    turned = q.transpose(1, 2).contiguous().transpose(1, 2)
    found = attend(turned, wide[:, :, :8], wide[:, :, 8:], mask)
    assert torch.equal(found, attend(q, k, v, mask))


def test_other_attention_is_left_to_torch() -> None:
    q, k, v, mask = parts(rows=3, keys=8)
    assert not attention.supports(q, k, v, mask)
    with torch.inference_mode():
        assert attention.supports(q, k, v, mask)
        assert not attention.supports(q, k, v, None)
        assert not attention.supports(q.double(), k.double(), v.double(), mask)
        assert not attention.supports(q, k, v[..., :7], mask)
        assert not attention.supports(*parts(rows=257, keys=260))


@torch.inference_mode()
@pytest.mark.parametrize("value", [0.0, -1.0, -30.0, -86.9, -200.0])
def test_scores_far_apart(value: float) -> None:
    q = torch.ones(1, 1, 1, 1)
    k, v = torch.tensor([0.0, value]).view(1, 1, 2, 1), torch.tensor([0.0, 1.0]).view(1, 1, 2, 1)
    found = attention.attend(q, k, v, torch.zeros(1, 1, 1, 2), 1.0)
    expected = torch.tensor([0.0, value], dtype=torch.double).softmax(0)[1]
    torch.testing.assert_close(found.double().view(()), expected, rtol=1e-6, atol=1e-38)


@pytest.mark.slow
def test_all_variants_compute_the_same_bits() -> None:
    script = (
        "import torch\n"
        "from tests.kernels.test_attention import attend, parts\n"
        "for width in (8, 20, 128):\n"
        "    for dtype in (torch.float32, torch.bfloat16):\n"
        "        q, k, v, mask = parts(rows=7, keys=70, width=width)\n"
        "        q, k, v = (part.to(dtype) for part in (q, k, v))\n"
        "        print(attend(q, k, v, mask).float().flatten().tolist())\n"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, build.FORCED: variant.name},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for variant in build.supported()
    }
    assert len(printed) == 1
