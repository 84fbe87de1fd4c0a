"""A small encoder-decoder learns from a decoder-only model: Return of the Encoder.

MODEL is the teacher and stays as it is. The student is transformers' own T5 or BART, made here with
the teacher's vocabulary; it is what is written, with the teacher's tokenizer. The encoder reads the
source, the decoder learns the target. With the teacher's logits where it has read source and
target up to the same token, the loss is

    alpha KL(teacher || student) + (1 - alpha) CE,  alpha = 0.9

of means over the target's tokens: padding is in neither (the authors' code averages it in). Causal
logits do not depend on padding at the right, so texts are not padded at the left as theirs are.
Targets are those of the data: the last answer of a record, with an end token, or the second half
of a piece of plain text. The authors' KL term is on texts that the student samples. Elfeki et al.,
Return of the Encoder, 2025 (arXiv:2501.16273); two thirds of the student's layers are its
encoder's, as theirs. B texts, L tokens, S of a source, T of a target, R of all targets, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForSeq2SeqLM,
    BartConfig,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
)

from spectool import options
from spectool.checkpoint.artifact import ArtifactWriter
from spectool.checkpoint.trained import write_new
from spectool.distill.data.samples import Sample, pad
from spectool.distill.objective import seeded
from spectool.distill.objectives.base import WeightObjective, WeightTask, divergence, first_id
from spectool.distill.weights import TrainedWeights
from spectool.errors import UsageError
from spectool.model.loading import load_tokenizer
from spectool.options import option
from spectool.training import History

# Width of an attention head, and of the feed-forward layer in widths of the student.
_HEAD, _FEED_FORWARD = 32, 2


class NewModel(TrainedWeights):
    """A model of its own, all of whose weights are trained."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.module = model

    def changed(self) -> dict[str, Tensor]:
        """Return all stored weights; tied ones once."""
        model: Any = self.module
        tied = model.all_tied_weights_keys
        return {
            name: each.detach() for name, each in model.state_dict().items() if name not in tied
        }


class Cross(WeightObjective):
    """Objective of an encoder-decoder that learns from MODEL.

    Raises:
        UsageError: a width that is no multiple of the width of a head.
    """

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Config(options.Config):
        """Options of `cross`."""

        student: Literal["t5", "bart"] = option("t5", "Architecture of the student")
        width: int = option(256, "Width of the student, a multiple of 32", minimum=32)
        encoder_layers: int = option(4, "Layers of the student's encoder", minimum=1, maximum=64)
        decoder_layers: int = option(2, "Layers of the student's decoder", minimum=1, maximum=64)
        alpha: float = option(
            0.9, "Weight of the teacher; 0: learn from the text alone", minimum=0, maximum=1
        )

        def validate(self) -> None:
            if self.width % _HEAD:
                raise UsageError(f"--width {self.width}: expected a multiple of {_HEAD}")

    learning_rate = 1e-3
    takes_teacher = False
    new_model = True
    draft = "copy"

    def __init__(self, task: WeightTask, config: Cross.Config) -> None:
        self.alpha, texts = config.alpha, task.texts
        self.student_config = make_student_config(task.model, config, texts.seq_len)
        end = first_id(self.student_config.eos_token_id)
        tokenizer = load_tokenizer(task.source)
        bos = tokenizer.bos_token_id

        def pairs(samples: Sequence[Sample]) -> list[Sample]:
            return [make_pair(each, end, texts.seq_len, bos) for each in samples]

        task = replace(
            task,
            texts=replace(
                texts, samples=pairs(texts.samples), held_out=list(map(pairs, texts.held_out))
            ),
        )
        task.model.requires_grad_(False)
        # A prompt that has no start token is to have none in the training either.
        self._left_out = {bos} - set(tokenizer("a")["input_ids"][:1])
        auto: Any = AutoModelForSeq2SeqLM
        with seeded(f"{task.seed}/student", task.device), torch.device(task.model.device):
            student: PreTrainedModel = auto.from_config(self.student_config)
        super().__init__(task, NewModel(student))

    def losses(self, samples: Sequence[Sample]) -> tuple[Tensor, Tensor | None]:
        """Return the means over the targets' tokens of -log p and of KL(teacher || student)."""
        total = max(1, sum(sum(sample.loss_mask) for sample in samples))
        part = self.task.processes.part(samples)
        rows = part or samples[:1]
        sources = [each.tokens[each.tokens[0] in self._left_out : each.given] for each in rows]
        start: int = self.student_config.decoder_start_token_id
        logits_RV = read_targets(self.module, sources, rows, start)
        labels_R = torch.tensor([t for each in rows for t in each.tokens[each.given :]])
        # A process without a text takes part in the passes of the others.
        scale = (1.0 if part else 0.0) / total
        nats = scale * F.cross_entropy(logits_RV, labels_R.to(logits_RV.device), reduction="sum")
        if self.alpha == 0:
            return nats, None
        teacher_RV = read_teacher(self.task.model, rows)[:, : logits_RV.shape[-1]]
        return nats, scale * divergence(teacher_RV, logits_RV)

    def combine(self, nats: Any, kl: Any | None) -> Any:
        return nats if kl is None else self.alpha * kl + (1 - self.alpha) * nats

    def write(self, writer: ArtifactWriter | None, history: History) -> None:
        """Write the student as a checkpoint of its own, in float32."""
        assert history.best is not None
        if writer is None:
            return
        training = {
            **self.task.record,
            "draft": self.draft,
            "evaluations": history.evaluations,
            "best": history.best,
        }
        weights = {name: each.cpu() for name, each in self.weights.changed().items()}
        write_new(writer, self.task.source, weights, describe_student(self.module), training)


def make_student_config(
    teacher: PreTrainedModel, config: Cross.Config, seq_len: int
) -> PreTrainedConfig:
    """Return the student's configuration, with the teacher's vocabulary and special tokens."""
    table: Any = teacher.get_input_embeddings()
    known = teacher.generation_config
    text = teacher.config.get_text_config()
    ends = known.eos_token_id if known.eos_token_id is not None else text.eos_token_id
    start = next((i for i in map(first_id, (text.bos_token_id, ends)) if i is not None), 0)
    pad_id = start if text.pad_token_id is None else text.pad_token_id
    shared: dict[str, Any] = {
        "vocab_size": table.num_embeddings,
        "d_model": config.width,
        "bos_token_id": start,
        "eos_token_id": ends,
        "pad_token_id": pad_id,
        "decoder_start_token_id": start,
        "dtype": "float32",
    }
    heads, inner = config.width // _HEAD, _FEED_FORWARD * config.width
    if config.student == "t5":
        return T5Config(
            **shared,
            d_kv=_HEAD,
            d_ff=inner,
            num_heads=heads,
            num_layers=config.encoder_layers,
            num_decoder_layers=config.decoder_layers,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    return BartConfig(
        **shared,
        max_position_embeddings=seq_len,
        encoder_layers=config.encoder_layers,
        decoder_layers=config.decoder_layers,
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=inner,
        decoder_ffn_dim=inner,
        dropout=0.0,
        forced_eos_token_id=None,
    )


def describe_student(student: Any) -> dict[str, bytes]:
    """Return the files that transformers reads of a student besides weights and tokenizer."""
    student.config.architectures = [type(student).__name__]
    keys = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    kind: Any = GenerationConfig
    generation = kind(**{key: getattr(student.config, key) for key in keys})
    return {
        "config.json": student.config.to_json_string().encode(),
        "generation_config.json": generation.to_json_string().encode(),
    }


def make_pair(sample: Sample, end: int | None, seq_len: int, bos: int | None) -> Sample:
    """Return a text as a source of `given` tokens and a target, which alone is in the loss.

    The target is the last answer, with an end token if it has none and was not cut; what follows it
    is left out. Of a text without a question, it is the second half.
    """
    tokens, mask = sample.tokens, sample.loss_mask
    given = stop = len(mask) - mask[::-1].index(True)
    while given > 0 and mask[given - 1]:
        given -= 1
    # A start token is no question.
    if given == 0 or (given == 1 and tokens[0] == bos):
        given = len(tokens) // 2
    else:
        is_whole = stop < len(tokens) or len(tokens) < seq_len
        tokens = tokens[:stop]
        if end is not None and is_whole and tokens[-1] != end:
            tokens = [*tokens, end]
    return Sample(tokens, [False] * given + [True] * (len(tokens) - given), given=given)


def read_targets(
    student: Any, sources: Sequence[list[int]], pairs: Sequence[Sample], start: int
) -> Tensor:
    """Return the student's logits [R, V] before each token of the targets, in float32."""
    inputs = [[start, *each.tokens[each.given : -1]] for each in pairs]
    (source_BS, reads_BS), (input_BT, is_target_BT) = (
        pad([Sample(ids, [True] * len(ids)) for ids in texts]) for texts in (sources, inputs)
    )
    logits_BTV = student(
        input_ids=source_BS.to(student.device),
        attention_mask=reads_BS.long().to(student.device),
        decoder_input_ids=input_BT.to(student.device),
        use_cache=False,
    ).logits
    logits_RV: Tensor = logits_BTV[is_target_BT.to(student.device)].float()
    return logits_RV


@torch.no_grad()
def read_teacher(teacher: Any, pairs: Sequence[Sample]) -> Tensor:
    """Return the teacher's logits [R, V] before each token of the targets, in float32."""
    tokens_BL, loss_mask_BL = (each.to(teacher.device) for each in pad(pairs))
    logits_BLV = teacher(input_ids=tokens_BL, use_cache=False).logits
    logits_RV: Tensor = logits_BLV[:, :-1][loss_mask_BL[:, 1:]].float()
    return logits_RV
