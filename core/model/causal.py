"""Check that a model is causal: no token's logits may depend on later tokens.

transformers' mapping of causal models also contains encoders with an lm_head, which attend to the
whole text unless their configuration makes them decoders, and models that predict in other orders.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

# Model types that are not causal, whatever their configuration.
_OTHER_ORDERS = {
    "cpmant": "it sees its prompt as a whole",
    "prophetnet": "it predicts several tokens at once, in streams of their own",
    "xlnet": "it predicts tokens in any order",
}
# transformers before 5.23 gives these no causal mask (measured with 5.17).
_WITHOUT_MASK = {"big_bird", "doge", "megatron-bert", "rembert", "roformer"}

# Faults of transformers that version 5.23 no longer has; versions in between were not tried.
BEFORE_5_23 = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)


def why_not_causal(config: Any, modules: Iterable[nn.Module]) -> str | None:
    """Explain why a token's logits depend on later ones; None if they do not.

    `config`: of the text model; `modules`: of the decoder, as they were built.
    """
    if config.model_type in _OTHER_ORDERS:
        return _OTHER_ORDERS[config.model_type]
    if config.model_type in _WITHOUT_MASK and BEFORE_5_23:
        return f"transformers {transformers.__version__} gives it no causal mask"
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
