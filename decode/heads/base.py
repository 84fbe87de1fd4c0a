"""Base classes of trained drafters: draft heads, their loss, and the drafter of a static tree.

At position t the target has read x_t. Draft head k (from 0) guesses x_{t+2+k}: the token that
follows the target's own next token and k drafted ones. Methods differ in how they compute the state
that lm_head turns into logits (`Heads.states` in training, `TreeDrafter._level` in drafting), and
in whether they are trained on the text's tokens or on the target's probabilities.

Shapes: B texts of a batch, L tokens of a text, R positions in texts, D width, V tokens that can be
guessed, K heads, N nodes of a tree, P nodes of one depth, A nodes of a path, G guesses of one head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectool import options
from spectool.decode import tree
from spectool.decode.cache import BatchCache
from spectool.decode.heads.layer import DraftCache, NewText
from spectool.decode.protocol import Drafter, Needs, Outcome, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.target.base import top_ids
from spectool.decode.tree import Draft, RankTree
from spectool.errors import UnsupportedError
from spectool.kernels.registry import use_kernels
from spectool.model.kernels import attach_kernels
from spectool.model.packed import PackedLinear
from spectool.model.shell import final_logits
from spectool.options import option
from spectool.training import LossSpec, OptimizerDefaults, TrainingBatch

# Best guesses of one head that a tree may hold, and nodes of the best tree that are stored.
TOP = 10
MAX_TREE_NODES = 64

# The nodes of a tree, best first: the rank of each guess from the root down, and the share of texts
# that follow them.
Paths = Sequence[tuple[tuple[int, ...], float]]


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


class Heads(nn.Module, ABC):
    """Base of all draft heads. `token_map` [V]: the target's ids of the tokens that they guess.

    A method names how it is trained by `loss` and `optimizer_defaults`.
    """

    optimizer_defaults: ClassVar[OptimizerDefaults] = OptimizerDefaults()
    loss: LossSpec = LossSpec()
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
    def draft_vocab_size(cls, config: Any, vocab_size: int) -> int:
        """Return the size of the heads' vocabulary for this config; 0: the target's."""
        size: int = config.draft_vocab
        return size

    def choose(self, batch_R: Tensor, position_R: Tensor) -> tuple[Tensor, Tensor]:
        """Select the positions to train at in one step; by default all that have a label."""
        return batch_R, position_R

    @abstractmethod
    def states(self, batch: TrainingBatch, batch_R: Tensor, position_R: Tensor) -> Iterator[Tensor]:
        """Yield, head by head, the states [R, D] at these positions that lm_head reads.

        Head k may read x_{t+1} ... x_{t+1+k} of the text, as if it had drafted them.
        """

    def own_lm_head(self, k: int) -> nn.Linear | None:
        """Return head k's own lm_head; by default None, as it shares the target's."""
        return None

    def new_lm_head(self, *, bias: bool, inputs: int = 1) -> nn.Linear:
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
        if (lm_head := self.own_lm_head(k)) is not None:
            return lm_head.weight, lm_head.bias
        self.frozen.to(self.dtype)
        return self.frozen.weight_VD, self.frozen.bias_V

    def embed(self, tokens: Tensor) -> Tensor:
        """Return the target's input embeddings [..., D] of tokens."""
        return self.frozen.embed(tokens).to(self.dtype)

    def logits(self, state: Tensor, k: int) -> Tensor:
        """Return head k's logits [..., V] from states that its lm_head reads."""
        lm_head = self.own_lm_head(k)
        return F.linear(state, *self.output(k)) if lm_head is None else lm_head(state)

    def ids(self, index: Tensor) -> Tensor:
        """Return the target's ids of tokens of the heads' vocabulary."""
        return index if self.token_map is None else self.token_map[index]

    def guess(self, state: Tensor, k: int, count: int) -> Tensor:
        """Return the target's ids [..., G] of head k's `count` best guesses."""
        return self.ids(top_ids(self.logits(state, k), count))

    def expected(self, paths: Paths, nodes: int) -> float:
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


class HeadsDrafter(Drafter):
    """A drafter that drafts from one state per request, computed from the committed tokens.

    `draft_cache` holds what layers of the heads keep of these tokens.
    """

    def __init__(self, heads: Heads, draft_cache: DraftCache | None = None) -> None:
        self.needs = heads.needs
        self._heads = heads.eval()
        self._draft_cache = draft_cache
        self._states: dict[Request, Tensor] = {}
        attach_kernels(heads, heads.dtype)

    @torch.inference_mode()
    def add(self, prompts: Sequence[PrefilledPrompt], cache: BatchCache) -> None:
        if self._draft_cache is not None:
            self._draft_cache.take_over(prompts)
        self._read_all([NewText.of_prompt(prompt) for prompt in prompts])

    def remove(self, request: Request) -> None:
        self._states.pop(request, None)
        if self._draft_cache is not None:
            self._draft_cache.remove(request)

    @torch.inference_mode()
    def observe(self, outcomes: Sequence[Outcome]) -> None:
        self._read_all([NewText.of_outcome(outcome) for outcome in outcomes])

    def _read_all(self, new: Sequence[NewText]) -> None:
        with use_kernels():
            self._states.update(zip([t.request for t in new], self._read(new), strict=True))

    @abstractmethod
    def _read(self, new: Sequence[NewText]) -> list[Tensor]:
        """Read newly committed tokens; return each request's state [D] to draft from."""


class TreeDrafter(HeadsDrafter):
    """Drafter of the static tree that was best on held-out text.

    Each level is one call of its head, for all its nodes and all requests at once.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        """Options of heads that draft a static tree."""

        nodes: int = option(32, "most proposed tokens in a tree", minimum=1, maximum=MAX_TREE_NODES)
        depth: int = option(16, "most proposed tokens on a path", minimum=1, maximum=16)

    def __init__(
        self,
        heads: Heads,
        paths: Paths,
        config: Config | None = None,
        draft_cache: DraftCache | None = None,
    ) -> None:
        """Build the tree of the best `paths`: any prefix of them is a tree."""
        super().__init__(heads, draft_cache)
        self.config = config or self.Config()
        depth = min(self.config.depth, heads.num_heads)
        kept = [path for path, _ in paths if len(path) <= depth][: self.config.nodes]
        self._tree = RankTree(kept, device=heads.frozen.weight_VD.device)

    @torch.inference_mode()
    def propose(self, requests: Sequence[Request], budget: Sequence[int]) -> list[Draft]:
        deepest = min(max(budget), len(self._tree.levels))
        if deepest == 0:
            return [tree.root(request.tokens[-1]) for request in requests]
        state_BD = torch.stack([self._states[request] for request in requests])
        tokens_BN = torch.zeros(
            len(requests), len(self._tree.depths), dtype=torch.long, device=state_BD.device
        )
        tokens_BN[:, 0] = torch.tensor([request.tokens[-1] for request in requests])
        with use_kernels():
            for k, level in enumerate(self._tree.levels[:deepest]):
                states = self._level(requests, state_BD, tokens_BN, k)
                guesses = self._heads.guess(states, k, TOP)
                guesses_BPG = guesses.expand(-1, len(level.paths_PA), -1)
                tokens_BN[:, level.nodes_C] = guesses_BPG[:, level.parent_C, level.rank_C]
        return [
            self._tree.draft(tokens, most)
            for tokens, most in zip(tokens_BN.tolist(), budget, strict=True)
        ]

    @abstractmethod
    def _level(
        self, requests: Sequence[Request], state_BD: Tensor, tokens_BN: Tensor, k: int
    ) -> Tensor:
        """Compute the states [B, P or 1, D] from which head k guesses the children of depth k.

        The second dimension is 1 where the paths make no difference. Called level by level;
        `tokens_BN` are filled in down to depth k.
        """

    def _read(self, new: Sequence[NewText]) -> list[Tensor]:
        return [text.features["final"][-1].clone() for text in new]


def _freeze(model: PreTrainedModel, token_map: Tensor | None) -> Frozen:
    output: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    embedding: Any = model.get_input_embeddings()
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
        embed=lambda tokens: embedding(tokens).detach(),
        output=output,
        logits=final_logits(model.config),
    )
