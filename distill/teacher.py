"""Training passes of the target: features of whole texts, and extra rows beside them.

Suffixes: B texts, L tokens of a text, N rows of a pass, S keys, A anchors of a text, X extra rows
of an anchor, D hidden width.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from spectool.decode import tree
from spectool.decode.cache import cache_argument
from spectool.decode.protocol import Inject, Needs
from spectool.decode.target.attention import AttentionTarget
from spectool.decode.target.masks import isolate_texts


class TextLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values of whole texts; states of later passes are seen but not kept."""

    is_sliding = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Store the keys and values of the texts."""
        self.keys, self.values = key_states, value_states
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Return the stored keys and values followed by these; store the first ones."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            return key_states, value_states
        assert self.keys is not None and self.values is not None
        keys = torch.cat([self.keys, key_states], 2)
        return keys, torch.cat([self.values, value_states], 2)

    def get_seq_length(self) -> int:
        """Return the length of the texts."""
        return 0 if self.keys is None else self.keys.shape[2]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of columns of a mask, and its offset."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: the length is not limited here."""
        return -1


class TextCache(Cache):
    """Keys and values of whole texts, for extra rows that pass later.

    Nothing is written in place, so gradients can flow through later passes.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[TextLayer() for _ in range(num_layers)])  # type: ignore

    @property
    def length(self) -> int:
        """Return the length of the texts."""
        return self.get_seq_length()


@torch.no_grad()
def read_features(
    target: AttentionTarget,
    tokens_BL: Tensor,
    needs: Needs,
    segments_BL: Tensor | None = None,
    *,
    keep: TextCache | None = None,
) -> dict[str, Tensor]:
    """Return features [B, L, D] of whole texts, for training; `keep` takes keys and values.

    Rows are padded at the right, where causal attention does not look. With sequence packing,
    `segments_BL` numbers the texts of a row, and each is read as if it stood alone. Not
    inference mode: autograd cannot save inference tensors.
    """
    options: dict[str, Any] = {}
    if keep is not None:
        options[_decoder_cache_name(target)] = keep
    if segments_BL is not None:
        positions_BL, visible_BLL = isolate_texts(segments_BL.to(target.device))
        lengths = [0] * len(positions_BL)
        options["attention_mask"] = target.masks(lengths, positions_BL, visible_BLL)
        options["position_ids"] = positions_BL
    with target.capture_features(needs) as features:
        target.decoder(
            input_ids=tokens_BL.to(target.device),
            use_cache=keep is not None,
            **options,
        )
    return features


def check_features(target: AttentionTarget, needs: Needs) -> None:
    """Raise UnsupportedError if the features asked for are not [B, N, D]."""
    read_features(target, torch.zeros(1, 2, dtype=torch.long), needs)


def read_extra_rows(
    target: AttentionTarget,
    kept: TextCache,
    anchors_BA: Tensor,
    rows: Sequence[tuple[int, int]],
    inject: Mapping[int, Inject],
) -> Tensor:
    """Return states [B, A, X, D] after the final norm of extra rows of texts, for training.

    At each of a text's A anchors there are X `rows`, each a parent and a slot as in
    `Draft.extra_rows`, where node 0 is the text's token at the anchor. They see the text up to it
    and their own parents, and are differentiable. `inject` gets anchors as the owners.
    """
    (batch, num_anchors), num_extra = anchors_BA.shape, len(rows)
    parents, depths = [0], [0]
    for parent, _ in rows:
        parents.append(parent)
        depths.append(depths[parent] + 1)
    sees_XX = tree.ancestor_mask(torch.tensor([parents]), max(depths))[0, 1:, 1:]
    # Chains of different positions do not see each other.
    sees_NN = torch.eye(num_anchors).kron(sees_XX.float()).bool().to(target.device)
    anchors_BN = anchors_BA.repeat_interleave(num_extra, 1).to(target.device)
    depths_N = torch.tensor(depths[1:] * num_anchors, device=target.device)
    positions_BN = (anchors_BN + depths_N).clamp_(max=target.context - 1)
    text_BNL = torch.arange(kept.length, device=target.device) <= anchors_BN[..., None]
    sees_BNS = torch.cat([text_BNL, sees_NN.expand(batch, -1, -1)], -1)
    masks = {}
    for kind, window in target.windows.items():
        near_BNS = sees_BNS
        if window is not None:
            key_L = torch.arange(kept.length, device=target.device).expand(batch, -1)
            key_BS = torch.cat([key_L, positions_BN], 1)
            near_BNS = sees_BNS & (positions_BN[..., None] - key_BS[:, None] < window)
        hidden = torch.finfo(target.dtype).min
        mask_BNS = torch.zeros(near_BNS.shape, dtype=target.dtype, device=target.device)
        masks[kind] = mask_BNS.masked_fill_(~near_BNS, hidden)[:, None]
    slots_BN = torch.tensor([slot for _, slot in rows] * num_anchors, device=target.device)
    with (
        target.capture_features(Needs(final=True)) as features,
        target.inject_states(inject, (slots_BN.expand(batch, -1), anchors_BN)),
    ):
        target.decoder(
            input_ids=torch.zeros_like(anchors_BN),
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            position_ids=positions_BN,
            use_cache=True,
            **{_decoder_cache_name(target): kept},
        )
    return features["final"].view(batch, num_anchors, num_extra, -1)


def _decoder_cache_name(target: AttentionTarget) -> str:
    """Return the name of the decoder's cache argument; by default the model's."""
    accepted = inspect.signature(target.decoder.forward).parameters
    return cache_argument(accepted) or target.cache_name
