"""What `architectures.py` checks of a tiny model: it is compared with transformers and itself.

Shapes: B sequences, L tokens of each, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import shrunken
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import spectool
from spectool import methods
from spectool.checkpoint.tensors import open_checkpoint
from spectool.data.windows import Batch, Windows
from spectool.decode.generate import Runner
from spectool.distill import plan as heads_plan
from spectool.distill.train_heads import train_heads
from spectool.errors import InputError
from spectool.evaluate.log_probs import BlockwiseLogProbs, log_probs
from spectool.evaluate.measures.layers import layer_errors
from spectool.model.loading import load_tokenizer
from spectool.quantize.job import QuantizeJob
from spectool.quantize.run import quantize
from spectool.report import Reporter

TEXT = Path(__file__).parent.parent / "core/data/calibration/mixed.txt"

# Of a text whose windows are compared, and of what is decoded.
SEQUENCES, LENGTH, NEW_TOKENS = 4, 40, 16
PROMPTS = (5, 11, 23)

# Largest difference between two computations of the same numbers, relative to the largest number.
SAME = 1e-4
# What rounding to 8 bits may do to the logits of half of the tokens: where a layer chooses experts
# or keys, small errors choose otherwise. One matrix of 28 that is noise makes 0.64 and more.
EIGHT_BITS = 0.15
# What 4 bits may do to a matrix, squared: one of zeros is 1 off, one of noise 2; and to logits, on
# which random weights magnify it up to 1: all matrices of noise make 1.4.
FOUR_BITS_MATRIX, FOUR_BITS_LOGITS = 0.5, 1.2

# Those that draft for any checkpoint: `units` is for one that was trained for it.
DRAFTERS = [
    name
    for name in methods.list_methods("drafter")
    if name not in {"none", "units", *methods.list_trainable()}
]


class DifferenceError(Exception):
    """Two computations that should agree do not."""


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of the tiny models' vocabulary, trained on the bundled text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shrunken.VOCAB,
        special_tokens=["<pad>", "<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXT.read_text("utf-8").splitlines(), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>")


@dataclass
class Subject:
    """A saved tiny model, transformers' reading of it, and spectool's."""

    place: Path
    scratch: Path
    theirs: PreTrainedModel
    ids_BL: Tensor
    notes: list[str] = field(default_factory=list)
    # Tokens that the last call of `decode` drafted, and those accepted.
    drafted: dict[str, float] = field(default_factory=dict)
    # Whether it runs block by block; what is packed does as well then, or as little.
    walks: bool = False

    @functools.cached_property
    def logits_BLV(self) -> Tensor:
        return forward(self.theirs, self.ids_BL)

    @functools.cached_property
    def ours(self) -> PreTrainedModel:
        return spectool.load(self.place, dtype="float32")

    @functools.cached_property
    def text(self) -> str:
        file = self.scratch / "text.txt"
        file.write_text(TEXT.read_text("utf-8")[:12000], "utf-8")
        return str(file)

    @functools.cached_property
    def prompts(self) -> list[list[int]]:
        ids = tokenizer()(TEXT.read_text("utf-8")[:400])["input_ids"]
        # Something to find again.
        return [(ids[size : size + size // 2 + 1] * 2)[:size] for size in PROMPTS]

    @functools.cached_property
    def plain(self) -> list[list[int]]:
        """spectool's own greedy text after each prompt, one at a time."""
        return [self.decode(None, [prompt])[0] for prompt in self.prompts]

    def decode(self, draft: str | None, prompts: list[list[int]]) -> list[list[int]]:
        """spectool's greedy text after prompts, all of them together."""
        heard: list[int] = []
        # As transformers opens it: some model types add tokens to it.
        runner = Runner(
            self.ours, tokenizer=load_tokenizer(open_checkpoint(self.place)), draft=draft
        )
        try:
            results = runner.generate(
                prompts,
                max_new_tokens=NEW_TOKENS,
                batch_size=len(prompts),
                on_tokens=lambda row, tokens, text, drafted: heard.extend(tokens),
            )
        except InputError as error:
            if heard:
                raise DifferenceError(f"refused after {len(heard)} tokens: {error}") from error
            raise
        self.notes += [note for note in runner.target.notes if note not in self.notes]
        runner.close()
        self.drafted = {
            "drafted": sum(result.drafted for result in results),
            "accepted": sum(result.accepted for result in results),
        }
        return [result.token_ids for result in results]


@torch.inference_mode()
def forward(model: PreTrainedModel, ids_BL: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=ids_BL, use_cache=False).logits
    return logits.float()


def resident(subject: Subject) -> dict[str, float]:
    """Logits of the whole model are transformers' own."""
    return {"difference": same(forward(subject.ours, subject.ids_BL), subject.logits_BLV)}


def blockwise(subject: Subject) -> dict[str, float]:
    """Log-probabilities block by block are transformers' own."""
    probs_BLV = logits_by_block(subject.place, subject.ids_BL)
    subject.walks = True
    return {"difference": same(probs_BLV, log_probs(subject.logits_BLV, whole(subject.ids_BL)))}


def logits_by_block(place: Path, ids_BL: Tensor) -> Tensor:
    windows = Windows((ids_BL,), ids_BL.shape[1], None)
    log_probs_of = BlockwiseLogProbs(
        open_checkpoint(place),
        windows,
        dtype=torch.float32,
        device=torch.device("cpu"),
        activations="exact",
    )
    return log_probs_of(whole(ids_BL))


def whole(ids_BL: Tensor) -> Batch:
    """Texts as one batch of windows."""
    (batch,) = Windows((ids_BL,), ids_BL.shape[1], None).batches(1, batch_size=len(ids_BL))
    return batch


def int8(subject: Subject) -> dict[str, float]:
    """Packed to 8 bits it is close to dense, the same unpacked, loaded again and by block."""
    out, metrics = pack(subject, "int8")
    packed, again = (spectool.load(out, dtype="float32", activations="exact") for _ in range(2))
    logits_BLV = forward(packed, subject.ids_BL)
    metrics["error"] = close(logits_BLV, subject.logits_BLV, EIGHT_BITS)
    if not torch.equal(forward(again, subject.ids_BL), logits_BLV):
        raise DifferenceError("loaded again it has other logits")
    dense = spectool.load(out, dtype="float32", runtime="dense")
    same(forward(dense, subject.ids_BL), logits_BLV, "packed and unpacked")
    if subject.walks:
        probs_BLV = logits_by_block(out, subject.ids_BL)
        ours_BLV = log_probs(logits_BLV, whole(subject.ids_BL))
        same(probs_BLV, ours_BLV, "packed, whole and by block")
    return metrics


def gptq(subject: Subject) -> dict[str, float]:
    """Packed to 4 bits with text every matrix is close to its source, and logits are related."""
    out, metrics = pack(subject, "gptq", text=True, bits=4)
    source = open_checkpoint(subject.place)
    worst = max(layer_errors(open_checkpoint(out), source), key=lambda layer: layer.error)
    if not worst.error <= FOUR_BITS_MATRIX:
        raise DifferenceError(f"{worst.name} is {worst.error:.2f} off its source, squared")
    metrics["matrix"] = round(worst.error, 4)
    logits_BLV = forward(spectool.load(out, dtype="float32"), subject.ids_BL)
    metrics["error"] = close(logits_BLV, subject.logits_BLV, FOUR_BITS_LOGITS)
    return metrics


class Heard(Reporter):
    """Reporter that keeps the plan."""

    def plan(self, plan: Any) -> None:
        self.heard = plan


def pack(
    subject: Subject, method: str, *, text: bool = False, **options: Any
) -> tuple[Path, dict[str, float]]:
    """The checkpoint packed by a method, and which share of the blocks' matrices that is."""
    out, metrics = subject.scratch / method, {}

    job = QuantizeJob(
        method=method,
        config=methods.import_method(method, "quantizer").Config(**options),
        calibration=[subject.text] if text else None,
        samples=4,
        seq_len=32,
        allow_dense=True,
    )
    with early(out):
        reporter = Heard()
        quantize(open_checkpoint(subject.place), out, job, reporter=reporter)
    architecture = reporter.heard.architecture
    blocks = [architecture.model.get_submodule(block) for block in architecture.blocks]
    whole = sum(p.numel() for block in blocks for p in block.parameters() if p.ndim > 1)
    metrics["packed"] = round(reporter.heard.num_weights / max(1, whole), 3)
    return out, metrics


@contextlib.contextmanager
def early(out: Path) -> Iterator[None]:
    """Whoever refuses must do so before anything is written."""
    try:
        yield
    except InputError as error:
        if out.with_name(f"{out.name}.partial").exists():
            raise DifferenceError(f"refused after work began: {error}") from error
        raise


def batch(subject: Subject) -> dict[str, float]:
    """Three prompts together give what each gives alone, and what transformers gives."""
    together = subject.decode(None, subject.prompts)
    agree("batch 3", together, "batch 1", subject.plain)
    texts: list[list[int]] = []
    try:
        texts = [generated(subject.theirs, prompt) for prompt in subject.prompts]
    except Exception as error:
        subject.notes.append(f"transformers' own generate raises {brief(error)}")
    if texts != together:
        again = [continued(subject.theirs, prompt) for prompt in subject.prompts]
        if texts and texts != again:
            subject.notes.append("transformers' generate differs from its forward without a cache")
        agree("spectool", together, "transformers' greedy", again if texts != again else texts)
    return {}


def generated(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """transformers' greedy text."""
    ids_1L = torch.tensor([prompt])
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "num_beams": 1}
    mask_1L = torch.ones_like(ids_1L)
    made: Any = model.generate(ids_1L, attention_mask=mask_1L, pad_token_id=0, **options)
    return list(made[0, len(prompt) :].tolist())


def continued(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """The greedy text of forwards over all of it, without a cache."""
    tokens = list(prompt)
    for _ in range(NEW_TOKENS):
        tokens.append(int(forward(model, torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def drafter(subject: Subject, name: str) -> dict[str, float]:
    """Drafted text is plain text, for a batch."""
    draft = str(subject.place) if name == "draft_model" else name
    plain = subject.plain
    agree(name, subject.decode(draft, subject.prompts), "plain", plain)
    return subject.drafted


def medusa(subject: Subject) -> dict[str, float]:
    """Heads learn for a few steps, and text that they draft is plain text."""
    out = subject.scratch / "heads"
    job = heads_plan.HeadsJob(
        method="medusa",
        config=methods.import_method("medusa", "drafter").Heads.Config(),
        data=[subject.text],
        steps=2,
        seq_len=48,
        batch_tokens=192,
        held_out=6,
    )
    with early(out):
        train_heads(open_checkpoint(subject.place), out, job, dtype=torch.float32)
    plain = subject.plain
    agree("medusa", subject.decode(str(out), subject.prompts), "plain", plain)
    return subject.drafted


def same(ours: Tensor, theirs: Tensor, what: str = "logits") -> float:
    """The difference relative to the largest number. Raises: DifferenceError: it is too large."""
    if ours.shape != theirs.shape:
        raise DifferenceError(f"{what}: {list(ours.shape)} for {list(theirs.shape)}")
    found = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    if not found <= SAME:
        raise DifferenceError(f"{what} differ by {found:.1e} of the largest")
    return found


def close(ours_BLV: Tensor, theirs_BLV: Tensor, bound: float) -> float:
    """The median token's error relative to its logits: of few tokens rounding changes the experts.

    Raises:
        DifferenceError: it is beyond the bound, or something is not finite.
    """
    errors_BL = (ours_BLV - theirs_BLV).norm(dim=-1) / theirs_BLV.norm(dim=-1)
    found = errors_BL.median().item()
    if not errors_BL.isfinite().all() or found > bound:
        raise DifferenceError(f"packed logits are {found:.2f} off the dense ones")
    return round(found, 4)


def agree(one: str, ours: list[list[int]], other: str, theirs: list[list[int]]) -> None:
    """Raises: DifferenceError: texts differ."""
    for row, (first, second) in enumerate(zip(ours, theirs, strict=True)):
        if first != second:
            pairs = enumerate(zip(first, second, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))
            raise DifferenceError(f"{one} is not {other}: prompt {row + 1}, new token {at + 1}")


CHECKS: dict[str, Callable[[Subject], dict[str, float]]] = {
    "resident": resident,
    "blockwise": blockwise,
    "int8": int8,
    "gptq": gptq,
    "batch": batch,
    **{name: functools.partial(drafter, name=name) for name in DRAFTERS},
    "medusa": medusa,
}


def brief(error: BaseException) -> str:
    """An exception in one line, with the place that raised it."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    reason = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {reason} ({Path(last.filename).name}:{last.lineno})"


def judge(
    check: Callable[[Subject], dict[str, float]], subject: Subject, *, causal: bool
) -> dict[str, Any]:
    """How a check ended."""
    try:
        metrics = check(subject)
    except InputError as error:
        reason = " ".join(str(error).split())
        for place in (subject.place, subject.scratch):
            reason = reason.replace(str(place), "MODEL" if place == subject.place else "OUT")
        return {"result": "refused", "why": reason}
    except DifferenceError as error:
        reason = str(error).replace(str(subject.place), "MODEL")
        return {"result": "FAULT", "why": reason}
    except Exception as error:
        return {"result": "FAULT", "why": f"raised {brief(error)}", "trace": trace(error)}
    if not causal:
        return {"result": "FAULT", "why": "runs a model whose logits look at later tokens"}
    return {"result": "works", **metrics}


def trace(error: Exception) -> list[str]:
    """The frames of spectool and transformers, the innermost last."""
    frames = traceback.extract_tb(error.__traceback__)
    return [f"{'/'.join(Path(f.filename).parts[-2:])}:{f.lineno} {f.name}" for f in frames[1:]][
        -12:
    ]
