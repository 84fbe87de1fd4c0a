"""Training draft heads: from a job to a heads directory. Knows no method.

The target reads the training text and its features are taught to the heads at once, so nothing of
them is stored. Heads are measured on text that the target wrote itself, greedily, after held-out
beginnings: that is what they will draft. All that costs time is kept beside OUT until the end, so a
run that was killed goes on, and ends with the same bytes.

Shapes: B texts of a batch, L tokens of each, R places, K heads.
"""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from spectool.artifact import ArtifactWriter
from spectool.checkpoint import Checkpoint, open_checkpoint, read_tensor, text_fingerprint
from spectool.decode.cache import TextCache
from spectool.decode.drafters.heads import HeadsRecord, lineage
from spectool.decode.drafters.trained import MOST_NODES, TOP, Heads, Learning, frequent
from spectool.decode.generate import Runner
from spectool.decode.protocol import Lesson, Needs
from spectool.decode.target import Target
from spectool.decode.tree import best_paths
from spectool.errors import TextError, UnsupportedError, UsageError
from spectool.headers import HEADS, HEADS_FILE, read_header
from spectool.loading import (
    check_device,
    default_dtype,
    describe_runtime,
    load_model,
    load_tokenizer,
    own_dtype,
    tokenizer_digest,
)
from spectool.machine import available_memory
from spectool.methods import resolve
from spectool.options import Config
from spectool.skeleton import build_meta, read_config
from spectool.training import Figures, Recipe, Training
from spectool.version import __version__

from .regenerate import regenerate
from .samples import Sample, batches, pad, read_samples, split

# Tokens that the target writes after each held-out beginning.
_HELD_OUT_TOKENS = 128
# Samples that the target writes anew between two records of it.
_GROUP = 32
# Texts that the target writes together.
_WRITTEN_TOGETHER = 8
# Looks at the held-out text over a whole training.
_LOOKS = 20

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Everything that a training is asked to do, apart from where it runs.

    `steps` None: `epochs` over the data. `learning_rate` None: the method's own. `held_out`:
    samples to measure on, at most.
    """

    method: str
    config: Config
    data: Sequence[str]
    steps: int | None = None
    epochs: int = 1
    seq_len: int = 1024
    batch_tokens: int = 4096
    learning_rate: float | None = None
    warmup: float = 0.05
    held_out: int = 32
    regenerate: bool = False
    temperature: float = 0.8
    text_field: str | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a training will do and take, known before the weights are read."""

    parameters: int
    file_bytes: int
    memory_bytes: int
    samples: int
    taught_tokens: int
    held_out: int
    steps: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What came out of it; `tokens_per_forward` is the estimate for the drafter's default tree."""

    record: HeadsRecord
    parameters: int
    steps: int
    seconds: float
    tokens_per_forward: float
    nodes: int
    depth: int
    initial: Figures


class _Shards:
    """Two places for a run's state beside OUT: while one is written, the other is whole."""

    NAMES = ("state-0.safetensors", "state-1.safetensors")

    def __init__(self, writer: ArtifactWriter) -> None:
        self.writer = writer

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        name = max(self.NAMES, key=self._step)
        if self._step(name) < 0:
            return None
        return _read(self.writer.path(name)), self.writer.report(name) or {}

    def save(self, tensors: Mapping[str, Tensor], said: dict[str, Any]) -> None:
        self.writer.write_shard(min(self.NAMES, key=self._step), tensors, {}, said)

    def _step(self, name: str) -> int:
        """The step that a state was stored after; -1 where there is none."""
        said = self.writer.report(name)
        return -1 if said is None else int(said["step"])


def train_heads(
    model: str | Path,
    out: Path,
    job: Job,
    *,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    runtime: str = "auto",
    overwrite: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    say: Say = lambda line: None,
    announce: Callable[[Plan], None] = lambda plan: None,
    start: Callable[[], None] = lambda: None,
    watch: Callable[[int, int, Figures, Figures | None], None] = lambda *step: None,
) -> Report:
    """Train heads for `model` and write them to the directory `out`.

    `announce` hears the plan before the weights are read, `start` when the first step begins,
    `watch(step, steps, figures, look)` of every step; `look` are held-out figures or None.

    Raises:
        InputError: model, data or options will not do, or the place cannot be written.
        SpectoolError: the loss is not finite, or the disk is full.
    """
    began = time.monotonic()
    learning: Learning = resolve(job.method, "drafter").Heads.learning
    rate = learning.rate if job.learning_rate is None else job.learning_rate
    job = replace(job, learning_rate=rate)
    checkpoint = open_checkpoint(model, revision=revision, trust_remote_code=trust_remote_code)
    where = check_device(device)
    dtype = dtype or default_dtype(checkpoint.layout, where)
    tokenizer = load_tokenizer(checkpoint.path, trust_remote_code=trust_remote_code)
    seq_len = min(job.seq_len, checkpoint.layout.context or job.seq_len)
    samples = read_samples(
        job.data,
        tokenizer,
        seq_len=seq_len,
        field=job.text_field,
        template=job.template or None,
        # What the steps take, and as much again for what is held out and for choice.
        max_tokens=None if job.steps is None else 2 * (job.steps + 1) * job.batch_tokens,
    )
    taught, held_out = split(samples, held_out=job.held_out, seed=job.seed)
    own, unseen = [samples[i] for i in taught], [samples[i] for i in held_out]
    announce(_plan(checkpoint, job, own, len(unseen), dtype, where, trust=trust_remote_code))
    identity = _identity(job, checkpoint, samples, dtype, where, runtime)
    with ArtifactWriter(out, identity=identity, overwrite=overwrite) as writer:
        opened = load_model(
            checkpoint.path,
            dtype=dtype,
            device=device,
            runtime=runtime,
            trust_remote_code=trust_remote_code,
        )
        opened.requires_grad_(False)
        say(f"{model}: {describe_runtime(opened)} on {device}")
        runner = Runner(opened, tokenizer=tokenizer)
        written = _Written(runner, writer, say, seq_len=seq_len, seed=job.seed)
        if job.regenerate:
            own = written("regenerated", own, temperature=job.temperature)
        unseen = written("held-out", unseen, temperature=0.0, most=_HELD_OUT_TOKENS, cut_loops=True)
        course = _Course(runner.target, job, own, unseen)
        if not (own and len(course.ranks())):
            writer.abandon()
            raise TextError(
                f"{', '.join(job.data)}: the target wrote too little of its own to "
                f"{'measure' if own else 'learn'} on",
                hint="give more data, or a larger --held-out",
            )
        if course.steps:
            say(f"{course.steps} steps, about {course.steps * course.step_seconds() / 60:.1f} min")
        training = Training(
            module=course.heads,
            optimizers=[_optimizer(course.heads, rate)],
            recipe=Recipe(steps=course.steps, warmup=job.warmup, final=learning.final,
                          every=max(1, course.steps // _LOOKS)),
            accumulate=course.accumulate,
            evaluate=course.evaluate,
            watch=lambda step, figures, look: watch(step, course.steps, figures, look),
            store=_Shards(writer),
        )  # fmt: skip
        start()
        history = training.run()
        # Measured as they are stored.
        stored = own_dtype(checkpoint.layout)
        course.heads.to(stored).float()
        ranks_RK = course.ranks()
        measured = course.figures(ranks_RK)
        paths = best_paths(ranks_RK, nodes=MOST_NODES, top=TOP)
        record = HeadsRecord(
            method=job.method,
            options=job.config.as_dict(),
            target={
                "fingerprint": identity["source"]["fingerprint"],
                "lineage": lineage(checkpoint),
                "hidden_size": runner.target.width,
                "vocab_size": runner.target.vocab_size,
                "tokenizer": tokenizer_digest(tokenizer),
            },
            accuracy=measured["accuracy"],
            tree=[list(path) for path, _ in paths],
            shares=[share for _, share in paths],
            training={
                **identity,
                "steps_done": course.steps,
                "places": len(ranks_RK),
                "looks": history.looks,
            },
        )
        tensors = {
            name: value.to(stored) if value.is_floating_point() else value
            for name, value in course.heads.state_dict().items()
        }
        metadata = {"method": job.method, "options": record.options, "target": record.target}
        writer.write_shard(HEADS_FILE, tensors, metadata, {})
        for shard in sorted(writer.manifest["shards"]):
            if shard != HEADS_FILE:
                writer.discard(shard)
        writer.finish({HEADS: record.as_bytes()})
    return Report(
        record=record,
        parameters=sum(parameter.numel() for parameter in course.heads.parameters()),
        steps=course.steps,
        seconds=time.monotonic() - began,
        tokens_per_forward=measured["score"],
        nodes=min(course.nodes, len(paths)),
        depth=max((len(path) for path, _ in paths[: course.nodes]), default=0),
        initial=history.looks[0],
    )


class _Course:
    """The heads with what they are taught and measured on."""

    def __init__(
        self, target: Target, job: Job, own: Sequence[Sample], unseen: Sequence[Sample]
    ) -> None:
        self.target = target
        self.samples = own
        drafter = resolve(job.method, "drafter")
        self.nodes: int = drafter.Config().nodes
        self.seed = job.seed
        size = drafter.Heads.num_guessed(job.config, target.vocab_size)
        token_map = None
        if size:
            said = [t for s in own for t, taught in zip(s.tokens, s.taught, strict=True) if taught]
            token_map = frequent(said, count=size, vocab=target.vocab_size).to(target.device)
        with self._chance("fresh"):
            fresh: Heads = drafter.Heads(job.config, target.model, token_map)
        self.heads = fresh.to(target.device).float()
        self.needs: Needs = self.heads.needs
        self.batches = _batches(own, job)
        self.steps = len(self.batches)
        self.held_out = [self._lesson(part) for part in _parts(unseen, _WRITTEN_TOGETHER)]

    def _lesson(self, samples: Sequence[Sample]) -> Lesson:
        tokens_BL, taught_BL = (part.to(self.target.device) for part in pad(samples))
        kept = TextCache(self.target.num_layers) if self.needs.inject else None
        features = self.target.read(tokens_BL, self.needs, keep=kept)
        beside = None if kept is None else functools.partial(self.target.read_beside, kept)
        return Lesson(tokens_BL=tokens_BL, taught_BL=taught_BL, features=features, beside=beside)

    def accumulate(self, step: int) -> Figures:
        """The gradient of one batch; `loss` is the mean over heads."""
        lesson = self._lesson([self.samples[i] for i in self.batches[step]])
        with self._chance(step):
            done = self.heads.teach(lesson)
        return {"loss": sum(done.means) / len(done.means), "losses": done.means}

    @contextmanager
    def _chance(self, what: str | int) -> Iterator[None]:
        """Random numbers by seed and step alone: a resumed run draws the same."""
        device = self.target.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(random.Random(f"{self.seed}/{what}").getrandbits(63))
            yield

    def ranks(self) -> Tensor:
        """Ranks [R, K] of the true tokens at all places of held-out text."""
        found = [self.heads.ranks(lesson) for lesson in self.held_out]
        return torch.cat(found) if found else torch.zeros(0, 0)

    def evaluate(self) -> Figures:
        """The figures of the heads as they are now."""
        return self.figures(self.ranks())

    def figures(self, ranks_RK: Tensor) -> Figures:
        """Held-out accuracies, and as `score` the tokens per forward that the best tree brings.

        `conditional[k]`: how often head k's first guess is right where those before it were.
        """
        right_RK = (ranks_RK == 0).double()
        reached_RK = right_RK.cumprod(-1)
        before_K = torch.cat([reached_RK.new_tensor([len(ranks_RK)]), reached_RK.sum(0)[:-1]])
        paths = best_paths(ranks_RK, nodes=MOST_NODES, top=TOP)
        return {
            "score": self.heads.expected(paths, self.nodes),
            "accuracy": right_RK.mean(0).tolist(),
            "conditional": (reached_RK.sum(0) / before_K.clamp(min=1)).tolist(),
        }

    def step_seconds(self) -> float:
        """The time of a step, by trying the first; its gradient is thrown away."""
        start = time.perf_counter()
        self.accumulate(0)
        self.heads.zero_grad(set_to_none=True)
        return time.perf_counter() - start


class _Written:
    """Texts by the target, a group at a time, each kept beside OUT until the run is whole."""

    def __init__(
        self, runner: Runner, writer: ArtifactWriter, say: Say, *, seq_len: int, seed: int
    ) -> None:
        self.runner, self.writer, self.say = runner, writer, say
        self.seq_len, self.seed = seq_len, seed

    def __call__(self, name: str, samples: Sequence[Sample], **how: Any) -> list[Sample]:
        found: list[Sample] = []
        began = said = time.monotonic()
        for number, group in enumerate(_parts(samples, _GROUP)):
            shard = f"{name}-{number:05d}.safetensors"
            if self.writer.report(shard) is None:
                made = regenerate(
                    self.runner,
                    group,
                    seq_len=self.seq_len,
                    seed=self.seed + number,
                    batch_size=_WRITTEN_TOGETHER,
                    **how,
                )
                self.writer.write_shard(shard, _as_tensors(made), {}, {})
            found += _as_samples(_read(self.writer.path(shard)))
            if number == 0 or time.monotonic() - said > 60:
                said = time.monotonic()
                done = min(len(samples), (number + 1) * _GROUP)
                left = (said - began) / done * (len(samples) - done)
                self.say(
                    f"{name} texts written by the target: {done}/{len(samples)}, {left:.0f} s left"
                )
        return found


def _optimizer(heads: Heads, rate: float) -> torch.optim.Optimizer:
    learning = heads.learning
    return torch.optim.AdamW(
        heads.parameters(), lr=rate, betas=learning.betas, weight_decay=learning.weight_decay
    )


def _as_tensors(samples: Sequence[Sample]) -> dict[str, Tensor]:
    return {
        "tokens": torch.tensor([token for s in samples for token in s.tokens], dtype=torch.long),
        "taught": torch.tensor([mark for s in samples for mark in s.taught], dtype=torch.bool),
        "lengths": torch.tensor([len(s.tokens) for s in samples], dtype=torch.long),
    }


def _as_samples(tensors: Mapping[str, Tensor]) -> list[Sample]:
    lengths = tensors["lengths"].tolist()
    return [
        Sample(tokens.tolist(), taught.tolist())
        for tokens, taught in zip(
            torch.split(tensors["tokens"], lengths),
            torch.split(tensors["taught"], lengths),
            strict=True,
        )
    ]


def _read(path: Path) -> dict[str, Tensor]:
    return {entry.name: read_tensor(entry) for entry in read_header(path)[1]}


def _parts(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]


def _plan(
    checkpoint: Checkpoint,
    job: Job,
    own: Sequence[Sample],
    held_out: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    trust: bool,
) -> Plan:
    """Raises: UnsupportedError: it does not fit; UsageError: more draft tokens than tokens."""
    layout = checkpoint.layout
    config = read_config(checkpoint.path, trust_remote_code=trust)
    skeleton: Any = build_meta(config, trust_remote_code=trust)
    # Refuses architectures that cannot be drafted for, before anything is written.
    Target(skeleton)
    kind: type[Heads] = resolve(job.method, "drafter").Heads
    output = skeleton.get_output_embeddings()
    size = kind.num_guessed(job.config, len(output.weight))
    if size > len(output.weight):
        raise UsageError(f"--draft-vocab {size}: the target has {len(output.weight)} tokens")
    with torch.device("meta"):
        token_map = torch.empty(size, dtype=torch.long) if size else None
        heads = kind(job.config, skeleton, token_map)
    parameters = sum(parameter.numel() for parameter in heads.parameters())
    # A packed target counts as what it is when unpacked.
    memory_bytes = dtype.itemsize * sum(p.numel() for p in skeleton.parameters())
    # Weights, two copies of the best, gradient and AdamW's two moments in float32.
    memory_bytes += 24 * parameters
    if heads.own_output(0) is None:
        memory_bytes += 4 * output.weight.shape[1] * (size or len(output.weight))
    free = available_memory(device)
    if memory_bytes > free:
        raise UnsupportedError(
            f"training {parameters / 1e6:.0f} M parameters beside the target takes "
            f"{memory_bytes / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            hint="--draft-vocab or --shared-head make the heads smaller",
        )
    return Plan(
        parameters=parameters,
        file_bytes=parameters * own_dtype(layout).itemsize,
        memory_bytes=memory_bytes,
        samples=len(own),
        taught_tokens=sum(sum(sample.taught) for sample in own),
        held_out=held_out,
        steps=len(_batches(own, job)),
    )


def _batches(samples: Sequence[Sample], job: Job) -> list[list[int]]:
    return batches(
        samples,
        batch_tokens=job.batch_tokens,
        steps=job.steps,
        epochs=job.epochs,
        seed=job.seed,
    )


def _identity(
    job: Job,
    checkpoint: Checkpoint,
    samples: Sequence[Sample],
    dtype: torch.dtype,
    device: torch.device,
    runtime: str,
) -> dict[str, Any]:
    """All that decides the bytes: what is asked, what it is asked of, and how it is computed."""
    asked = {
        key: value
        for key, value in asdict(job).items()
        if key not in ("config", "data", "text_field", "template")
    }
    return {
        **asked,
        "options": job.config.as_dict(),
        "data": text_fingerprint([[sample.tokens, sample.taught] for sample in samples]),
        "source": {"fingerprint": checkpoint.fingerprint(), "revision": checkpoint.revision},
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.type,
        "runtime": runtime,
        # Sums are split among threads, and training carries their last bits on.
        "threads": torch.get_num_threads(),
        "versions": {
            "spectool": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
