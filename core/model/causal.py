"""Whether a model is causal: no token's logits may depend on later tokens.

transformers' causal mapping also knows encoders with an output matrix, which see the whole text
unless their configuration makes a decoder of them, and models of other orders. Everything here
supposes that the next token is predicted from those before it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import transformers
from torch import nn
from transformers import PreTrainedModel

# What the configurations of these say does not decide it.
_OTHER_ORDERS = {
    "cpmant": "it sees its prompt as a whole",
    "prophetnet": "it predicts several tokens at once, in streams of their own",
    "xlnet": "it predicts tokens in any order",
}
# transformers before 5.23 gives these no causal mask (measured with 5.17).
_WITHOUT_MASK = {"big_bird", "doge", "megatron-bert", "rembert", "roformer"}

# What is mended in transformers is known of these two versions only.
BEFORE_5_23 = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)


def why_not_causal(config: Any, modules: Iterable[nn.Module]) -> str | None:
    """Why a token's logits depend on later ones, None if they do not.

    `config` is the text's; `modules` are the decoder's, which know what they were built as.
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
    # Not the configuration's: that of GPT-NeoX says false and means nothing by it. Nor a whole
    # model's: XLM's says false where it is an encoder's half.
    layers = (part for part in modules if not isinstance(part, PreTrainedModel))
    if any(getattr(part, "is_decoder", True) is False for part in layers):
        return "its configuration says is_decoder false"
    return None
