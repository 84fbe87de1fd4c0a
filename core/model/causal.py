"""Check that a model is causal: no token's logits may depend on later tokens.

transformers' mapping of causal models also contains encoders with an lm_head, which attend to the
whole text unless their configuration makes them decoders, and models that predict in other orders.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from spectool.errors import UnsupportedError
from spectool.families import family
from spectool.model.decoder import find_decoder

VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))


def why_not_causal(config: Any, modules: Iterable[nn.Module]) -> str | None:
    """Explain why a token's logits depend on later ones; None if they do not.

    `config`: of the text model; `modules`: of the decoder, as they were built.
    """
    known = family(config)
    if known.not_causal is not None and (known.until is None or known.until > VERSION):
        return known.not_causal.format(version=transformers.__version__)
    for key in ("is_causal", "causal"):
        if getattr(config, key, True) is False:
            return f"its configuration says {key} false"
    if getattr(config, "use_bidirectional_attention", False) in (True, "all"):
        return "its configuration says use_bidirectional_attention"
    # Not the configuration's `is_decoder`: GPT-NeoX has false without an effect. Nor a whole
    # model's: XLM has false in the encoder's part.
    layers = (part for part in modules if not isinstance(part, PreTrainedModel))
    if any(getattr(part, "is_decoder", True) is False for part in layers):
        return "its configuration says is_decoder false"
    return None


def check_causal(model: PreTrainedModel, path: Path) -> None:
    """Raise an UnsupportedError if a token's logits depend on later tokens."""
    decoder: nn.Module = find_decoder(model) or model
    reason = why_not_causal(model.config.get_text_config(), decoder.modules())
    if reason is not None:
        raise UnsupportedError(f"{path}: is no causal model: {reason}")
