"""Facts about model families, by name, that a model itself does not tell.

All else is read from configurations and modules. Each fact says in which version of transformers
it was seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Facts about the models of one `model_type`, seen in transformers `seen`.

    `not_causal`: why a token's logits depend on later tokens, before version `until` if that is
    given; `{version}` is filled in. `no_trees`: why passes of trees of tokens are wrong. `state`:
    what a pass of several tokens does with the recurrent state: it goes on from it (`continues`),
    or ignores it (`ignored`). `state_in_modules`: the state is not in the cache. `logits_scaling`:
    whether the configuration's key of this name divides the lm_head's products or multiplies them.
    `decoder_positions`: where the decoder of an encoder-decoder puts the positions of tokens, which
    its forward does not take: into relative biases (`bias`) or learned embeddings (`table`).
    """

    seen: str = ""
    not_causal: str | None = None
    until: tuple[int, int] | None = None
    no_trees: str | None = None
    state: Literal["continues", "ignored"] | None = None
    state_in_modules: bool = False
    logits_scaling: Literal["divides", "multiplies"] = "divides"
    decoder_positions: Literal["bias", "table"] | None = None


FAMILIES: dict[str, Family] = {
    "cpmant": Family(seen="5.23", not_causal="it sees its prompt as a whole"),
    "prophetnet": Family(
        seen="5.23", not_causal="it predicts several tokens at once, in streams of their own"
    ),
    "xlnet": Family(seen="5.23", not_causal="it predicts tokens in any order"),
    # Right in 5.23; versions in between were not tried.
    **dict.fromkeys(
        ("big_bird", "doge", "megatron-bert", "rembert", "roformer"),
        Family(
            seen="5.17",
            not_causal="transformers {version} gives it no causal mask",
            until=(5, 23),
        ),
    ),
    "bloom": Family(seen="5.23", no_trees="its ALiBi biases are derived from a 2-D mask"),
    "mpt": Family(seen="5.23", no_trees="its ALiBi biases are derived from column numbers"),
    "git": Family(seen="5.17", no_trees="its forward takes no 4-D mask in transformers 5.17"),
    "gpt_neo": Family(seen="5.23", no_trees="its causal mask is derived from column numbers"),
    "xlm": Family(seen="5.23", no_trees="its causal mask is derived from column numbers"),
    "moshi": Family(seen="5.23", no_trees="its caches have a window that its masks have not"),
    "dory": Family(
        seen="5.24",
        no_trees="its loops over layers add caches of their own to the one they are given",
    ),
    **dict.fromkeys(
        (
            "bailing_hybrid", "bamba", "falcon_h1", "granitemoehybrid", "kimi_linear", "lfm2",
            "lfm2_moe", "lfm3", "mamba2", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text",
            "qwen3_5_text", "qwen3_next", "zamba2", "zaya",
        ),
        Family(seen="5.23", state="continues"),
    ),
    **dict.fromkeys(
        ("falcon_mamba", "jamba", "mamba", "zamba"), Family(seen="5.23", state="ignored")
    ),
    "recurrent_gemma": Family(seen="5.23", state="ignored", state_in_modules=True),
    "hyperclovax": Family(seen="5.23", logits_scaling="multiplies"),
    **dict.fromkeys(("mt5", "t5"), Family(seen="5.23", decoder_positions="bias")),
    "bart": Family(seen="5.23", decoder_positions="table"),
}  # fmt: skip

# Keys of configurations whose value multiplies the lm_head's products, and that caps them by tanh;
# seen in 5.23 in Cohere's models, Falcon-H1, Muse, and Gemma 2.
LOGITS_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
LOGITS_CAP = "final_logit_softcapping"

# Names of a layer's attention and MLP; each returns what is added to the residual stream (5.23).
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
MLP = ("mlp", "block_sparse_moe", "feed_forward", "feedforward")


def family(config: Any) -> Family:
    """Return what is known of the family of a text model's configuration."""
    return FAMILIES.get(config.model_type, Family())


def encoder_decoders() -> list[str]:
    """List the model types of encoder-decoders that can be decoded."""
    return sorted(name for name, found in FAMILIES.items() if found.decoder_positions is not None)


def families(**facts: object) -> set[str]:
    """Return the model types with these facts."""
    return {
        name
        for name, found in FAMILIES.items()
        if all(getattr(found, fact) == value for fact, value in facts.items())
    }
