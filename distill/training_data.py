"""All that a training of heads needs of the target, made from a job's texts before it begins.

The target writes what is to be written anew, and the text to measure on. Then it stays and reads
the texts whenever they are taught (`--features online`), or reads them once and goes: its features
are stored beside OUT until the training is done (`hybrid`), or in a directory of their own that
later trainings take them from, without the target's layers ever being loaded (`offline:DIR`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from spectool.checkpoint.artifact import ArtifactWriter
from spectool.data.text import check_ids
from spectool.decode.generate import Runner
from spectool.decode.heads.base import Heads
from spectool.decode.heads.convert import PretrainedHeads
from spectool.decode.protocol import Needs
from spectool.decode.target import Target
from spectool.distill.data.features import (
    Read,
    Stored,
    Texts,
    check_store,
    finish_store,
    names_of,
    open_store,
    store,
)
from spectool.distill.data.regenerate import regenerate
from spectool.distill.data.samples import SHORTEST, Sample
from spectool.distill.data.server import Server, rewrite
from spectool.distill.data.texts import Say, Written
from spectool.distill.plan import Job, Setup
from spectool.distill.processes import Processes
from spectool.errors import TextError
from spectool.methods import resolve
from spectool.model.loading import describe_runtime, load_model, load_outside, unused_of

# Texts that the target writes together.
WRITTEN_TOGETHER = 8
# Tokens that the target writes after each held-out beginning.
_HELD_OUT_TOKENS = 128


@dataclass(frozen=True, slots=True)
class TrainingData:
    """What is taught and measured on. `target` lacks its layers where nothing reads with them."""

    target: Target
    own: Texts
    unseen: Texts


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPreparation:
    """The job, where it runs, the texts as they were given, and the features that are asked for.

    `key` is what decides the features of a store, `identity` what decides the bytes of OUT.
    `server` writes the texts to learn from, where there is one; `init_from` is what heads go on
    from.
    `overwrite`: an unfinished store of something else gives way; a whole one never does.
    """

    job: Job
    setup: Setup
    own: Sequence[Sample]
    unseen: Sequence[Sample]
    needs: Needs
    identity: dict[str, Any]
    server: Server | None
    init_from: PretrainedHeads | None
    overwrite: bool
    processes: Processes
    say: Say

    @property
    def key(self) -> dict[str, Any]:
        names = ("data", "seq_len", "seed", "held_out", "regenerate", "temperature", "dtype",
                 "regenerate_model")  # fmt: skip
        return {
            **{name: self.identity[name] for name in names},
            "target": self.identity["source"]["fingerprint"],
            "tokenizer": self.setup.tokenizer_digest,
        }

    def check(self) -> None:
        """Raises: UsageError: what lies in the place of a store is not one for this job."""
        if self.job.store is not None:
            check_store(self.job.store, self.key, self.needs)

    def stored(self) -> tuple[Stored, Stored] | None:
        """The texts of an offline store that is whole. Raises: see `open_store`."""
        if self.job.store is None:
            return None
        return open_store(self.job.store, self.key, self.needs, self.setup.device)

    def training_data(self, writer: ArtifactWriter | None) -> TrainingData:
        """Make it, and keep beside OUT or in the store what took time.

        The first process alone has a writer.

        Raises:
            InputError: the store is another's, or its place cannot be written.
            TextError: the target wrote too little.
        """
        with self.processes.together():
            found = self.stored()
            if found is not None:
                self.say(f"features of {len(found[0].samples)} texts from {self.job.store}")
                kind: type[Heads] = resolve(self.job.method, "drafter").Heads
                target = Target(self._load()) if kind.begins_as_layers else self._outside()
                return TrainingData(target, *found)
        with contextlib.ExitStack() as stack:
            keeping = writer
            with self.processes.together():
                if writer is not None and self.job.store is not None:
                    keeping = stack.enter_context(self._unfinished(self.job.store))
            made = self._make(keeping, writer)
            if self.job.store is None:
                return made
            with self.processes.together():
                if keeping is not None:
                    finish_store(keeping, self.key, self.needs)
        with self.processes.together():
            found = self.stored()
        assert found is not None
        return TrainingData(made.target, *found)

    def _unfinished(self, place: Path) -> ArtifactWriter:
        names = ("batch_tokens", "device", "runtime", "threads", "versions")
        identity = self.key | {name: self.identity[name] for name in names}
        identity["features"] = names_of(self.needs)
        return ArtifactWriter(place, identity=identity, overwrite=self.overwrite)

    def _load(self) -> PreTrainedModel:
        setup = self.setup
        model = load_model(
            setup.checkpoint.path,
            dtype=setup.dtype,
            device=str(setup.device),
            runtime=setup.runtime,
            trust_remote_code=setup.trust_remote_code,
            checksums=setup.checksums,
        )
        model.requires_grad_(False)
        self.say(f"{setup.name}: {describe_runtime(model)} on {setup.device}")
        for note in setup.checkpoint.layout.notes:
            self.say(note)
        if unused := unused_of(model, setup.checkpoint.layout):
            self.say(f"{setup.name}: {unused}")
        return model

    def _make(self, keeping: ArtifactWriter | None, out: ArtifactWriter | None) -> TrainingData:
        job, setup = self.job, self.setup
        with self.processes.together():
            model = self._load()
            runner = Runner(model, tokenizer=setup.tokenizer)
            runner.target.check(self.needs)
        written = Written(keeping, self.processes, self.say)
        # Always by the target itself, greedily, without loops: what the heads will have to draft.
        unseen = written(
            "held-out",
            self.unseen,
            lambda group, number: regenerate(
                runner,
                group,
                seq_len=setup.seq_len,
                seed=job.seed + number,
                temperature=0.0,
                batch_size=WRITTEN_TOGETHER,
                most=_HELD_OUT_TOKENS,
                cut_loops=True,
            ),
        )
        own = self.own
        # Not before it is known that heads can be measured: this may take long.
        if job.regenerate and unseen:
            own = written("regenerated", own, functools.partial(self._write, runner))
        if not (own and unseen):
            for each in {keeping, out}:
                if each is not None:
                    each.abandon()
            raise TextError(
                f"{', '.join(job.data)}: the target wrote too little of its own to "
                f"{'learn' if unseen else 'measure'} on: each of its texts ends"
                f"{'' if unseen else ' or repeats itself'} within {SHORTEST} tokens",
                hint=f"give more data{'' if unseen else ', or a larger --held-out'}",
            )
        target = runner.target
        if job.features == "online":
            return TrainingData(
                target, Read(target, self.needs, own), Read(target, self.needs, unseen)
            )
        stored = [
            store(
                keeping,
                self.processes,
                name,
                target,
                self.needs,
                samples,
                pass_tokens=job.batch_tokens,
                say=self.say,
            )
            for name, samples in (("own", own), ("held-out", unseen))
        ]
        return TrainingData(target, *stored)

    def _write(self, runner: Runner, group: Sequence[Sample], number: int) -> list[Sample]:
        """Texts to learn from, written by the target or by a server."""
        job, seq_len = self.job, self.setup.seq_len
        if self.server is not None:
            found = rewrite(
                self.server,
                group,
                self.setup.tokenizer,
                seq_len=seq_len,
                temperature=job.temperature,
                seed=f"{job.seed}/{number}",
                template=job.template or None,
            )
            for sample in found:
                check_ids(
                    sample.tokens, runner.target.num_tokens, f"{self.setup.name}: its tokenizer"
                )
            return found
        return regenerate(
            runner,
            group,
            seq_len=seq_len,
            temperature=job.temperature,
            seed=job.seed + number,
            batch_size=WRITTEN_TOGETHER,
        )

    def _outside(self) -> Target:
        setup = self.setup
        return Target(
            load_outside(
                setup.checkpoint,
                dtype=setup.dtype,
                device=setup.device,
                trust_remote_code=setup.trust_remote_code,
            )
        )
