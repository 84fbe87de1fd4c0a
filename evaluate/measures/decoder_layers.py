"""Decoder layers of a model beside those of the reference, on a sample of the text.

Hidden states pass both models layer by layer, so that models of any size can be compared, and the
layer that does most harm is named. Of each layer, as means over tokens:

- `error`: |f(h) - g(h)| / |f(h) - h|, where f is the reference's layer, g the model's, and h the
  reference's hidden state before it: what this layer adds by itself;
- `hidden_error`, `hidden_cosine`: the distance of the models' hidden states after it, in which the
  errors of the layers before it are, too;
- `attention`: the entropy of a head's weights divided by that of equal weights, its change from the
  reference, and the heads whose mean is below 5% (collapsed) or above 95% (overloaded);
- `gates`: the share of an MLP's units whose input to the activation function has the reference's
  sign, of all units and of those farther from zero than the median.

The last two are inspired by entropy-guided attention (Jha and Reagen, 2025) and by activation
patterns as hash codes (He et al., 2021), of which they are the diagnostics alone. A layer without
attention weights, or with other than one activation function, has none.

Shapes: S windows of the sample, B of a batch, L tokens, D width, H heads, U units of an MLP.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from spectool.evaluate.context import Context, Need
from spectool.evaluate.intervals import Interval, bootstrap
from spectool.evaluate.layer_pairs import Computed, Pair, walk
from spectool.evaluate.measures.base import Measure

_COLLAPSED, _OVERLOADED = 0.05, 0.95
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """Mean entropy of a layer's heads, from 0 to 1, and the heads at either end."""

    entropy: float
    reference_entropy: float
    change: Interval
    collapsed: int
    reference_collapsed: int
    overloaded: int
    reference_overloaded: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Gates:
    """Share of units with the reference's sign: of all, and of those far from zero."""

    agreement: Interval
    clear_agreement: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayer:
    """A decoder layer beside the reference's; the module's description has the definitions."""

    name: str
    error: Interval
    hidden_error: Interval
    hidden_cosine: Interval
    attention: Attention | None = None
    gates: Gates | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayers(Measure):
    """`worst_layer`: the one that adds the largest error by itself."""

    needs: ClassVar[tuple[Need, ...]] = ("windows", "walkers")

    decoder_layers: list[DecoderLayer]
    worst_layer: DecoderLayer

    @classmethod
    def run(cls, context: Context) -> Self:
        assert context.walkers is not None
        layers = [_describe(name, pairs) for name, pairs in walk(*context.walkers, context.windows)]
        return cls(decoder_layers=layers, worst_layer=max(layers, key=_own_error))

    def lines(self) -> Iterator[str]:
        worst = self.worst_layer
        yield f"worst layer: {worst.name} adds an error of {worst.error:.2%}"
        last = self.decoder_layers[-1]
        yield f"hidden states after the last layer: cosine {last.hidden_cosine:.4f}"
        heads = [layer.attention for layer in self.decoder_layers if layer.attention is not None]
        if heads:
            yield (
                f"attention heads collapsed: {sum(each.collapsed for each in heads)} "
                f"({sum(each.reference_collapsed for each in heads)} in the reference), "
                f"overloaded: {sum(each.overloaded for each in heads)} "
                f"({sum(each.reference_overloaded for each in heads)})"
            )
        gates = [(layer.gates, layer.name) for layer in self.decoder_layers if layer.gates]
        if gates:
            least, name = min(gates, key=lambda each: each[0].agreement.value)
            yield f"gates of the reference's sign: at least {least.agreement:.2%} ({name})"


def _own_error(layer: DecoderLayer) -> float:
    # A NaN is the worst there is.
    return math.inf if math.isnan(layer.error.value) else layer.error.value


def _describe(name: str, pairs: Iterable[Pair]) -> DecoderLayer:
    """Make the figures of a layer of what both models computed."""
    means: dict[str, list[Tensor]] = defaultdict(list)
    heads: dict[str, list[Tensor]] = defaultdict(list)
    for pair in pairs:
        theirs, ours = pair.reference, pair.model
        after_BLD = theirs.hidden_BLD
        found = {
            "error": _relative(pair.alone_BLD - after_BLD, after_BLD - pair.before_BLD),
            "hidden_error": _relative(ours.hidden_BLD - after_BLD, after_BLD),
            "hidden_cosine": cosine_similarity(ours.hidden_BLD, after_BLD, -1),
        }
        if theirs.attention_BHLL is not None and ours.attention_BHLL is not None:
            their_BHL, our_BHL = map(_entropy, (theirs.attention_BHLL, ours.attention_BHLL))
            found["entropy"], found["reference_entropy"] = our_BHL.mean(1), their_BHL.mean(1)
            heads["reference"].append(their_BHL.mean(-1))
            heads["model"].append(our_BHL.mean(-1))
        if _same_gates(theirs, ours):
            found["agreement"], found["clear_agreement"] = _agreement(theirs, ours)
        for key, value_BL in found.items():
            means[key].append(value_BL.mean(1))
    mean_S = {key: torch.cat(parts).cpu() for key, parts in means.items()}
    return DecoderLayer(
        name=name,
        error=_over_windows(mean_S["error"]),
        hidden_error=_over_windows(mean_S["hidden_error"]),
        hidden_cosine=_over_windows(mean_S["hidden_cosine"]),
        attention=_describe_attention(mean_S, heads) if heads else None,
        gates=_describe_gates(mean_S) if "agreement" in mean_S else None,
    )


def _describe_attention(mean_S: dict[str, Tensor], heads: dict[str, list[Tensor]]) -> Attention:
    mean_H = {key: torch.cat(parts).mean(0) for key, parts in heads.items()}
    return Attention(
        entropy=float(mean_S["entropy"].mean()),
        reference_entropy=float(mean_S["reference_entropy"].mean()),
        change=_over_windows(mean_S["entropy"] - mean_S["reference_entropy"]),
        collapsed=int((mean_H["model"] < _COLLAPSED).sum()),
        reference_collapsed=int((mean_H["reference"] < _COLLAPSED).sum()),
        overloaded=int((mean_H["model"] > _OVERLOADED).sum()),
        reference_overloaded=int((mean_H["reference"] > _OVERLOADED).sum()),
    )


def _describe_gates(mean_S: dict[str, Tensor]) -> Gates:
    return Gates(
        agreement=_over_windows(mean_S["agreement"]),
        clear_agreement=_over_windows(mean_S["clear_agreement"]),
    )


def _over_windows(value_S: Tensor) -> Interval:
    return bootstrap(value_S[:, None])


def _relative(error_BLD: Tensor, of_BLD: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm
    return torch.div(norm(error_BLD, dim=-1), norm(of_BLD, dim=-1).clamp(min=_TINY))


def _entropy(weights_BHLL: Tensor) -> Tensor:
    """Return the entropy of each token's weights, divided by the log of the tokens it can see.

    Without the first token, which can see itself only.
    """
    entropy_BHL = torch.special.entr(weights_BHLL).sum(-1)
    seen_L = torch.arange(1, weights_BHLL.shape[-1] + 1, device=weights_BHLL.device)
    return torch.div(entropy_BHL[..., 1:], seen_L[1:].log())


def _same_gates(theirs: Computed, ours: Computed) -> bool:
    # Experts compute the tokens that are routed to them, which may differ.
    return (
        theirs.gate_BLU is not None
        and ours.gate_BLU is not None
        and theirs.gate_BLU.ndim == 3
        and theirs.gate_BLU.shape == ours.gate_BLU.shape
    )


def _agreement(theirs: Computed, ours: Computed) -> tuple[Tensor, Tensor]:
    """Return the share of units of equal sign, of all and of those above the median in size."""
    assert theirs.gate_BLU is not None and ours.gate_BLU is not None
    same_BLU = (theirs.gate_BLU > 0) == (ours.gate_BLU > 0)
    size_BLU = theirs.gate_BLU.abs()
    clear_BLU = size_BLU > size_BLU.median(-1, keepdim=True).values
    clear_BL = (same_BLU & clear_BLU).sum(-1) / clear_BLU.sum(-1).clamp(min=1)
    return same_BLU.float().mean(-1), clear_BL
