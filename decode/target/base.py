"""The interface of a target, the model whose text is wanted, and what all targets share.

A pass feeds N nodes per row after the committed tokens that a cache holds. Models stay unmodified;
one that cannot be handled through mask, positions and cache is refused by name. Suffixes: B batch,
N nodes, T tokens of a prompt, V vocabulary, D hidden width.
"""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from spectool.checkpoint.tensors import Checkpoint, open_checkpoint
from spectool.decode.cache import BatchCache, cache_argument
from spectool.decode.protocol import Needs
from spectool.decode.request import Request
from spectool.decode.target import rotary
from spectool.decode.tree import Draft
from spectool.errors import UnsupportedError
from spectool.kernels import threads
from spectool.kernels.registry import use_kernels
from spectool.model.decoder import find_decoder
from spectool.model.kernels import attach_kernels, most_kernel_rows

# Prompt tokens per pass: bounds the mask and, under eager attention, the scores.
CHUNK = 512

# Rows of a pass up to which torch's operations between the products take one thread: beyond, norms
# and activation functions gain from several.
FEW_ROWS = 64

CacheT = TypeVar("CacheT", bound=BatchCache)


@dataclass(frozen=True, slots=True)
class Pass:
    """The output of a pass: logits [B, kept nodes, V], and features [B, N, D] by name."""

    logits_BNV: Tensor
    features: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class PrefillOutput:
    """The output of feeding committed tokens: the last logits of each row, and by row the features
    [T, D] and a function that computes the likeliest ids [T][K] after each token.
    """

    logits_BV: Tensor
    features: list[dict[str, Tensor]]
    top: list[Callable[[], list[list[int]]]]


class Target(ABC, Generic[CacheT]):
    """A causal model as decoding sees it. `context` bounds prompt and new tokens together.

    `context_reason` says why the context is shorter than the model's own, if it is. `kv` names the
    store of its keys and values (`decode/kv`); `kv_bytes_per_token` counts all layers and is known
    after the first pass. `notes` lists what had to be changed or bounded to run the model
    correctly. `takes_drafts`: a pass of several tokens is correct after other passes; else
    `why_plain` says why not. `takes_trees`: a pass may hold a tree. `state_in_cache`: the cache
    holds all state of a request, so requests can take turns. `why_lossy` says why plain decoding is
    not the model's own, where it is not. `cache_name` is the cache argument of the model's forward.
    `start_ids`: the tokens that the decoder of an encoder-decoder starts from; without any, a model
    continues its prompt. `forward`: how decoder layers were to run; `num_fused` of them run in C,
    `unfused` counts the others by the reason. `rows_are_independent`: a row's logits depend on no
    other row, because all layers are fused.

    Raises:
        UsageError: a context longer than the model's.
    """

    takes_drafts = True
    takes_trees = True
    why_plain = ""
    state_in_cache = True
    why_lossy = ""
    start_ids: Sequence[int] = ()
    kv = "dense"
    kv_bytes_per_token: int | None = None
    _few_rows = 0
    forward = "auto"
    num_fused = 0
    rows_are_independent = False
    unfused: Mapping[str, int] = {}

    def __init__(self, model: PreTrainedModel, context: int | None) -> None:
        config = model.config.get_text_config(decoder=True)
        accepted = inspect.signature(model.forward).parameters
        self.model: Any = model
        self.decoder: Any = find_decoder(model)
        self.name = config.model_type
        self.notes: list[str] = []
        self.num_layers: int = config.num_hidden_layers
        self.vocab_size: int = config.vocab_size
        self.device = model.device
        self.dtype = model.dtype
        name = cache_argument(accepted)
        assert name is not None, "a forward that takes no cache is refused"
        self.cache_name = name
        self._keeps_logits = "logits_to_keep" in accepted
        self.kernels = attach_kernels(model, self.dtype)
        self._few_rows = min(FEW_ROWS, most_kernel_rows(model))
        self.context = rotary.choose_context(config, context)
        self.context_reason = rotary.explain_context(config)

    @abstractmethod
    def span(self, length: int) -> int:
        """Return the context to open for a text of up to `length` tokens, new ones included."""

    @abstractmethod
    def cache(self, batch: int, context: int | None = None) -> CacheT:
        """Return an empty cache for `batch` rows, with a context as `span` returns it."""

    def begin(self, cache: CacheT, sources: Sequence[Sequence[int]]) -> None:
        """Read the sources of an encoder-decoder, one a row, before the first pass of the rows."""

    @torch.inference_mode()
    def prefill(
        self, cache: CacheT, tokens: Sequence[Sequence[int]], needs: Needs | None = None
    ) -> PrefillOutput:
        """Feed and commit tokens; rows may be empty, and have zeros as logits then."""
        wanted = needs or Needs()
        # The likeliest ids are computed from the final states.
        captured = replace(wanted, final=wanted.final or wanted.top > 0)
        logits_BV, features = self._feed_prompts(cache, tokens, captured)
        top: list[Callable[[], list[list[int]]]] = []
        for by_name in features:
            states_TD = by_name.get("final") if wanted.final else by_name.pop("final", None)
            if states_TD is None or not wanted.top:
                top.append(list)
            else:
                top.append(functools.partial(self._top_after, states_TD, wanted.top))
        return PrefillOutput(logits_BV, features, top)

    @abstractmethod
    def _feed_prompts(
        self, cache: CacheT, tokens: Sequence[Sequence[int]], needs: Needs
    ) -> tuple[Tensor, list[dict[str, Tensor]]]:
        """Feed and commit tokens; return each row's last logits [B, V] and features [T, D]."""

    @abstractmethod
    def verify(self, cache: CacheT, drafts: Sequence[Draft], needs: Needs | None = None) -> Pass:
        """Feed every request's tree without committing. Logits past a row's tree are undefined.

        Raises:
            UnsupportedError: a draft that this target does not take.
        """

    @abstractmethod
    def grow(
        self,
        cache: CacheT,
        tokens: Sequence[Sequence[int]],
        parents: Sequence[Sequence[int]],
        *,
        fed: int = 0,
        seen: Sequence[int] | None = None,
    ) -> Tensor:
        """Feed the nodes of trees from index `fed` on; those before it are in the tail already.

        A node without a parent is its own parent (forests); all rows have as many nodes. Each row
        sees its first `seen` committed tokens, all by default, and its nodes stand right after
        these. Returns the logits [B, N, V] after the nodes fed.

        Raises:
            UnsupportedError: the state cannot go back to before such a pass.
        """

    def observe(self, requests: Sequence[Request], cache: CacheT, logits_BNV: Tensor) -> None:
        """Take the logits that the next tokens are drawn from, as the requests' controls left them.

        Called once after each pass that tokens are drawn from. Targets of one model ignore them.
        """

    @functools.cached_property
    def checkpoint(self) -> Checkpoint | None:
        """Return the checkpoint that the model was loaded from, or None."""
        path = Path(self.model.config._name_or_path or "")
        return open_checkpoint(path) if (path / "config.json").is_file() else None

    def limit_torch(self, num_rows: int = 1) -> AbstractContextManager[None]:
        """Leave torch one thread where kernels compute the large products of so many rows."""
        return threads.give_torch(several=num_rows > self._few_rows)

    @property
    def num_tokens(self) -> int:
        """Return the number of rows of the embedding: ids are below it."""
        rows: int = self.model.get_input_embeddings().weight.shape[0]
        return rows

    @property
    def width(self) -> int:
        """Return the size of the state that the lm_head reads."""
        width: int = self.model.get_output_embeddings().in_features
        return width

    def layers(self) -> nn.ModuleList:
        """Return the decoder layers; raise UnsupportedError if the model has no list of them."""
        for module in self.decoder.modules():
            if isinstance(module, nn.ModuleList) and len(module) == self.num_layers:
                return module
        raise UnsupportedError(f"{self.name}: found no list of {self.num_layers} decoder layers")

    @contextmanager
    def capture_features(self, needs: Needs) -> Iterator[dict[str, Tensor]]:
        """Capture the features asked for during one pass, by forward hooks."""
        features: dict[str, Tensor] = {}
        layers = self.layers() if needs.layers else nn.ModuleList()
        sources = {f"layer {index}": layers[index] for index in needs.layers}
        if needs.final:
            sources["final"] = self.decoder
        with ExitStack() as hooks:
            for name, module in sources.items():
                hook = module.register_forward_hook(_capture_hook(features, name))
                hooks.enter_context(hook)
            yield features

    @torch.inference_mode()
    def _top_after(self, states_TD: Tensor, count: int) -> list[list[int]]:
        """Return the `count` likeliest ids [T][K] after states at the input of the lm_head.

        Scaled or soft-capped logits are in the order of the products, which suffices here.
        """
        lm_head = self.model.get_output_embeddings()
        found: list[list[int]] = []
        with use_kernels():
            for part_TD in torch.split(states_TD, CHUNK):
                found += top_ids(lm_head(part_TD), count).tolist()
        return found


def top_ids(logits_BNV: Tensor, count: int) -> Tensor:
    """Return the ids of the `count` largest logits in descending order, or of all if fewer."""
    return logits_BNV.topk(min(count, logits_BNV.shape[-1])).indices


def _capture_hook(features: dict[str, Tensor], name: str) -> Any:
    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        # A layer returns a tensor or a tuple, a decoder a ModelOutput; the state comes first.
        state = output if isinstance(output, Tensor) else output[0]
        if state.ndim != 3:
            # Gemma 3n returns several states, stacked.
            raise UnsupportedError(
                f"{type(module).__name__}: its hidden states have more dimensions than batch, "
                "length and width; heads that read them cannot be run",
                hint="medusa and hydra heads read the last layer's alone",
            )
        features[name] = state

    return hook
