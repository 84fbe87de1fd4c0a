"""Log-probabilities as states: as many numbers a position as a model is wide, not a vocabulary.

Logits are W h + b with a state h of width D, so that log-probabilities less their mean over the
tokens are linear in h: D of them and the lm_head's W determine all V (Finlayson et al., 2024,
arXiv:2403.09539; PILS, Nazir et al., 2025, arXiv:2506.17090). A factor on the logits ends up in h.
Logits that are capped by tanh are not linear in h, and `decode` cannot give them back.

Shapes: R positions, V tokens, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

# Rows of W that are held in double precision at a time.
_ROWS = 4096


class StateCodec:
    """Encoder of log-probabilities as states, and decoder.

    `weight_VD` and `bias_V` are the lm_head's in float32, or some of its rows: `encode` then takes
    the log-probabilities of these tokens alone, of more than D.
    """

    def __init__(self, weight_VD: Tensor, bias_V: Tensor) -> None:
        self.weight_VD, self.bias_V = weight_VD, bias_V

    @functools.cached_property
    def _inverse_DD(self) -> Tensor:
        """The inverse of W'W, where the mean row is taken off W."""
        gram_DD = self.weight_VD.new_zeros(self.width, self.width, dtype=torch.float64)
        for _, part_ND in self._parts():
            gram_DD += part_ND.T @ part_ND
        mean_D = self.weight_VD.mean(0, dtype=torch.float64)
        gram_DD -= len(self.weight_VD) * torch.outer(mean_D, mean_D)
        inverse_DD: Tensor = torch.linalg.pinv(gram_DD, hermitian=True)
        return inverse_DD

    @property
    def width(self) -> int:
        """Return the numbers of a state."""
        return self.weight_VD.shape[1]

    def _parts(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.weight_VD), _ROWS):
            rows = slice(start, start + _ROWS)
            yield rows, self.weight_VD[rows].double()

    def encode(self, logp_RV: Tensor) -> Tensor:
        """Return the states [R, D], float32, that fit log-probabilities best (least squares)."""
        centred_RV = logp_RV.double() - self.bias_V
        centred_RV -= centred_RV.mean(-1, keepdim=True)
        sums_RD = centred_RV.new_zeros(len(logp_RV), self.width)
        for rows, part_ND in self._parts():
            sums_RD += centred_RV[:, rows] @ part_ND
        states_RD: Tensor = sums_RD @ self._inverse_DD
        return states_RD.float()

    def decode(self, states_RD: Tensor) -> Tensor:
        """Return the log-probabilities [R, V] in float32."""
        return torch.log_softmax(states_RD @ self.weight_VD.T + self.bias_V, -1)
