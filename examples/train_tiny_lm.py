"""Train the bundled checkpoint: a small Llama on the standard library's sources and docstrings.

    python examples/train_tiny_lm.py OUT

The training text is the standard library of this Python (`spectool.examples.stdlib`), of which a
twentieth of the files is held out. Writes a transformers directory in bfloat16, with
`training_record.json` next to the weights. Another version of Python has another text and gives
other weights; the record names the version.

Shapes: B windows of a batch, L tokens of each, V vocabulary.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spectool import machine
from spectool.examples.stdlib import make_conversations, read_documents
from spectool.report import Reporter
from spectool.training import Metrics, Recipe, Training

END, STOP = "<|endoftext|>", "<|end|>"
SPECIAL = [END, "<|user|>", "<|assistant|>", "<|system|>", STOP]
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "<|{{ message['role'] }}|>{{ message['content'] }}<|end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)
# A small vocabulary, so that the blocks, which spectool compresses, outweigh the embedding.
VOCABULARY = 1024
CONTEXT = 512
BATCH = 4
HELD_OUT_WINDOWS = 48


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which keeps indentation together."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=bpe,
        bos_token=END,
        eos_token=END,
        pad_token=END,
        additional_special_tokens=SPECIAL[1:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make the untrained model."""
    ends: list[Any] = [tokenizer.convert_tokens_to_ids(token) for token in (END, STOP)]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=ends[0],
        eos_token_id=ends,
        pad_token_id=ends[0],
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=ends[0], eos_token_id=ends, pad_token_id=ends[0]
    )  # type: ignore[no-untyped-call]
    return model


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Concatenate the tokens of all texts, each with the end-of-text token first."""
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    end = tokenizer.convert_tokens_to_ids(END)
    return torch.tensor([token for ids in encoded for token in (end, *ids)])


class Printer(Reporter):
    """Reporter that prints the evaluations of a training."""

    def event(self, event: Any) -> None:
        if event.step and event.evaluation is not None:
            speed = BATCH * CONTEXT / event.metrics["seconds"]
            print(
                f"step {event.step}/{event.steps}, loss {event.metrics['loss']:.3f}, held out "
                f"{event.evaluation['loss']:.3f}, {speed:.0f} tokens/s",
                file=sys.stderr,
                flush=True,
            )


def train(
    model: LlamaForCausalLM, text: torch.Tensor, held_out: torch.Tensor, recipe: Recipe, seed: int
) -> Training:
    """Train the model with AdamW, without weight decay on the norms, and print the progress."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))
    rows_SL = held_out[: HELD_OUT_WINDOWS * CONTEXT].view(-1, CONTEXT)

    def compute_loss(ids_BL: torch.Tensor) -> torch.Tensor:
        logits_BLV = model(input_ids=ids_BL, use_cache=False).logits[:, :-1]
        loss: torch.Tensor = torch.nn.functional.cross_entropy(
            logits_BLV.flatten(0, 1), ids_BL[:, 1:].flatten()
        )
        return loss

    def accumulate(step: int) -> Metrics:
        generator = torch.Generator().manual_seed(seed + step)
        starts = torch.randint(0, len(text) - CONTEXT + 1, (BATCH,), generator=generator)
        loss = compute_loss(
            torch.stack([text[start : start + CONTEXT] for start in starts.tolist()])
        )
        loss.backward()  # type: ignore[no-untyped-call]
        return {"loss": loss.item()}

    @torch.inference_mode()
    def evaluate() -> Metrics:
        losses = [compute_loss(ids_BL).item() for ids_BL in torch.split(rows_SL, BATCH)]
        mean = sum(losses) / len(losses)
        return {"score": -mean, "loss": mean}

    training = Training(
        name="the bundled checkpoint",
        module=model,
        optimizers=[optimizer],
        recipe=recipe,
        accumulate=accumulate,
        evaluate=evaluate,
        reporter=Printer(),
    )
    training.run()
    return training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.manual_seed(given.seed)

    library = list(read_documents())
    code = [document.text for document in library if not document.held_out]
    held_out_code = [document.text for document in library if document.held_out]
    tokenizer = train_tokenizer(code)
    chats = [
        str(tokenizer.apply_chat_template(messages, tokenize=False))
        for document in library
        if not document.held_out
        for messages in make_conversations(document)
    ]
    texts = code + chats
    random.Random(given.seed).shuffle(texts)
    text, held_out = encode(tokenizer, texts), encode(tokenizer, held_out_code)
    model = make_model(tokenizer)
    print(
        f"{len(code)} files and {len(chats)} conversations, {len(text) / 1e6:.2f} M tokens; "
        f"{len(held_out_code)} files, {len(held_out) / 1e6:.2f} M tokens held out; "
        f"{model.num_parameters() / 1e6:.2f} M parameters",
        file=sys.stderr,
    )
    recipe = Recipe(steps=given.steps, warmup=0.02, every=250)
    history = train(model, text, held_out, recipe, given.seed).history
    assert history.best is not None

    stored: Any = model
    stored.to(torch.bfloat16).save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    record: dict[str, Any] = {
        "command": f"python examples/train_tiny_lm.py OUT --steps {given.steps}",
        "seed": given.seed,
        "parameters": model.num_parameters(),
        "text": {
            "origin": "the standard library of the Python below, without tests and code pages",
            "files": len(code),
            "conversations": len(chats),
            "tokens": len(text),
            "sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
            "held_out": sorted(document.name for document in library if document.held_out),
        },
        "tokens_seen": given.steps * BATCH * CONTEXT,
        "held_out_perplexity": math.exp(history.best["loss"]),
        "looks": history.evaluations,
        "seconds": round(history.seconds),
        "machine": machine.describe(),
    }
    path = given.out / "training_record.json"
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
