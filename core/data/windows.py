"""Windows of a text.

Without a stride, windows do not overlap. Without a BOS token (the common protocol, used by
published tables) each window holds L tokens of the text, of which L - 1 are scored; the text's rest
is dropped. With a BOS token each window starts with it and holds L - 1 tokens of the text, all of
which are scored; the last window may be shorter.

With a stride, each window begins that many tokens after the one before, and of its tokens those are
scored that no earlier window held, so that they are read after more of the text. The first window
is scored as above, and the text's rest is a shorter last window.

Shapes: S windows, B of a batch, L tokens of each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from spectool.errors import TextError, UsageError

# Logits of one batch take at most about this much.
LOGITS_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Batch:
    """Windows of one length: the index of their group, their rows in it, and their ids [B, L].

    `scored`: the number of tokens at the end of each window that are scored.
    """

    group: int
    rows: slice
    ids_BL: Tensor
    scored: int

    @property
    def next_ids(self) -> Tensor:
        """The scored tokens [B * scored], window by window."""
        return self.ids_BL[:, -self.scored :].flatten()


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of a text, in groups of one length and one number of scored tokens, in order.

    `stride`: tokens between the starts of windows that overlap; None: they do not. `protocol`: how
    the text became windows (`evaluate/protocols.py`).
    """

    groups: tuple[Tensor, ...]
    length: int
    bos: int | None
    stride: int | None = None
    protocol: str = "text"

    @property
    def scored(self) -> tuple[int, ...]:
        """The number of tokens scored at the end of a window, for each group.

        All but the first; of a window that overlaps, those that no earlier window held.
        """
        counts = [ids_SL.shape[1] - 1 for ids_SL in self.groups]
        if self.stride is None:
            return tuple(counts)
        # Held before: what a full window has beyond the stride, and a start token.
        held = self.length - self.stride
        return (counts[0], *(1 + count - held for count in counts[1:]))

    @property
    def num_tokens(self) -> int:
        """Count the scored tokens."""
        return sum(len(ids) * count for ids, count in zip(self.groups, self.scored, strict=True))

    def counts(self) -> Tensor:
        """Return the number of scored tokens [S] of each window."""
        groups = zip(self.groups, self.scored, strict=True)
        return torch.cat([torch.full((len(ids_SL),), scored) for ids_SL, scored in groups])

    def positions(self) -> Tensor:
        """Return the place [N] in its window of each scored token; the first token has 0."""
        groups = zip(self.groups, self.scored, strict=True)
        places = ((torch.arange(ids.shape[1])[-scored:], len(ids)) for ids, scored in groups)
        return torch.cat([place_L.repeat(count) for place_L, count in places])

    def tokens(self) -> Tensor:
        """Return the scored tokens [N]."""
        groups = zip(self.groups, self.scored, strict=True)
        return torch.cat([ids_SL[:, -scored:].flatten() for ids_SL, scored in groups])

    def texts(self) -> list[Tensor]:
        """Return the consecutive tokens that the windows were cut of, without start tokens.

        Windows of the protocols `c4` and `documents` are of different documents, each a text of its
        own. Those of `documents` are returned without their last token, which may end the text.
        """
        inside = [ids_SL[:, self.bos is not None :] for ids_SL in self.groups]
        if self.protocol == "c4":
            return [ids_L for ids_SL in inside for ids_L in ids_SL]
        if self.protocol == "documents":
            return [ids_L[:-1] for ids_SL in inside for ids_L in ids_SL]
        if self.stride is not None:
            # Of windows that overlap, what no earlier one held.
            held = zip(self.groups[1:], self.scored[1:], strict=True)
            inside[1:] = [ids_SL[:, -scored:] for ids_SL, scored in held]
        return [torch.cat([ids_SL.flatten() for ids_SL in inside])]

    def digest(self) -> str:
        """Return `sha256:...` of the tokens of all windows."""
        digest = hashlib.sha256()
        for ids_SL in self.groups:
            digest.update(ids_SL.to(torch.int32).contiguous().numpy().tobytes())
        return f"sha256:{digest.hexdigest()}"

    def batches(self, vocabulary: int, *, batch_size: int | None = None) -> Iterator[Batch]:
        """Yield all windows in order, by default in batches with logits of up to LOGITS_BYTES."""
        for group, (ids_SL, scored) in enumerate(zip(self.groups, self.scored, strict=True)):
            size = batch_size or max(1, LOGITS_BYTES // (4 * vocabulary * ids_SL.shape[1]))
            for start in range(0, len(ids_SL), size):
                rows = slice(start, min(start + size, len(ids_SL)))
                yield Batch(group, rows, ids_SL[rows], scored)


def cut(
    ids: list[int],
    *,
    length: int,
    bos: int | None,
    stride: int | None = None,
    protocol: str = "text",
) -> Windows:
    """Cut a text into windows of `length` tokens; `bos` is the BOS token's id, None without one.

    Raises:
        TextError: the text does not fill one window.
        UsageError: the stride is more than the tokens of a window that can be scored.
    """
    inside = length - (bos is not None)
    if len(ids) < inside or inside < 1:
        raise TextError(
            f"the text has {len(ids)} tokens, fewer than one window of {length}",
            hint="give a longer text, or a smaller --window",
        )
    if stride is not None:
        # The first token of a window without a BOS token has nothing before it.
        most = inside - (bos is None)
        if stride > most:
            raise UsageError(f"--stride {stride}: at most {most} tokens of a window can be scored")
        return _overlap(ids, inside, bos, stride)
    whole = len(ids) // inside
    rows_SL = torch.tensor(ids[: whole * inside]).view(whole, inside)
    groups = [_open(rows_SL, bos)]
    if bos is not None and len(ids) % inside:
        groups.append(_open(torch.tensor([ids[whole * inside :]]), bos))
    return Windows(tuple(groups), length, bos, protocol=protocol)


def _overlap(ids: list[int], inside: int, bos: int | None, stride: int) -> Windows:
    """Cut windows of `inside` tokens whose starts are `stride` tokens apart."""
    ids_N = torch.tensor(ids)
    rows_SL = ids_N.unfold(0, inside, stride)
    groups = [rows_SL[:1], rows_SL[1:]]
    start = len(rows_SL) * stride
    if start + inside - stride < len(ids):
        groups.append(ids_N[None, start:])
    found = tuple(_open(part, bos) for part in groups if len(part))
    return Windows(found, inside + (bos is not None), bos, stride)


def _open(rows_SL: Tensor, bos: int | None) -> Tensor:
    """Put the BOS token before each window."""
    if bos is None:
        return rows_SL
    return torch.cat([torch.full((len(rows_SL), 1), bos), rows_SL], 1)
