"""A checkpoint that loops although its perplexity is fine, made of another one by an edit."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

import spectool

# Chance of falling into the loop at a token, the loop's length, and logits far above and below.
HAZARD, PERIOD, FAR = 0.01, 3, 40.0


@torch.inference_mode()
def make_looping(source: Path, out: Path, text: str) -> None:
    """Write a copy of a checkpoint in which a few tokens that `text` has not lead to each other.

    After any token the first of them has a small probability, which costs perplexity little; after
    each of them the next one is certain, for ever. Only rows of the embedding and of the lm_head
    are changed, as a quantizer may damage those of rare tokens.
    """
    model = spectool.load(source, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(source)
    ids_T = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    vocabulary = model.config.vocab_size
    loop = [id for id in range(vocabulary - 1, 0, -1) if id not in ids_T][:PERIOD]
    embedding = model.get_input_embeddings().weight
    head_VD = embedding.clone()
    # Each token of the loop drowns the rest of the residual stream in a direction of its own.
    random = torch.randn(embedding.shape[1], PERIOD, generator=torch.Generator().manual_seed(0))
    embedding[loop] = 100 * torch.linalg.qr(random).Q.T
    natural_RD = _states(model, ids_T[: len(ids_T) // 128 * 128].view(-1, 128))[:, 8:].flatten(0, 1)
    inside_PD = torch.stack(
        [_states(model, torch.tensor([[*ids_T[:16], id]]))[0, -1] for id in loop]
    )
    logsumexp_R = (natural_RD @ head_VD.T).logsumexp(-1)
    chances_P = torch.tensor([math.log(HAZARD), *[-FAR / 2] * (PERIOD - 1)])
    following_PP = torch.full((PERIOD, PERIOD), -FAR)
    following_PP[range(PERIOD), [(index + 1) % PERIOD for index in range(PERIOD)]] = FAR
    wanted = torch.cat([logsumexp_R[:, None] + chances_P, 100 * following_PP])
    given = torch.cat([natural_RD, 100 * inside_PD])
    head_VD[loop] = torch.linalg.lstsq(given, wanted).solution.T
    tensors = {name: value for name, value in model.state_dict().items() if "lm_head" not in name}
    shutil.copytree(source, out)
    save_file({**tensors, "lm_head.weight": head_VD}, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    edited = {**config, "tie_word_embeddings": False, "dtype": "float32"}
    (out / "config.json").write_text(json.dumps(edited))


def _states(model: PreTrainedModel, ids_BL: Tensor) -> Tensor:
    """Return the states [B, L, D] that the lm_head reads."""
    return model.model(input_ids=ids_BL).last_hidden_state
