"""What all trained drafters share: how heads read a target, learn, and fill a tree of guesses.

A head k sits at place t of a text, where the target has read x_t, and guesses x_{t+2+k}: the token
after the target's own next one and k drafted ones. Methods differ in what the state is made of
that the head's output matrix reads (`Heads.states`, `Heads.step`), and in whether they learn the
text's tokens or the target's laws of them.

Shapes: B rows of a batch, L tokens of each, R places in texts, D width, V tokens that can be
guessed, K heads, N nodes of a tree, P nodes of one depth, G guesses of one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
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
from spectool.decode.target import kernel_rows
from spectool.decode.tree import Draft, Kind, RankTree
from spectool.errors import NotFinite, UnsupportedError
from spectool.kernels import skinny
from spectool.model.blocks import final_logits
from spectool.model.packed import PackedLinear
from spectool.options import option

# Guesses of a head that a tree may hold, and nodes that are kept of the best tree.
TOP = 10
MOST_NODES = 64
# The rank of a token that a head cannot guess at all.
NEVER = 1 << 30

# Logits of one chunk take at most about this much.
_CHUNK_BYTES = 1 << 25
# The target's laws of a whole step are kept for all heads if they take no more.
_PROBS_BYTES = 1 << 28

# Texts [S] and tokens u in them [S], and which of these: the laws [., V] of x_u.
SamplingOptions = Callable[[Tensor, Tensor, slice], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerDefaults:
    """How a method is trained unless asked otherwise: AdamW, its peak rate and where that ends."""

    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    final: float = 0.0


@dataclass(slots=True)
class Frozen:
    """What heads read of the target and never change; no part of their own state.

    `weight_VD`, `bias_V`: the rows of the output matrix of what can be guessed. `embed` gives the
    states [..., D] that the target begins with for tokens. `logits` makes of the output matrix's
    products what the target's own logits are (bounded, or scaled, in some families).
    """

    weight_VD: Tensor
    bias_V: Tensor | None
    embed: Callable[[Tensor], Tensor]
    output: nn.Linear | PackedLinear
    logits: Callable[[Tensor], Tensor]

    def vectors(self, tokens: Tensor) -> Tensor:
        """The output matrix's rows [..., D] of any tokens."""
        if isinstance(self.output, PackedLinear):
            used_N, places = torch.unique(tokens, return_inverse=True)
            return self.output.rows(used_N)[places]
        return F.embedding(tokens, self.output.weight.detach())

    def to(self, dtype: torch.dtype) -> None:
        """Once, not at every use: it is the largest matrix there is."""
        if self.weight_VD.dtype != dtype:
            self.weight_VD = self.weight_VD.to(dtype)
            self.bias_V = None if self.bias_V is None else self.bias_V.to(dtype)


class Heads(nn.Module):
    """Base of all heads, for a target. `token_map` [V] holds the target's ids of what they guess.

    A method says what it `needs`, by what it is trained, whether it learns the text's `labels`, the
    target's `probs` or the sum of both, and its `decay`: head k's loss counts decay^k. Laws count
    `probs_weight`; `state_weight` is that of the smooth L1 distance (mean of D) from the target's
    state of such a law. One that `supports_packing` learns from rows of several texts as from these
    alone; one that `begins_as_layers` takes weights of the target's layers, and nobody else reads
    any. It implements `states` and `step`, and `own_output` where a head has a matrix of its own.
    """

    optimizer_defaults: ClassVar[OptimizerDefaults] = OptimizerDefaults()
    loss_target: Literal["labels", "probs", "both"] = "labels"
    decay: float = 1.0
    probs_weight: float = 1.0
    state_weight: float = 0.0
    supports_packing: ClassVar[bool] = False
    begins_as_layers: ClassVar[bool] = False
    needs: Needs
    num_heads: int
    token_map: Tensor | None

    def __init__(self, config: Any, model: PreTrainedModel, token_map: Tensor | None) -> None:
        """
        Raises:
            UnsupportedError: the target's output layer is no matrix that can be read.
        """
        super().__init__()
        self.config = config
        self.register_buffer("token_map", token_map)
        self.frozen = _frozen(model, token_map)

    @classmethod
    def num_guessed(cls, config: Any, vocab_size: int) -> int:
        """How many of so many tokens heads of this kind guess; 0: all."""
        size: int = config.draft_vocab
        return size

    def choose(self, batch_R: Tensor, place_R: Tensor) -> tuple[Tensor, Tensor]:
        """The places to learn at in a step, of those that have something to learn."""
        return batch_R, place_R

    def states(self, batch: TrainingBatch, batch_R: Tensor, place_R: Tensor) -> Iterator[Tensor]:
        """Of each head in turn, the states [R, D] that it guesses from at these places.

        Head k may read x_{t+1} ... x_{t+1+k} of the lesson, as if it had drafted them.
        """
        raise NotImplementedError

    def step(self, state_BD: Tensor, path_BPA: Tensor, k: int) -> Tensor:
        """The states [B, P or 1, D] that head k guesses from, after `state_BD` and these paths.

        A path is the root x_{t+1} and the drafted tokens below it, k + 1 in all.
        """
        raise NotImplementedError

    def own_output(self, k: int) -> nn.Linear | None:
        """The output matrix of head k; None where the target's serves."""
        raise NotImplementedError

    def fresh_output(self, *, bias: bool, inputs: int = 1) -> nn.Linear:
        """An output matrix that begins as the target's own; a bias as the target's, or zero.

        Over `inputs` states side by side, it begins as their sum's.
        """
        vocab, width = self.frozen.weight_VD.shape
        # Made on the meta device: the random numbers of a fresh layer would be thrown away.
        own = nn.Linear(inputs * width, vocab, bias=bias, device="meta")
        own.weight = nn.Parameter(self.frozen.weight_VD.repeat(1, inputs))
        if bias:
            bias_V = self.frozen.bias_V
            zeros_V = self.frozen.weight_VD.new_zeros(vocab)
            own.bias = nn.Parameter(zeros_V if bias_V is None else bias_V.clone())
        return own

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def output(self, k: int) -> tuple[Tensor, Tensor | None]:
        """The output matrix of head k and its bias."""
        if (own := self.own_output(k)) is not None:
            return own.weight, own.bias
        self.frozen.to(self.dtype)
        return self.frozen.weight_VD, self.frozen.bias_V

    def embed(self, tokens: Tensor) -> Tensor:
        """What the target begins with for tokens, [..., D]."""
        return self.frozen.embed(tokens).to(self.dtype)

    def guess(self, state: Tensor, k: int, count: int) -> Tensor:
        """The target's ids of head k's best guesses, [..., G]."""
        own = self.own_output(k)
        logits = F.linear(state, *self.output(k)) if own is None else own(state)
        places = logits.topk(min(count, logits.shape[-1])).indices
        return places if self.token_map is None else self.token_map[places]

    def compute_loss(
        self, batch: TrainingBatch, total: Callable[[list[int]], list[int]] = lambda places: places
    ) -> HeadLoss:
        """Add a lesson's gradients; the sums of each head's losses and right guesses.

        A gradient is that of a mean over the places of a step. `total` makes these, by head, of the
        lesson's, where the lesson is a part of the step. It is called once, by all parts.
        """
        self.train()
        done = HeadLoss(self.num_heads)
        labels_BL = self.labels(batch.tokens_BL)
        loss_mask_BL = self._loss_mask(batch, labels_BL)
        places_BL = _any_ahead(loss_mask_BL, self.num_heads)
        batch_R, place_R = self.choose(*places_BL.nonzero(as_tuple=True))
        counted = self._counted(loss_mask_BL, batch.segments_BL, batch_R, place_R)
        probs_of = self._target_probs(batch, loss_mask_BL) if self.loss_target != "labels" else None
        places = total([int(counts_R.sum()) for counts_R in counted])
        outs: list[Tensor] = []
        slopes: list[Tensor] = []
        with torch.enable_grad():
            states = list(self.states(batch, batch_R, place_R))
        for k, out_RD in enumerate(states):
            counts_R = counted[k]
            at_S, ahead_S = batch_R[counts_R], place_R[counts_R] + 2 + k
            out_SD = out_RD.detach()[counts_R]
            scale = self.decay**k / max(1, places[k])
            slope_SD, loss, right = self._losses(
                out_SD,
                k,
                labels_BL[at_S, ahead_S],
                None if probs_of is None else functools.partial(probs_of, at_S, ahead_S),
                batch.features["final"][at_S, ahead_S - 1] if self.state_weight else None,
                scale,
            )
            slope_RD = torch.zeros_like(out_RD)
            slope_RD[counts_R] = slope_SD
            outs.append(out_RD)
            slopes.append(slope_RD)
            done.add(k, loss, right, len(at_S))
        torch.autograd.backward(outs, slopes)
        return done

    @torch.no_grad()
    def ranks(self, batch: TrainingBatch) -> Tensor:
        """Ranks [R, K] of the true tokens among each head's guesses, where all K are taught.

        Head k is measured after the true tokens, so these are ranks on the condition that what was
        drafted before it was right.
        """
        assert batch.segments_BL is None, "measured on texts that stand alone"
        self.eval()
        loss_mask_BL = batch.loss_mask_BL
        # Place t drafts x_{t+2} ... x_{t+1+K} after the target's own x_{t+1}.
        places_BL = loss_mask_BL[:, 1 : max(1, loss_mask_BL.shape[1] - self.num_heads)].clone()
        for ahead in range(2, self.num_heads + 2):
            places_BL &= loss_mask_BL[:, ahead : ahead + places_BL.shape[1]]
        batch_R, place_R = places_BL.nonzero(as_tuple=True)
        labels_BL = self.labels(batch.tokens_BL)
        columns = [
            ranks_of(state_RD, *self.output(k), labels_BL[batch_R, place_R + 2 + k])
            for k, state_RD in enumerate(self.states(batch, batch_R, place_R))
        ]
        return torch.stack(columns, 1)

    def expected(self, paths: Sequence[tuple[tuple[int, ...], float]], nodes: int) -> float:
        """Tokens a forward by the best `paths` of held-out text, with so many proposed at once."""
        return 1 + sum(share for _, share in paths[:nodes])

    def labels(self, tokens: Tensor) -> Tensor:
        """Places of tokens among those that can be guessed; -1 for the others."""
        if self.token_map is None:
            return tokens
        places = torch.searchsorted(self.token_map, tokens.contiguous()).clamp_(
            max=len(self.token_map) - 1
        )
        return torch.where(self.token_map[places] == tokens, places, -1)

    def _loss_mask(self, batch: TrainingBatch, labels_BL: Tensor) -> Tensor:
        """Which tokens there is something to learn of."""
        loss_mask_BL = batch.loss_mask_BL
        if self.loss_target != "probs":
            loss_mask_BL = loss_mask_BL & (labels_BL >= 0)
        if self.loss_target == "labels" or self.token_map is None:
            return loss_mask_BL
        # Of a law whose best token cannot be guessed, what is left says little.
        final_BLD = batch.features["final"]
        best_BL = final_BLD.new_zeros(final_BLD.shape[:2], dtype=torch.long)
        output = self.frozen.output
        for row, final_LD in enumerate(final_BLD):
            for part in _chunks(len(final_LD), output.out_features):
                best_BL[row, part] = output(final_LD[part]).argmax(-1)
        known_BL = self.labels(best_BL) >= 0
        return loss_mask_BL & F.pad(known_BL[:, :-1], (1, 0))

    def _counted(
        self, loss_mask_BL: Tensor, segments_BL: Tensor | None, batch_R: Tensor, place_R: Tensor
    ) -> list[Tensor]:
        """Of each head, at which of the places [R] there is something to learn for it."""
        length = loss_mask_BL.shape[1]
        found = []
        for k in range(self.num_heads):
            ahead_R = place_R + 2 + k
            counts_R, ahead_R = ahead_R < length, ahead_R.clamp(max=length - 1)
            counts_R &= loss_mask_BL[batch_R, ahead_R]
            if segments_BL is not None:
                counts_R &= segments_BL[batch_R, ahead_R] == segments_BL[batch_R, place_R]
            found.append(counts_R)
        return found

    def _target_probs(self, batch: TrainingBatch, loss_mask_BL: Tensor) -> SamplingOptions:
        """The target's laws of taught tokens x_u, among what can be guessed: what it says at u - 1.

        Made once for all heads where they fit into the memory set aside for that.
        """
        final_BLD = batch.features["final"]
        before_BL = F.pad(loss_mask_BL[:, 1:], (0, 1))
        final_RD = final_BLD[before_BL]
        vocab = len(self.frozen.weight_VD)
        if len(final_RD) * vocab * 4 > _PROBS_BYTES:
            return lambda at_S, u_S, rows: self._probs(final_BLD[at_S[rows], u_S[rows] - 1])
        made = [self._probs(final_RD[rows]) for rows in _chunks(len(final_RD), vocab)]
        probs_RV = torch.cat(made) if made else final_RD.new_zeros(0, vocab)
        places_BL = before_BL.flatten().cumsum(0).view_as(before_BL) - 1
        return lambda at_S, u_S, rows: probs_RV[places_BL[at_S[rows], u_S[rows] - 1]]

    def _losses(
        self,
        out_SD: Tensor,
        k: int,
        labels_S: Tensor,
        probs_of: Callable[[slice], Tensor] | None,
        teacher_SD: Tensor | None,
        scale: float,
    ) -> tuple[Tensor, float, int]:
        """Slope [S, D] of `scale` times the summed losses; that sum; the right guesses.

        Logits exist for a chunk of rows at a time: all of them would outweigh everything else.
        Slopes of the output matrix are added to it where it learns.
        """
        weight_VD, bias_V = self.output(k)
        leaf_SD = out_SD.detach().requires_grad_()
        total, right = 0.0, 0
        for rows in _chunks(len(labels_S), len(weight_VD)):
            with torch.enable_grad():
                logits = F.linear(leaf_SD[rows], weight_VD, bias_V).float()
                if self.own_output(k) is None:
                    logits = self.frozen.logits(logits)
                loss = logits.new_zeros(())
                if self.loss_target != "probs":
                    loss = loss + F.cross_entropy(logits, labels_S[rows], reduction="sum")
                if probs_of is not None:
                    of_probs = F.cross_entropy(logits, probs_of(rows), reduction="sum")
                    loss = loss + self.probs_weight * of_probs
                if teacher_SD is not None:
                    apart = F.smooth_l1_loss(
                        leaf_SD[rows].float(), teacher_SD[rows].float(), reduction="none"
                    )
                    loss = loss + self.state_weight * apart.mean(-1).sum()
            (loss * scale).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
            right += int((logits.detach().argmax(-1) == labels_S[rows]).sum())
        slope_SD = leaf_SD.grad if leaf_SD.grad is not None else torch.zeros_like(out_SD)
        return slope_SD, total, right

    @torch.no_grad()
    def _probs(self, final_RD: Tensor) -> Tensor:
        """The target's law [R, V] after these states, among what can be guessed."""
        self.frozen.to(self.dtype)
        products = F.linear(final_RD.to(self.dtype), self.frozen.weight_VD, self.frozen.bias_V)
        return self.frozen.logits(products).softmax(-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeConfig(options.Config):
    """Options of heads that draft a static tree."""

    nodes: int = option(32, "most proposed tokens in a tree", minimum=1, maximum=MOST_NODES)
    depth: int = option(16, "most proposed tokens in a row", minimum=1, maximum=16)


class TreeDrafter(Drafter):
    """Drafts the static tree that was best on held-out text, level by level.

    A level costs one run of its head, for all its nodes and all rows at once.
    """

    Config = TreeConfig

    def __init__(
        self,
        heads: Heads,
        paths: Sequence[tuple[Sequence[int], float]],
        config: TreeConfig | None = None,
    ) -> None:
        """`paths`: the tree's nodes as ranks, each with the share of texts that follow it.

        They stand best first, so that any beginning is a tree.
        """
        self.config = config or TreeConfig()
        self.needs = heads.needs
        self._heads = heads.eval()
        depth = min(self.config.depth, heads.num_heads)
        kept = [path for path, _ in paths if len(path) <= depth][: self.config.nodes]
        self._tree = RankTree(kept, device=heads.frozen.weight_VD.device)
        self._states: dict[int, Tensor] = {}
        self._linears = skinny.eligible_linears(heads.modules())

    def kinds(self, control: SamplingParams) -> tuple[Kind, ...]:
        return ("deterministic",)

    @torch.inference_mode()
    def begin(self, prompts: Sequence[PrefilledPrompt], cache: TreeCache) -> None:
        self._states.clear()
        with self._kernel():
            self._read([prompt.row.index for prompt in prompts], *read_prompts(prompts))

    @torch.inference_mode()
    def propose(self, rows: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        deepest = min(max(budget), len(self._tree.levels))
        if deepest == 0:
            return [tree.root(row.tokens[-1]) for row in rows]
        state_BD = torch.stack([self._states[row.index] for row in rows])
        tokens_BN = torch.zeros(
            len(rows), len(self._tree.depths), dtype=torch.long, device=state_BD.device
        )
        tokens_BN[:, 0] = torch.tensor([row.tokens[-1] for row in rows])
        with self._kernel():
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
        self, rows: Sequence[Request], state_BD: Tensor, tokens_BN: Tensor, k: int
    ) -> Tensor:
        """The states [B, P or 1, D] that the children of depth k's nodes are guessed from.

        Called for the tree's levels in turn; `tokens_BN` are known down to depth k.
        """
        return self._heads.step(state_BD, tokens_BN[:, self._tree.levels[k].paths_PA], k)

    @torch.inference_mode()
    def observe(self, outcomes: Sequence[Outcome]) -> None:
        with self._kernel():
            self._read([outcome.row.index for outcome in outcomes], *read_outcomes(outcomes))

    def _kernel(self) -> AbstractContextManager[None]:
        """Products of few rows by the kernel, in all that heads compute."""
        return skinny.products(self._linears, kernel_rows(self._heads.dtype))

    def _read(
        self, rows: Sequence[int], tokens: Sequence[Sequence[int]], features: Sequence[Features]
    ) -> None:
        """Keep the states to draft from next, by row, after tokens that were just committed.

        `tokens[b]` end with the new root, whose features there are none of yet.
        """
        for row, found in zip(rows, features, strict=True):
            self._states[row] = found["final"][-1].clone()


def read_prompts(prompts: Sequence[PrefilledPrompt]) -> tuple[list[list[int]], list[Features]]:
    """The tokens that prompts passed anew and the one after, and the features of the former."""
    features = [prompt.features for prompt in prompts]
    sizes = [len(next(iter(found.values()))) for found in features]
    tokens = [p.row.tokens[-1 - size :] for p, size in zip(prompts, sizes, strict=True)]
    return tokens, features


def read_outcomes(outcomes: Sequence[Outcome]) -> tuple[list[list[int]], list[Features]]:
    """The tokens that steps committed and the one after, and the features of the former."""
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
    """Sums by head: losses, right guesses, places. Sums add up exactly over batches and ranks."""

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
    """Ranks [R] of the labels among all guesses, 0 for the best; NEVER for a label of -1.

    Raises:
        NotFinite: logits that are NaN or infinite, of which none is the best.
    """
    ranks = []
    for rows in _chunks(len(labels_R), len(weight_VD)):
        logits = F.linear(out_RD[rows], weight_VD, bias_V)
        labels = labels_R[rows]
        if not is_finite(logits):
            raise NotFinite(
                "the heads' logits are NaN or infinite on held-out text: training diverged",
                hint="a lower --learning-rate",
            )
        own = logits.gather(1, labels.clamp(min=0)[:, None])
        rank = (logits > own).sum(-1)
        ranks.append(torch.where(labels >= 0, rank, NEVER))
    return torch.cat(ranks) if ranks else labels_R.new_zeros(0)


def frequent(tokens: Sequence[int], *, count: int, vocab: int) -> Tensor:
    """The `count` ids that occur most often, ascending; of equals the lower ones."""
    times_V = torch.bincount(torch.tensor(tokens), minlength=vocab)
    order = torch.sort(times_V, descending=True, stable=True).indices
    return order[:count].sort().values


def _any_ahead(loss_mask_BL: Tensor, num_heads: int) -> Tensor:
    """The places [B, L] with something to learn for one of the heads at least."""
    found_BL = torch.zeros_like(loss_mask_BL)
    for ahead in range(2, 2 + num_heads):
        found_BL[:, : max(0, loss_mask_BL.shape[1] - ahead)] |= loss_mask_BL[:, ahead:]
    return found_BL


def _chunks(num_rows: int, vocab: int) -> Iterator[slice]:
    size = max(1, _CHUNK_BYTES // (4 * vocab))
    for start in range(0, num_rows, size):
        yield slice(start, start + size)


def _frozen(model: PreTrainedModel, token_map: Tensor | None) -> Frozen:
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    if not isinstance(output, (nn.Linear, PackedLinear)):
        raise UnsupportedError(f"heads need an output matrix, this model has {type(output)}")
    if isinstance(output, PackedLinear):
        # Heads read it at every step: unpacked once.
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
        embed=_embedding(model),
        output=output,
        logits=final_logits(model.config),
    )


def _embedding(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    embedding: Any = model.get_input_embeddings()

    def embed(tokens: Tensor) -> Tensor:
        found: Tensor = embedding(tokens)
        return found.detach()

    return embed
