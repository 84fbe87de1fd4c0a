"""Attention of a few rows over cached keys, in which a row's result depends on no other row.

`attention.c`; torch's attention rounds differently for each number of rows and keys, which is
enough to change activations that products round to 8 bits, and so a text.

Shapes: B texts, H heads of queries, G of keys and values, N rows, S keys, D width of a head.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from spectool.kernels import build, threads

# Widest head, and most rows: those of trees; of the many rows of a prompt torch reads the keys less
# often.
MOST_WIDTH, MOST_ROWS = 512, 256
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_Strides = ctypes.c_ssize_t * 3


class _Attention(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "mask", "y")),
        *((name, _Strides) for name in ("q_strides", "k_strides", "v_strides")),
        *((name, ctypes.c_ssize_t) for name in ("heads", "key_heads", "num_rows", "num_keys")),
        ("width", ctypes.c_ssize_t),
        *((name, ctypes.c_float) for name in ("scaling", "hidden", "cap")),
        ("type", ctypes.c_int32),
    ]


def supports(q_BHND: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_B1NS: Tensor | None) -> bool:
    """Whether `attend` takes these tensors here."""
    same = q_BHND.dtype == k_BGSD.dtype == v_BGSD.dtype
    num_rows, width = q_BHND.shape[2:]
    return (
        build.missing() is None
        and q_BHND.device.type == "cpu"
        and same
        and q_BHND.dtype in _TYPES
        and num_rows <= MOST_ROWS
        and width <= MOST_WIDTH
        and v_BGSD.shape[-1] == width
        and mask_B1NS is not None
        and mask_B1NS.shape == (len(q_BHND), 1, num_rows, k_BGSD.shape[2])
        and not torch.is_grad_enabled()
    )


def attend(
    q_BHND: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_B1NS: Tensor, scaling: float
) -> Tensor:
    """Compute softmax(q k^T scaling + mask) v as [B, N, H, D], in float32, in q's dtype.

    A mask at its dtype's minimum hides a key. Inference only; for tensors that `supports` allows.
    """
    batch, heads, num_rows, width = q_BHND.shape
    dense = [
        part if part.stride(-1) == 1 else part.contiguous() for part in (q_BHND, k_BGSD, v_BGSD)
    ]
    mask_BNS = mask_B1NS[:, 0].float().contiguous()
    y_BNHD = torch.empty(batch, num_rows, heads, width, dtype=q_BHND.dtype)
    q, k, v = (part.data_ptr() for part in dense)
    given = _Attention(
        q=q,
        k=k,
        v=v,
        mask=mask_BNS.data_ptr(),
        y=y_BNHD.data_ptr(),
        q_strides=_Strides(*dense[0].stride()[:3]),
        k_strides=_Strides(*dense[1].stride()[:3]),
        v_strides=_Strides(*dense[2].stride()[:3]),
        heads=heads,
        key_heads=k_BGSD.shape[1],
        num_rows=num_rows,
        num_keys=k_BGSD.shape[2],
        width=width,
        scaling=scaling,
        hidden=torch.finfo(mask_B1NS.dtype).min,
        type=_TYPES[q_BHND.dtype],
    )
    _load()(ctypes.byref(given), batch, threads.count())
    return y_BNHD


def twin(
    q_BHND: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, mask_B1NS: Tensor, scaling: float
) -> Tensor:
    """Compute the same in torch: the specification of `attend`, except for rounding."""
    groups = q_BHND.shape[1] // k_BGSD.shape[1]
    k, v = (part.float().repeat_interleave(groups, 1) for part in (k_BGSD, v_BGSD))
    scores = q_BHND.float() @ k.transpose(2, 3) * scaling + mask_B1NS.float()
    return (scores.softmax(-1) @ v).transpose(1, 2).to(q_BHND.dtype)


@functools.cache
def _load() -> Any:
    """Load the function of the library."""
    library = build.load_library()
    assert not isinstance(library, str), "attention is chosen where there is a library"
    run = library.functions.spectool_attention
    run.argtypes, run.restype = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int], None
    return run
