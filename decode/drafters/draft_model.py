"""A smaller checkpoint with the same tokenizer proposes a chain.

Leviathan et al. 2023, Chen et al. 2023. At temperature 0 the chain is the draft's own greedy text;
above it each token is drawn from the draft's warped law q, and the q it was really drawn from goes
along. Suffixes: B rows, V target vocabulary, N nodes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from spectool import options
from spectool.decode import tree
from spectool.decode.protocol import Needs, Outcome, Prompt
from spectool.decode.row import Row
from spectool.decode.sampling import Control, pick, sound, unsound
from spectool.decode.target import Target
from spectool.decode.tree import Draft, Kind
from spectool.errors import UnsupportedError
from spectool.options import option

# Heads of one family are padded to different multiples; without tokenizers to compare, a larger
# difference than this means another vocabulary (the bound that llama.cpp uses).
_PADDING = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftModelConfig(options.Config):
    """Options of a draft checkpoint."""

    depth: int = option(4, "tokens proposed per step", minimum=1, maximum=64)


class DraftModelDrafter:
    """Keeps a cache of its own, which follows the committed tokens row by row.

    Raises:
        UnsupportedError: the draft's vocabulary is not the target's.
    """

    name = "draft_model"
    Config = DraftModelConfig
    needs = Needs()
    branches = False

    def __init__(
        self,
        model: PreTrainedModel,
        config: DraftModelConfig | None = None,
        *,
        target: Target,
        tokenizer: PreTrainedTokenizerBase | None = None,
        target_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.config = config or DraftModelConfig()
        self._draft = Target(model)
        self._vocab_size = target.vocab_size
        _compare(self._draft, target, tokenizer, target_tokenizer)
        self._device = target.device
        self._order: list[int] = []
        self._cache = self._draft.cache(0)

    def kinds(self, control: Control) -> tuple[Kind, ...]:
        return ("deterministic",) if control.greedy else ("sampled",)

    def begin(self, prompts: Sequence[Prompt]) -> None:
        self._order = [prompt.row.index for prompt in prompts]
        self._cache = self._draft.cache(len(prompts))

    @torch.inference_mode()
    def propose(self, rows: Sequence[Row], budget: Sequence[int]) -> list[Draft]:
        """Feed what was committed since, then draft."""
        self._drop_finished(rows)
        wanted = [
            self._depth(row, held, limit)
            for row, held, limit in zip(rows, self._cache.lengths, budget, strict=True)
        ]
        proposed: list[list[int]] = [[] for _ in rows]
        laws: list[list[Tensor]] = [[] for _ in rows]
        for step in range(max(wanted)):
            # The first feed brings the new root, and the last proposal if all were accepted.
            pending = [
                row.tokens[held:] + new[-1:] if step < depth else []
                for row, new, held, depth in zip(
                    rows, proposed, self._cache.lengths, wanted, strict=True
                )
            ]
            logits_BV = self._draft.ingest(self._cache, pending).logits_BV
            laws_BV, tokens = self._draw(rows, step, logits_BV)
            for b, token in enumerate(tokens):
                if step < wanted[b]:
                    proposed[b].append(token)
                    laws[b].append(laws_BV[b])
        return [
            self._chain(row, [row.tokens[-1], *new], law)
            for row, new, law in zip(rows, proposed, laws, strict=True)
        ]

    def observe(self, outcomes: Sequence[Outcome]) -> None:
        """Forget rejected proposals; the new root is not in the cache, nor the last proposal."""
        for b, outcome in enumerate(outcomes):
            self._cache.truncate(b, len(outcome.row.tokens) - 1)

    def _drop_finished(self, rows: Sequence[Row]) -> None:
        order = [row.index for row in rows]
        if order != self._order:
            self._cache.select([self._order.index(index) for index in order])
            self._order = order

    def _depth(self, row: Row, held: int, limit: int) -> int:
        """Proposals that the draft can make: its context and its vocabulary may be smaller."""
        if any(token >= self._draft.vocab_size for token in row.tokens[held:]):
            return 0
        return max(0, min(self.config.depth, limit, self._draft.context - len(row.tokens)))

    def _draw(self, rows: Sequence[Row], step: int, logits_BV: Tensor) -> tuple[Tensor, list[int]]:
        """Proposal number `step` of every row and the law that it was drawn from.

        Raises:
            SpectoolError: the draft's logits are NaN or infinite.
        """
        # Ids that the target does not have cannot be drawn; those the draft lacks have q = 0.
        logits_BV = logits_BV[:, : self._vocab_size]
        laws_BV = rows[0].control.laws(logits_BV[:, None])[:, 0]
        if rows[0].control.greedy:
            tokens_B = laws_BV.argmax(-1)
        else:
            numbers = [row.draws.uniform(len(row.tokens) + step, "draft") for row in rows]
            uniform_B = torch.tensor(numbers, dtype=torch.float64, device=laws_BV.device)
            tokens_B = pick(laws_BV, uniform_B)
        *tokens, is_sound = torch.cat([tokens_B, sound(logits_BV).long()[None]]).tolist()
        if not is_sound:
            raise unsound("the draft model")
        missing = self._vocab_size - laws_BV.shape[1]
        return torch.nn.functional.pad(laws_BV, (0, missing)), tokens

    def _chain(self, row: Row, tokens: list[int], laws: list[Tensor]) -> Draft:
        if row.control.greedy:
            return tree.chain(tokens, kind="deterministic")
        if not laws:
            return tree.root(tokens[0])
        return tree.chain(tokens, kind="sampled", laws_NV=torch.stack(laws).to(self._device))


def _compare(
    draft: Target,
    target: Target,
    tokenizer: PreTrainedTokenizerBase | None,
    target_tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Ids must mean the same in both models; sizes of the heads may differ by padding."""
    if tokenizer is None or target_tokenizer is None:
        if abs(draft.vocab_size - target.vocab_size) > _PADDING:
            raise UnsupportedError(
                f"the draft model has {draft.vocab_size} tokens, the target {target.vocab_size}: "
                "a draft model must share the target's tokenizer"
            )
        return
    own, wanted = tokenizer.get_vocab(), target_tokenizer.get_vocab()
    if own != wanted:
        differing = sorted(t for t in own.keys() | wanted.keys() if own.get(t) != wanted.get(t))
        token = differing[0]
        raise UnsupportedError(
            f"the draft model's tokenizer is not the target's: {len(differing)} tokens differ, "
            f"{token!r} has id {own.get(token)} there and {wanted.get(token)} here"
        )
