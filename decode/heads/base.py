"""Base classes of trained drafters: draft heads, their loss, and the drafter of a static tree.

At position t the target has read x_t. Draft head k (from 0) guesses x_{t+2+k}: the token that
follows the target's own next token and k drafted ones. Methods differ in how they compute the state
that lm_head turns into logits (`Heads.states`, `Heads.step`), and in whether they are trained on
the text's tokens or on the target's probabilities.

Shapes: B texts of a batch, L tokens of a text, R positions in texts, S the positions of these that
count for one head, D width, V tokens that can be guessed, K heads, N nodes of a tree, P nodes of
one depth, A nodes of a path, G guesses of one head.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectool import options
from spectool.decode import tree
from spectool.decode.cache import TreeCache
from spectool.decode.protocol import (
    Drafter,
    Features,
    Needs,
    Outcome,
    PrefilledPrompt,
    TrainingBatch,
)
from spectool.decode.request import Request
from spectool.decode.sampling import SamplingParams, is_finite
from spectool.decode.tree import Draft, Kind, RankTree
from spectool.errors import NotFinite, UnsupportedError
from spectool.kernels.registry import in_force
from spectool.model.blocks import final_logits
from spectool.model.kernels import give_kernels
from spectool.model.packed import PackedLinear
from spectool.options import option

# Best guesses of one head that a tree may hold, and nodes of the best tree that are stored.
TOP = 10
MOST_NODES = 64
# The rank of a token that is not in the head's vocabulary.
NEVER = 1 << 30

# Largest size of one chunk of logits.
_CHUNK_BYTES = 1 << 25
# Largest size of the target's probabilities of one step that are kept for all heads.
_PROBS_BYTES = 1 << 28

# (text [S], token index u [S], slice of S) -> the target's probabilities [slice, V] of x_u.
ProbsOf = Callable[[Tensor, Tensor, slice], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerDefaults:
    """AdamW settings of a method; the learning rate decays from `rate` to `final` times `rate`."""

    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    final: float = 0.0


@dataclass(slots=True)
class Frozen:
    """Frozen weights of the target that heads read; not in the heads' state dict.

    `weight_VD`, `bias_V`: the target's lm_head, only the rows of tokens that can be guessed.
    `embed`: tokens [...] to their input embeddings [..., D]. `output`: the whole lm_head.
    `logits`: from lm_head's products to the target's logits (some families scale or cap them).
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    embed: Callable[[Tensor], Tensor]
    output: nn.Linear | PackedLinear
    logits: Callable[[Tensor], Tensor]

    def vectors(self, tokens: Tensor) -> Tensor:
        """Return lm_head's rows [..., D] of the given tokens."""
        if isinstance(self.output, PackedLinear):
            used_N, index = torch.unique(tokens, return_inverse=True)
            return self.output.rows(used_N)[index]
        return F.embedding(tokens, self.output.weight.detach())

    def to(self, dtype: torch.dtype) -> None:
        """Cast the guessed rows of lm_head for good: a cast at every use would be slow."""
        if self.weight_VD.dtype != dtype:
            self.weight_VD = self.weight_VD.to(dtype)
            self.bias_V = None if self.bias_V is None else self.bias_V.to(dtype)


class Heads(nn.Module):
    """Base of all draft heads. `token_map` [V]: the target's ids of the tokens that they guess.

    A method implements `states`, `step` and `own_output`. The loss is the sum over heads k of
    decay^k times the mean over positions of: cross entropy against the text's `labels`, the
    target's `probs` (times `probs_weight`) or both, plus `state_weight` times the smooth L1
    distance (mean over D) from the target's final state at the token before.
    """

    optimizer_defaults: ClassVar[OptimizerDefaults] = OptimizerDefaults()
    loss_target: Literal["labels", "probs", "both"] = "labels"
    decay: float = 1.0
    probs_weight: float = 1.0
    state_weight: float = 0.0
    # Rows that hold several texts (sequence packing) give the same loss as these texts alone.
    supports_packing: ClassVar[bool] = False
    # Initial weights are copied from the target's layers, so these must be loaded.
    begins_as_layers: ClassVar[bool] = False
    needs: Needs
    num_heads: int
    token_map: Tensor | None

    def __init__(self, config: Any, model: PreTrainedModel, token_map: Tensor | None) -> None:
        """Make untrained heads for a target.

        Raises:
            UnsupportedError: the target's lm_head is neither a linear layer nor a packed one.
        """
        super().__init__()
        self.config = config
        self.register_buffer("token_map", token_map)
        self.frozen = _freeze(model, token_map)

    @classmethod
    def num_guessed(cls, config: Any, vocab_size: int) -> int:
        """Return the size of the heads' vocabulary for this config; 0: the target's."""
        size: int = config.draft_vocab
        return size

    def choose(self, batch_R: Tensor, position_R: Tensor) -> tuple[Tensor, Tensor]:
        """Select the positions to train at in one step; by default all that have a label."""
        return batch_R, position_R

    def states(self, batch: TrainingBatch, batch_R: Tensor, position_R: Tensor) -> Iterator[Tensor]:
        """Yield, head by head, the states [R, D] at these positions that lm_head reads.

        Head k may read x_{t+1} ... x_{t+1+k} of the text, as if it had drafted them.
        """
        raise NotImplementedError

    def step(self, state_BD: Tensor, path_BPA: Tensor, k: int) -> Tensor:
        """Compute the states [B, P or 1, D] that head k guesses from while drafting.

        Each path of `path_BPA` is the root x_{t+1} and k drafted tokens below it. The second
        dimension is 1 where the path makes no difference.
        """
        raise NotImplementedError

    def own_output(self, k: int) -> nn.Linear | None:
        """Return head k's own lm_head; None where it shares the target's."""
        raise NotImplementedError

    def fresh_output(self, *, bias: bool, inputs: int = 1) -> nn.Linear:
        """Make an lm_head that starts as a copy of the target's (a missing bias as zero).

        With several `inputs` it reads that many concatenated states and starts by adding them up.
        """
        vocab, width = self.frozen.weight_VD.shape
        # On the meta device, since random initial weights would be thrown away.
        lm_head = nn.Linear(inputs * width, vocab, bias=bias, device="meta")
        lm_head.weight = nn.Parameter(self.frozen.weight_VD.repeat(1, inputs))
        if bias:
            bias_V = self.frozen.bias_V
            zeros_V = self.frozen.weight_VD.new_zeros(vocab)
            lm_head.bias = nn.Parameter(zeros_V if bias_V is None else bias_V.clone())
        return lm_head

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def output(self, k: int) -> tuple[Tensor, Tensor | None]:
        """Return the weight [V, D] and bias of head k's lm_head, its own or the target's."""
        if (lm_head := self.own_output(k)) is not None:
            return lm_head.weight, lm_head.bias
        self.frozen.to(self.dtype)
        return self.frozen.weight_VD, self.frozen.bias_V

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the target's input embeddings [..., D] of tokens."""
        return self.frozen.embed(tokens).to(self.dtype)

    def guess(self, state: Tensor, k: int, count: int) -> Tensor:
        """Return the target's ids [..., G] of head k's `count` best guesses."""
        lm_head = self.own_output(k)
        logits = F.linear(state, *self.output(k)) if lm_head is None else lm_head(state)
        index = logits.topk(min(count, logits.shape[-1])).indices
        return index if self.token_map is None else self.token_map[index]

    def compute_loss(
        self, batch: TrainingBatch, total: Callable[[list[int]], list[int]] = lambda counts: counts
    ) -> HeadLoss:
        """Add a batch's gradients to the parameters; return loss and accuracy sums by head.

        The loss of a head is the mean over its positions in the whole step. Where this batch is
        only a part of the step, `total` turns its counts by head into those of the step; it is
        called exactly once per batch, so that it may be a collective operation.
        """
        self.train()
        done = HeadLoss(self.num_heads)
        labels_BL = self.labels(batch.tokens_BL)
        loss_mask_BL = self._loss_mask(batch, labels_BL)
        positions_BL = _mask_positions(loss_mask_BL, self.num_heads)
        batch_R, position_R = self.choose(*positions_BL.nonzero(as_tuple=True))
        masks = self._head_masks(loss_mask_BL, batch.segments_BL, batch_R, position_R)
        probs_of = self._target_probs(batch, loss_mask_BL) if self.loss_target != "labels" else None
        counts = total([int(mask_R.sum()) for mask_R in masks])
        outs: list[Tensor] = []
        grads: list[Tensor] = []
        with torch.enable_grad():
            states = list(self.states(batch, batch_R, position_R))
        for k, out_RD in enumerate(states):
            mask_R = masks[k]
            at_S, ahead_S = batch_R[mask_R], position_R[mask_R] + 2 + k
            out_SD = out_RD.detach()[mask_R]
            # decay^k times the mean over the step's positions of this head.
            scale = self.decay**k / max(1, counts[k])
            grad_SD, loss, right = self._losses(
                out_SD,
                k,
                labels_BL[at_S, ahead_S],
                None if probs_of is None else functools.partial(probs_of, at_S, ahead_S),
                batch.features["final"][at_S, ahead_S - 1] if self.state_weight else None,
                scale,
            )
            # The loss ends at these states: one backward pass below carries all heads' gradients
            # through what the heads share.
            grad_RD = torch.zeros_like(out_RD)
            grad_RD[mask_R] = grad_SD
            outs.append(out_RD)
            grads.append(grad_RD)
            done.add(k, loss, right, len(at_S))
        torch.autograd.backward(outs, grads)
        return done

    @torch.no_grad()
    def ranks(self, batch: TrainingBatch) -> Tensor:
        """Return the ranks [R, K] of the text's tokens among each head's guesses.

        R are the positions whose next K + 1 tokens all count for the loss. Head k reads the text's
        own tokens, so its ranks hold on condition that all earlier drafts were right.
        """
        assert batch.segments_BL is None, "measured on texts that stand alone"
        self.eval()
        loss_mask_BL = batch.loss_mask_BL
        # At position t the heads draft x_{t+2} ... x_{t+1+K} after the target's own x_{t+1}.
        positions_BL = loss_mask_BL[:, 1 : max(1, loss_mask_BL.shape[1] - self.num_heads)].clone()
        for ahead in range(2, self.num_heads + 2):
            positions_BL &= loss_mask_BL[:, ahead : ahead + positions_BL.shape[1]]
        batch_R, position_R = positions_BL.nonzero(as_tuple=True)
        labels_BL = self.labels(batch.tokens_BL)
        columns = [
            ranks_of(state_RD, *self.output(k), labels_BL[batch_R, position_R + 2 + k])
            for k, state_RD in enumerate(self.states(batch, batch_R, position_R))
        ]
        return torch.stack(columns, 1)

    def expected(self, paths: Sequence[tuple[tuple[int, ...], float]], nodes: int) -> float:
        """Return the expected tokens per forward with a tree of the `nodes` best `paths`.

        Each path comes with the fraction of held-out text that follows it.
        """
        return 1 + sum(share for _, share in paths[:nodes])

    def labels(self, tokens: Tensor) -> Tensor:
        """Return each token's index in the heads' vocabulary; -1 for tokens outside it."""
        if self.token_map is None:
            return tokens
        index = torch.searchsorted(self.token_map, tokens.contiguous()).clamp_(
            max=len(self.token_map) - 1
        )
        return torch.where(self.token_map[index] == tokens, index, -1)

    def _loss_mask(self, batch: TrainingBatch, labels_BL: Tensor) -> Tensor:
        """Mark the tokens [B, L] whose prediction has a usable target."""
        loss_mask_BL = batch.loss_mask_BL
        if self.loss_target != "probs":
            loss_mask_BL = loss_mask_BL & (labels_BL >= 0)
        if self.loss_target == "labels" or self.token_map is None:
            return loss_mask_BL
        # Without its best token, what remains of the target's distribution is mostly noise.
        final_BLD = batch.features["final"]
        best_BL = final_BLD.new_zeros(final_BLD.shape[:2], dtype=torch.long)
        output = self.frozen.output
        for b, final_LD in enumerate(final_BLD):
            for part in _split_rows(len(final_LD), output.out_features):
                best_BL[b, part] = output(final_LD[part]).argmax(-1)
        known_BL = self.labels(best_BL) >= 0
        return loss_mask_BL & F.pad(known_BL[:, :-1], (1, 0))

    def _head_masks(
        self, loss_mask_BL: Tensor, segments_BL: Tensor | None, batch_R: Tensor, position_R: Tensor
    ) -> list[Tensor]:
        """Return, for each head, which of the positions [R] count for its loss."""
        length = loss_mask_BL.shape[1]
        masks = []
        for k in range(self.num_heads):
            ahead_R = position_R + 2 + k
            mask_R, ahead_R = ahead_R < length, ahead_R.clamp(max=length - 1)
            mask_R &= loss_mask_BL[batch_R, ahead_R]
            if segments_BL is not None:
                mask_R &= segments_BL[batch_R, ahead_R] == segments_BL[batch_R, position_R]
            masks.append(mask_R)
        return masks

    def _target_probs(self, batch: TrainingBatch, loss_mask_BL: Tensor) -> ProbsOf:
        """Return a function that gives the target's probabilities of tokens x_u in the loss.

        They are the softmax over the heads' vocabulary of the target's logits at u - 1, computed
        once for all heads if they fit into `_PROBS_BYTES`, else at every call.
        """
        final_BLD = batch.features["final"]
        before_BL = F.pad(loss_mask_BL[:, 1:], (0, 1))
        final_RD = final_BLD[before_BL]
        vocab = len(self.frozen.weight_VD)
        if len(final_RD) * vocab * 4 > _PROBS_BYTES:
            return lambda at_S, u_S, part: self._probs(final_BLD[at_S[part], u_S[part] - 1])
        made = [self._probs(final_RD[part]) for part in _split_rows(len(final_RD), vocab)]
        probs_RV = torch.cat(made) if made else final_RD.new_zeros(0, vocab)
        index_BL = before_BL.flatten().cumsum(0).view_as(before_BL) - 1
        return lambda at_S, u_S, part: probs_RV[index_BL[at_S[part], u_S[part] - 1]]

    def _losses(
        self,
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
        weight_VD, bias_V = self.output(k)
        leaf_SD = out_SD.detach().requires_grad_()
        total, right = 0.0, 0
        # In chunks: the logits of all positions at once would be the largest tensor of training.
        for part in _split_rows(len(labels_S), len(weight_VD)):
            with torch.enable_grad():
                logits = F.linear(leaf_SD[part], weight_VD, bias_V).float()
                if self.own_output(k) is None:
                    logits = self.frozen.logits(logits)
                loss = logits.new_zeros(())
                if self.loss_target != "probs":
                    loss = loss + F.cross_entropy(logits, labels_S[part], reduction="sum")
                if probs_of is not None:
                    probs_loss = F.cross_entropy(logits, probs_of(part), reduction="sum")
                    loss = loss + self.probs_weight * probs_loss
                if teacher_SD is not None:
                    distance = F.smooth_l1_loss(
                        leaf_SD[part].float(), teacher_SD[part].float(), reduction="none"
                    )
                    loss = loss + self.state_weight * distance.mean(-1).sum()
            (loss * scale).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            right += int((logits.detach().argmax(-1) == labels_S[part]).sum())
        grad_SD = leaf_SD.grad if leaf_SD.grad is not None else torch.zeros_like(out_SD)
        return grad_SD, total, right

    @torch.no_grad()
    def _probs(self, final_RD: Tensor) -> Tensor:
        """Return the target's probabilities [R, V] after these states, over what can be guessed."""
        self.frozen.to(self.dtype)
        products = F.linear(final_RD.to(self.dtype), self.frozen.weight_VD, self.frozen.bias_V)
        return self.frozen.logits(products).softmax(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeConfig(options.Config):
    """Options of heads that draft a static tree."""

    nodes: int = option(32, "most proposed tokens in a tree", minimum=1, maximum=MOST_NODES)
    depth: int = option(16, "most proposed tokens on a path", minimum=1, maximum=16)


class TreeDrafter(Drafter):
    """Drafter of the static tree that was best on held-out text.

    Each level is one call of its head, for all its nodes and all requests at once.
    """

    Config = TreeConfig

    def __init__(
        self,
        heads: Heads,
        paths: Sequence[tuple[Sequence[int], float]],
        config: TreeConfig | None = None,
    ) -> None:
        """Build the tree from its nodes: `paths` of ranks, each with the share that follows it.

        Paths come best first, so that any prefix of them is a tree.
        """
        self.config = config or TreeConfig()
        self.needs = heads.needs
        self._heads = heads.eval()
        depth = min(self.config.depth, heads.num_heads)
        kept = [path for path, _ in paths if len(path) <= depth][: self.config.nodes]
        self._tree = RankTree(kept, device=heads.frozen.weight_VD.device)
        self._states: dict[int, Tensor] = {}
        give_kernels(heads, heads.dtype)

    def kinds(self, control: SamplingParams) -> tuple[Kind, ...]:
        return ("deterministic",)

    @torch.inference_mode()
    def begin(self, prompts: Sequence[PrefilledPrompt], cache: TreeCache) -> None:
        self._states.clear()
        with in_force():
            self._read([prompt.row.index for prompt in prompts], *gather_prompts(prompts))

    @torch.inference_mode()
    def propose(self, rows: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        deepest = min(max(budget), len(self._tree.levels))
        if deepest == 0:
            return [tree.root(request.tokens[-1]) for request in rows]
        state_BD = torch.stack([self._states[request.index] for request in rows])
        tokens_BN = torch.zeros(
            len(rows), len(self._tree.depths), dtype=torch.long, device=state_BD.device
        )
        tokens_BN[:, 0] = torch.tensor([request.tokens[-1] for request in rows])
        with in_force():
            for k, level in enumerate(self._tree.levels[:deepest]):
                states = self._level(rows, state_BD, tokens_BN, k)
                guesses = self._heads.guess(states, k, TOP)
                guesses_BPG = guesses.expand(-1, len(level.paths_PA), -1)
                tokens_BN[:, level.nodes_C] = guesses_BPG[:, level.parent_C, level.rank_C]
        return [
            self._tree.draft(tokens, most)
            for tokens, most in zip(tokens_BN.tolist(), budget, strict=True)
        ]

    def _level(
        self, requests: Sequence[Request], state_BD: Tensor, tokens_BN: Tensor, k: int
    ) -> Tensor:
        """Compute the states [B, P or 1, D] from which the children of depth k are guessed.

        Called level by level; `tokens_BN` are filled in down to depth k.
        """
        return self._heads.step(state_BD, tokens_BN[:, self._tree.levels[k].paths_PA], k)

    @torch.inference_mode()
    def observe(self, outcomes: Sequence[Outcome]) -> None:
        with in_force():
            self._read([outcome.row.index for outcome in outcomes], *gather_outcomes(outcomes))

    def _read(
        self, indices: Sequence[int], tokens: Sequence[Sequence[int]], features: Sequence[Features]
    ) -> None:
        """Read newly committed tokens; keep the state to draft from next by request index.

        `features[b]` are those of `tokens[b]` without its last token, the new root, which the
        target has not read yet.
        """
        for index, found in zip(indices, features, strict=True):
            self._states[index] = found["final"][-1].clone()


def gather_prompts(prompts: Sequence[PrefilledPrompt]) -> tuple[list[list[int]], list[Features]]:
    """Return the prompt tokens just read with the token after them, and the former's features."""
    features = [prompt.features for prompt in prompts]
    sizes = [len(next(iter(found.values()))) for found in features]
    tokens = [p.row.tokens[-1 - size :] for p, size in zip(prompts, sizes, strict=True)]
    return tokens, features


def gather_outcomes(outcomes: Sequence[Outcome]) -> tuple[list[list[int]], list[Features]]:
    """Return the tokens a step committed with the new root, and the former's features."""
    tokens = [
        [*(outcome.draft.tokens[node] for node in outcome.path), outcome.next_token]
        for outcome in outcomes
    ]
    features: list[Features] = [
        {name: found_ND[outcome.path] for name, found_ND in outcome.features.items()}
        for outcome in outcomes
    ]
    return tokens, features


@dataclass(slots=True)
class HeadLoss:
    """Sums by head of losses, right guesses and positions; they add up over batches and ranks."""

    num_heads: int
    loss: list[float] = field(init=False)
    right: list[int] = field(init=False)
    places: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.loss = [0.0] * self.num_heads
        self.right = [0] * self.num_heads
        self.places = [0] * self.num_heads

    def add(self, head: int, loss: float, right: int, places: int) -> None:
        self.loss[head] += loss
        self.right[head] += right
        self.places[head] += places

    @property
    def means(self) -> list[float]:
        return [loss / max(1, n) for loss, n in zip(self.loss, self.places, strict=True)]


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


def frequent(tokens: Sequence[int], *, count: int, vocab: int) -> Tensor:
    """Return the `count` most frequent ids in ascending order; ties go to the lower id."""
    counts_V = torch.bincount(torch.tensor(tokens), minlength=vocab)
    order = torch.sort(counts_V, descending=True, stable=True).indices
    return order[:count].sort().values


def _mask_positions(loss_mask_BL: Tensor, num_heads: int) -> Tensor:
    """Mark the positions [B, L] where at least one head has a token to be trained on."""
    found_BL = torch.zeros_like(loss_mask_BL)
    for ahead in range(2, 2 + num_heads):
        found_BL[:, : max(0, loss_mask_BL.shape[1] - ahead)] |= loss_mask_BL[:, ahead:]
    return found_BL


def _split_rows(num_rows: int, vocab: int) -> Iterator[slice]:
    """Yield slices of `num_rows` rows whose fp32 logits fit into `_CHUNK_BYTES`."""
    size = max(1, _CHUNK_BYTES // (4 * vocab))
    for start in range(0, num_rows, size):
        yield slice(start, start + size)


def _freeze(model: PreTrainedModel, token_map: Tensor | None) -> Frozen:
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(output, (nn.Linear, PackedLinear)):
        raise UnsupportedError(
            f"draft heads need a linear lm_head, this model's is {type(output).__name__}"
        )
    if isinstance(output, PackedLinear):
        # Dequantized once, since heads read it at every step.
        weight_VD = output.dequantize().to(model.dtype)
    else:
        weight_VD = output.weight.detach()
    bias_V = None if output.bias is None else output.bias.detach()
    if token_map is not None:
        weight_VD = weight_VD[token_map]
        bias_V = None if bias_V is None else bias_V[token_map]
    return Frozen(
        weight_VD=weight_VD,
        bias_V=bias_V,
        embed=_make_embed(model),
        output=output,
        logits=final_logits(model.config),
    )


def _make_embed(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    embedding: Any = model.get_input_embeddings()

    def embed(tokens: Tensor) -> Tensor:
        found: Tensor = embedding(tokens)
        return found.detach()

    return embed
