"""Targets with an encoder: it reads a source once, and the decoder's cross-attention looks at it.

The decoder keeps its own tokens and verifies trees as in `attention.py`. Two things differ. The
decoder's first pass computes keys and values of the source, which stay with its row. And a decoder
takes no positions: it counts columns, which is wrong for trees and for rows of unequal length. So
during a pass relative biases (T5) or learned embeddings (BART) are those of the nodes' positions.
Suffixes: B batch, N nodes, S columns of the cache or tokens of a source, H heads, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from spectool.decode.cache import TreeCache
from spectool.decode.target.attention import AttentionTarget
from spectool.errors import CheckpointError
from spectool.families import family
from spectool.kernels.registry import use_kernels


class SourceCache(TreeCache):
    """Keys and values of the decoder's tokens, and those of each row's source.

    `states_BSD` are the encoder's, of the sources padded at the right; `reads_BS` says where a
    source has a token.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._own_cache = self.model_cache
        self.set_sources(torch.zeros(0, 0, 0), torch.zeros(0, 0))

    def set_sources(self, states_BSD: Tensor, reads_BS: Tensor) -> None:
        """Take the sources of all rows; the next pass computes their keys and values."""
        self.states_BSD, self.reads_BS = states_BSD, reads_BS
        kind: Any = DynamicLayer
        self._source_layers: list[Any] = [kind() for _ in self.stores]
        sources = Cache(layers=list(self._source_layers))
        self.model_cache = EncoderDecoderCache(self._own_cache, sources)

    def keep_shared(self, row: int, tokens: Sequence[int]) -> int:
        """Keep nothing: a text with another source is another text from its first token on."""
        self.truncate(row, 0)
        return 0

    @torch.inference_mode()
    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows."""
        super().select(rows)
        self.states_BSD, self.reads_BS = self.states_BSD[list(rows)], self.reads_BS[list(rows)]
        for layer in self._source_layers:
            layer.keys, layer.values = layer.keys[list(rows)], layer.values[list(rows)]

    @torch.inference_mode()
    def join(self, other: Self) -> None:
        """Append the rows of another cache; shorter sources are padded."""
        super().join(other)
        width = max(self.reads_BS.shape[1], other.reads_BS.shape[1])
        self.states_BSD = _join_padded(self.states_BSD, other.states_BSD, width, before=1)
        self.reads_BS = _join_padded(self.reads_BS, other.reads_BS, width, before=0)
        for mine, theirs in zip(self._source_layers, other._source_layers, strict=True):
            mine.keys = _join_padded(mine.keys, theirs.keys, width, before=1)
            mine.values = _join_padded(mine.values, theirs.values, width, before=1)


class EncoderDecoderTarget(AttentionTarget):
    """An encoder-decoder. A request's prompt is its source; `context` bounds each of the two texts.

    Raises:
        UnsupportedError: an architecture whose positions are not known.
        CheckpointError: nothing says what the decoder starts from.
        UsageError: a context longer than the model's.
    """

    seq2seq = True

    def __init__(
        self, model: PreTrainedModel, *, context: int | None = None, kv: str = "dense"
    ) -> None:
        super().__init__(model, context=context, kv=kv)
        # T5 names the decoder's layers apart from the encoder's, which may be others.
        self.num_layers = getattr(model.config, "num_decoder_layers", self.num_layers)
        self.start_ids = _list_start_ids(model)
        self._encoder: Any = model.get_encoder()
        modules = list(self.decoder.modules())
        self._biased = [part for part in modules if hasattr(part, "relative_attention_bias")]
        is_table = family(model.config).decoder_positions == "table"
        self._table: Any = self.decoder.embed_positions if is_table else None

    def cache(self, batch: int, context: int | None = None) -> SourceCache:
        return SourceCache(
            batch=batch,
            num_layers=self.num_layers,
            context=context or self.context,
            make_store=self._make_store,
        )

    @torch.inference_mode()
    def begin(self, cache: TreeCache, sources: Sequence[Sequence[int]]) -> None:
        assert isinstance(cache, SourceCache)
        width = max(map(len, sources))
        ids = [[*source, *[0] * (width - len(source))] for source in sources]
        reads = [[1] * len(source) + [0] * (width - len(source)) for source in sources]
        reads_BS = torch.tensor(reads, device=self.device)
        with use_kernels(), self.limit_torch(reads_BS.numel()):
            states_BSD = self._encoder(
                input_ids=torch.tensor(ids, device=self.device), attention_mask=reads_BS
            )[0]
        cache.set_sources(states_BSD, reads_BS)

    def _call(
        self,
        cache: TreeCache,
        ids_BN: Tensor,
        masks: Tensor | dict[str, Tensor],
        positions_BN: Tensor,
        options: dict[str, Any],
    ) -> Any:
        assert isinstance(cache, SourceCache)
        keys_BS = cache.positions_BS[:, : cache.width].to(self.device)
        with self._use_positions(positions_BN, keys_BS):
            return self.model(
                decoder_input_ids=ids_BN,
                decoder_attention_mask=masks,
                encoder_outputs=BaseModelOutput(last_hidden_state=cache.states_BSD),
                attention_mask=cache.reads_BS,
                use_cache=True,
                **options,
            )

    @contextmanager
    def _use_positions(self, positions_BN: Tensor, keys_BS: Tensor) -> Iterator[None]:
        """During one pass, let queries and keys stand at these positions."""
        with ExitStack() as stack:
            for part in self._biased:
                part.compute_bias = functools.partial(_compute_bias, part, positions_BN, keys_BS)
                stack.callback(delattr, part, "compute_bias")
            if self._table is not None:
                hook = functools.partial(_look_up_positions, positions_BN)
                stack.enter_context(self._table.register_forward_hook(hook))
            yield


def _list_start_ids(model: PreTrainedModel) -> list[int]:
    """Return what transformers' `generate` lets the decoder begin with, forced tokens included."""
    config: Any = model.generation_config
    start = getattr(config, "decoder_start_token_id", None)
    start = getattr(model.config, "decoder_start_token_id", None) if start is None else start
    start = config.bos_token_id if start is None else start
    found = [start, *([] if (forced := config.forced_bos_token_id) is None else [forced])]
    if not all(type(each) is int for each in found):
        raise CheckpointError(
            f"{model.config._name_or_path}: decoder_start_token_id is {start!r} and "
            f"forced_bos_token_id {config.forced_bos_token_id!r}, expected ids"
        )
    return found


def _compute_bias(
    attention: Any, positions_BN: Tensor, keys_BS: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Return the biases [B, H, N, S] of queries and keys at these positions, as T5 buckets them."""
    buckets_BNS = attention._relative_position_bucket(
        keys_BS[:, None] - positions_BN[..., None],
        bidirectional=False,
        num_buckets=attention.relative_attention_num_buckets,
        max_distance=attention.relative_attention_max_distance,
    )
    biases_BHNS: Tensor = attention.relative_attention_bias(buckets_BNS).permute(0, 3, 1, 2)
    return biases_BHNS


def _look_up_positions(positions_BN: Tensor, table: Any, inputs: Any, output: Any) -> Tensor:
    """Return the learned embeddings of these positions in place of a table's own output."""
    return nn.functional.embedding(positions_BN + table.offset, table.weight)


def _join_padded(mine: Tensor, theirs: Tensor, width: int, *, before: int) -> Tensor:
    """Append rows after padding the tokens of sources to `width`; `before` dimensions follow."""
    parts = []
    for part in (mine, theirs):
        missing = width - part.shape[part.ndim - 1 - before]
        parts.append(F.pad(part, [0, 0] * before + [0, missing]))
    return torch.cat(parts)
