"""What holds for any store, shown with one that rounds so much that an exact tail is noticed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from spectool.decode.drafters.draft_model import DraftModelDrafter
from spectool.decode.generate import Runner
from spectool.decode.kv.base import Columns, KVStore
from spectool.decode.kv.dense import DenseStore

from ..test_distribution import LENGTH, PROMPT, SAMPLES, VOCAB, agrees, sample, toy

Probs = dict[tuple[int, ...], float]


class Signs(KVStore):
    """Keep the sign of each number, and the mean size of a token's numbers."""

    def encode(self, keys_BHND: Tensor, values_BHND: Tensor) -> Sequence[Tensor]:
        found = []
        for states in (keys_BHND, values_BHND):
            found += [states.sign().to(torch.int8), states.abs().mean(-1, keepdim=True)]
        return found

    def decode(self, fields: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        keys, key_sizes, values, value_sizes = fields
        return keys * key_sizes, values * value_sizes


class ExactTail(Signs):
    """A fault: a pass sees its own tokens as the model computed them."""

    def write_tail(self, keys_BHND: Tensor, values_BHND: Tensor, columns: Columns) -> None:
        super().write_tail(keys_BHND, values_BHND, columns)
        self.fresh, self.starts = (keys_BHND, values_BHND), columns.starts

    def view(self, width: int) -> tuple[Tensor, Tensor]:
        keys_BHSD, values_BHSD = super().view(width)
        for seen, exact in zip((keys_BHSD, values_BHSD), self.fresh, strict=True):
            for row, start in enumerate(self.starts):
                seen[row, :, start : start + exact.shape[2]] = exact[row]
        return keys_BHSD, values_BHSD


def open_with(store: Callable[[], KVStore]) -> Runner:
    runner = Runner(toy(0))
    runner.target._make_store = store
    drafter = DraftModelDrafter(toy(1), DraftModelDrafter.Config(depth=2), target=runner.target)
    runner.use(drafter)
    return runner


def exact_probs(store: Callable[[], KVStore]) -> Probs:
    """Return the probability of each text from passes of one token each."""
    target = open_with(store).target
    texts = list(itertools.product(range(VOCAB), repeat=LENGTH))
    cache, probs_B = target.cache(len(texts)), torch.ones(len(texts), dtype=torch.float64)
    for token in PROMPT:
        logits_BV = target.prefill(cache, [[token]] * len(texts)).logits_BV
    for at in range(LENGTH):
        chosen_B1 = torch.tensor([[text[at]] for text in texts])
        probs_B *= logits_BV.double().softmax(-1).gather(1, chosen_B1)[:, 0]
        logits_BV = target.prefill(cache, chosen_B1.tolist()).logits_BV
    return dict(zip(texts, probs_B.tolist(), strict=True))


def test_sampled_texts_follow_the_distribution_of_their_store() -> None:
    """Drafted and verified by rejection; with another store, or an exact tail, they do not."""
    probs = exact_probs(Signs)
    for store, follows in ((Signs, True), (DenseStore, False), (ExactTail, False)):
        counts = sample(open_with(store), SAMPLES // 4, temperature=1.0)
        assert agrees(counts, probs) == follows
