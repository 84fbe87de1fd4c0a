"""Losses of draft heads, and the ranks of held-out tokens among their guesses.

The loss is the sum over heads k of decay^k times the mean over positions of the terms that the
heads' `LossSpec` names. Head k at position t is trained on x_{t+2+k}.

Shapes: B texts of a batch, L tokens of a text, R positions in texts, S the positions of these that
count for one head, D width, V tokens that can be guessed, K heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from spectool.decode.heads.base import Heads
from spectool.decode.sampling import is_finite
from spectool.errors import NotFinite
from spectool.training import TrainingBatch

# The rank of a token that is not in the head's vocabulary.
NEVER = 1 << 30

# Largest size of one chunk of logits.
_CHUNK_BYTES = 1 << 25
# Largest size of the target's probabilities of one step that are kept for all heads.
_PROBS_BYTES = 1 << 28

# (text [S], token index u [S], slice of S) -> the target's probabilities [slice, V] of x_u.
ProbsOf = Callable[[Tensor, Tensor, slice], Tensor]


@dataclass(slots=True)
class HeadLoss:
    """Sums by head of losses, right guesses and positions; they add up over batches and ranks."""

    num_heads: int
    loss: list[float] = field(init=False)
    right: list[int] = field(init=False)
    counts: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.loss = [0.0] * self.num_heads
        self.right = [0] * self.num_heads
        self.counts = [0] * self.num_heads

    @property
    def means(self) -> list[float]:
        return [loss / max(1, n) for loss, n in zip(self.loss, self.counts, strict=True)]


def compute_loss(
    heads: Heads,
    batch: TrainingBatch,
    total: Callable[[list[int]], list[int]] = lambda counts: counts,
) -> HeadLoss:
    """Add a batch's gradients to the parameters; return loss and accuracy sums by head.

    The loss of a head is the mean over its positions in the whole step. Where this batch is only a
    part of the step, `total` turns its counts by head into those of the step; it is called exactly
    once per batch, so that it may be a collective operation.
    """
    heads.train()
    spec, done = heads.loss, HeadLoss(heads.num_heads)
    labels_BL = heads.labels(batch.tokens_BL)
    loss_mask_BL = _make_loss_mask(heads, batch, labels_BL)
    positions_BL = _mask_positions(loss_mask_BL, heads.num_heads)
    batch_R, position_R = heads.choose(*positions_BL.nonzero(as_tuple=True))
    masks = _head_masks(heads.num_heads, loss_mask_BL, batch.segments_BL, batch_R, position_R)
    probs_of = _target_probs(heads, batch, loss_mask_BL) if spec.target != "labels" else None
    done.counts = [int(mask_R.sum()) for mask_R in masks]
    counts = total(done.counts)
    outs: list[Tensor] = []
    grads: list[Tensor] = []
    with torch.enable_grad():
        states = list(heads.states(batch, batch_R, position_R))
    for k, out_RD in enumerate(states):
        mask_R = masks[k]
        at_S, ahead_S = batch_R[mask_R], position_R[mask_R] + 2 + k
        grad_SD, done.loss[k], done.right[k] = _losses(
            heads,
            out_RD.detach()[mask_R],
            k,
            labels_BL[at_S, ahead_S],
            None if probs_of is None else functools.partial(probs_of, at_S, ahead_S),
            batch.features["final"][at_S, ahead_S - 1] if spec.state_weight else None,
            # decay^k times the mean over the step's positions of this head.
            spec.decay**k / max(1, counts[k]),
        )
        # The loss ends at these states: one backward pass below carries all heads' gradients
        # through what the heads share.
        grad_RD = torch.zeros_like(out_RD)
        grad_RD[mask_R] = grad_SD
        outs.append(out_RD)
        grads.append(grad_RD)
    torch.autograd.backward(outs, grads)
    return done


@torch.no_grad()
def rank_labels(heads: Heads, batch: TrainingBatch) -> Tensor:
    """Return the ranks [R, K] of the text's tokens among each head's guesses.

    R are the positions whose next K + 1 tokens all count for the loss. Head k reads the text's own
    tokens, so its ranks hold on condition that all earlier drafts were right.
    """
    assert batch.segments_BL is None, "measured on texts that stand alone"
    heads.eval()
    loss_mask_BL = batch.loss_mask_BL
    # At position t the heads draft x_{t+2} ... x_{t+1+K} after the target's own x_{t+1}.
    positions_BL = loss_mask_BL[:, 1 : max(1, loss_mask_BL.shape[1] - heads.num_heads)].clone()
    for ahead in range(2, heads.num_heads + 2):
        positions_BL &= loss_mask_BL[:, ahead : ahead + positions_BL.shape[1]]
    batch_R, position_R = positions_BL.nonzero(as_tuple=True)
    labels_BL = heads.labels(batch.tokens_BL)
    columns = [
        ranks_of(state_RD, *heads.output(k), labels_BL[batch_R, position_R + 2 + k])
        for k, state_RD in enumerate(heads.states(batch, batch_R, position_R))
    ]
    return torch.stack(columns, 1)


def ranks_of(out_RD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, labels_R: Tensor) -> Tensor:
    """Return the ranks [R] of the labels by logit, 0 for the best; NEVER for a label of -1.

    Raises:
        NotFinite: logits that are NaN or infinite.
    """
    ranks = []
    for part in _split_rows(len(labels_R), len(weight_VD)):
        logits = F.linear(out_RD[part], weight_VD, bias_V)
        labels = labels_R[part]
        if not is_finite(logits):
            raise NotFinite(
                "the heads' logits are NaN or infinite on held-out text: training diverged",
                hint="a lower --learning-rate",
            )
        label_logits = logits.gather(1, labels.clamp(min=0)[:, None])
        rank = (logits > label_logits).sum(-1)
        ranks.append(torch.where(labels >= 0, rank, NEVER))
    return torch.cat(ranks) if ranks else labels_R.new_zeros(0)


def top_tokens(tokens: Sequence[int], *, count: int, vocab: int) -> Tensor:
    """Return the `count` most frequent ids in ascending order; ties go to the lower id."""
    counts_V = torch.bincount(torch.tensor(tokens), minlength=vocab)
    order = torch.sort(counts_V, descending=True, stable=True).indices
    return order[:count].sort().values


def _make_loss_mask(heads: Heads, batch: TrainingBatch, labels_BL: Tensor) -> Tensor:
    """Mark the tokens [B, L] whose prediction has a usable target."""
    loss_mask_BL = batch.loss_mask_BL
    if heads.loss.target != "probs":
        loss_mask_BL = loss_mask_BL & (labels_BL >= 0)
    if heads.loss.target == "labels" or heads.token_map is None:
        return loss_mask_BL
    # Without its best token, what remains of the target's distribution is mostly noise.
    final_BLD = batch.features["final"]
    best_BL = final_BLD.new_zeros(final_BLD.shape[:2], dtype=torch.long)
    output = heads.frozen.output
    for b, final_LD in enumerate(final_BLD):
        for part in _split_rows(len(final_LD), output.out_features):
            best_BL[b, part] = output(final_LD[part]).argmax(-1)
    known_BL = heads.labels(best_BL) >= 0
    return loss_mask_BL & F.pad(known_BL[:, :-1], (1, 0))


def _mask_positions(loss_mask_BL: Tensor, num_heads: int) -> Tensor:
    """Mark the positions [B, L] where at least one head has a token to be trained on."""
    found_BL = torch.zeros_like(loss_mask_BL)
    for ahead in range(2, 2 + num_heads):
        found_BL[:, : max(0, loss_mask_BL.shape[1] - ahead)] |= loss_mask_BL[:, ahead:]
    return found_BL


def _head_masks(
    num_heads: int,
    loss_mask_BL: Tensor,
    segments_BL: Tensor | None,
    batch_R: Tensor,
    position_R: Tensor,
) -> list[Tensor]:
    """Return, for each head, which of the positions [R] count for its loss."""
    length = loss_mask_BL.shape[1]
    masks = []
    for k in range(num_heads):
        ahead_R = position_R + 2 + k
        mask_R, ahead_R = ahead_R < length, ahead_R.clamp(max=length - 1)
        mask_R &= loss_mask_BL[batch_R, ahead_R]
        if segments_BL is not None:
            mask_R &= segments_BL[batch_R, ahead_R] == segments_BL[batch_R, position_R]
        masks.append(mask_R)
    return masks


def _target_probs(heads: Heads, batch: TrainingBatch, loss_mask_BL: Tensor) -> ProbsOf:
    """Return a function that gives the target's probabilities of tokens x_u in the loss.

    They are the softmax over the heads' vocabulary of the target's logits at u - 1, computed once
    for all heads if they fit into `_PROBS_BYTES`, else at every call.
    """
    final_BLD = batch.features["final"]
    before_BL = F.pad(loss_mask_BL[:, 1:], (0, 1))
    final_RD = final_BLD[before_BL]
    vocab = len(heads.frozen.weight_VD)
    if len(final_RD) * vocab * 4 > _PROBS_BYTES:
        return lambda at_S, u_S, part: compute_probs(heads, final_BLD[at_S[part], u_S[part] - 1])
    made = [compute_probs(heads, final_RD[part]) for part in _split_rows(len(final_RD), vocab)]
    probs_RV = torch.cat(made) if made else final_RD.new_zeros(0, vocab)
    index_BL = before_BL.flatten().cumsum(0).view_as(before_BL) - 1
    return lambda at_S, u_S, part: probs_RV[index_BL[at_S[part], u_S[part] - 1]]


@torch.no_grad()
def compute_probs(heads: Heads, final_RD: Tensor) -> Tensor:
    """Return the target's probabilities [R, V] after these states, over what can be guessed."""
    frozen = heads.frozen
    frozen.to(heads.dtype)
    products = F.linear(final_RD.to(heads.dtype), frozen.weight_VD, frozen.bias_V)
    return frozen.logits(products).softmax(-1)


def _losses(
    heads: Heads,
    out_SD: Tensor,
    k: int,
    labels_S: Tensor,
    probs_of: Callable[[slice], Tensor] | None,
    teacher_SD: Tensor | None,
    scale: float,
) -> tuple[Tensor, float, int]:
    """Return d(scale * loss)/d(out_SD), the summed loss, and the number of right guesses.

    Gradients of head k's own lm_head are accumulated in place.
    """
    weight_VD, bias_V = heads.output(k)
    leaf_SD = out_SD.detach().requires_grad_()
    total, right = 0.0, 0
    # In chunks: the logits of all positions at once would be the largest tensor of training.
    for part in _split_rows(len(labels_S), len(weight_VD)):
        with torch.enable_grad():
            logits = F.linear(leaf_SD[part], weight_VD, bias_V).float()
            if heads.own_lm_head(k) is None:
                logits = heads.frozen.logits(logits)
            loss = logits.new_zeros(())
            if heads.loss.target != "probs":
                loss = loss + F.cross_entropy(logits, labels_S[part], reduction="sum")
            if probs_of is not None:
                probs_loss = F.cross_entropy(logits, probs_of(part), reduction="sum")
                loss = loss + heads.loss.probs_weight * probs_loss
            if teacher_SD is not None:
                distance = F.smooth_l1_loss(
                    leaf_SD[part].float(), teacher_SD[part].float(), reduction="none"
                )
                loss = loss + heads.loss.state_weight * distance.mean(-1).sum()
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
        right += int((logits.detach().argmax(-1) == labels_S[part]).sum())
    grad_SD = leaf_SD.grad if leaf_SD.grad is not None else torch.zeros_like(out_SD)
    return grad_SD, total, right


def _split_rows(num_rows: int, vocab: int) -> Iterator[slice]:
    """Yield slices of `num_rows` rows whose fp32 logits fit into `_CHUNK_BYTES`."""
    size = max(1, _CHUNK_BYTES // (4 * vocab))
    for start in range(0, num_rows, size):
        yield slice(start, start + size)
