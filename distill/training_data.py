"""Training data of draft heads: texts and the target's features, prepared before training.

The target generates the evaluation text and, with --regenerate, the training text. Its features are
then computed at every step (`--features online`), computed once and stored next to OUT until the
training is done (`hybrid`), or stored in a directory of their own, which later runs read without
loading the target's layers (`offline:DIR`).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel

from spectool.checkpoint.artifact import ArtifactWriter
from spectool.data.text import check_ids
from spectool.decode.generate import Runner
from spectool.decode.heads.base import Heads
from spectool.decode.heads.formats.base import PretrainedHeads
from spectool.decode.protocol import Needs
from spectool.decode.target.attention import AttentionTarget
from spectool.distill.data.features import (
    FEATURES,
    OnlineTexts,
    StoredTexts,
    Texts,
    check_store,
    feature_names,
    open_store,
    store,
)
from spectool.distill.data.regenerate import regenerate
from spectool.distill.data.samples import SHORTEST, Sample
from spectool.distill.data.server import Server, rewrite
from spectool.distill.data.store import finish_store
from spectool.distill.data.texts import GroupWriter, as_samples, as_tensors
from spectool.distill.plan import HeadsJob, HeadsPlan, Setup
from spectool.distill.processes import Processes
from spectool.distill.teacher import check_features
from spectool.errors import TextError
from spectool.methods import import_method
from spectool.model.loading import load_model, load_without_blocks
from spectool.report import FeaturesFound, Reporter

# Number of texts that the target generates together.
GENERATED_TOGETHER = 8
# Maximum number of tokens that the target generates after each held-out prompt.
_HELD_OUT_TOKENS = 128


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Target, training texts and held-out texts. Without need of them, `target` has no layers."""

    target: AttentionTarget
    train: Texts
    held_out: Texts


@dataclass(frozen=True, slots=True, kw_only=True)
class DataPreparation:
    """Preparation of training data: the job, its target, the texts as given, the features needed.

    `key` decides the features in a store, `identity` the bytes of OUT. `server` generates the
    training texts, if one is used; `init_from` are the heads to start from. `overwrite`: replace an
    unfinished store of another run; a finished store is never replaced.
    """

    job: HeadsJob
    setup: Setup
    plan: HeadsPlan
    train: Sequence[Sample]
    held_out: Sequence[Sample]
    needs: Needs
    identity: dict[str, Any]
    server: Server | None
    init_from: PretrainedHeads | None
    overwrite: bool
    processes: Processes
    reporter: Reporter

    @property
    def key(self) -> dict[str, Any]:
        """Return everything that decides the features of a store."""
        names = ("data", "seq_len", "seed", "held_out", "regenerate", "temperature", "dtype",
                 "regenerate_model")  # fmt: skip
        return {
            **{name: self.identity[name] for name in names},
            "target": self.identity["source"]["fingerprint"],
            "tokenizer": self.setup.tokenizer_digest,
        }

    def check(self) -> None:
        """Check that the offline store, if it exists, is for this job.

        Raises:
            UsageError: it is not.
        """
        if self.job.store is not None:
            check_store(self.job.store, self.key, self.needs)

    def stored(self) -> tuple[StoredTexts, StoredTexts] | None:
        """Open the training and held-out texts of a finished offline store, if there is one.

        Raises: see `open_store`.
        """
        if self.job.store is None:
            return None
        return open_store(self.job.store, self.key, self.needs, self.setup.device)

    def training_data(self, writer: ArtifactWriter | None) -> TrainingData:
        """Prepare the training data; generated texts and features are kept for a resumed run.

        Only the first process has a `writer`.

        Raises:
            InputError: the store is of another job, or cannot be written.
            TextError: the target generated too little text.
        """
        with self.processes.together():
            stored = self.stored()
            if stored is not None:
                found = FeaturesFound(len(stored[0].samples), str(self.job.store))
                self.reporter.event(found)
                kind: type[Heads] = import_method(self.job.method, "drafter").Heads
                target = (
                    AttentionTarget(self._load()) if kind.begins_as_layers else self._load_shell()
                )
                return TrainingData(target, *stored)
        with contextlib.ExitStack() as stack:
            store_writer = writer
            with self.processes.together():
                if writer is not None and self.job.store is not None:
                    store_writer = stack.enter_context(self._open_writer(self.job.store))
            made = self._make(store_writer, writer)
            if self.job.store is None:
                return made
            with self.processes.together():
                if store_writer is not None:
                    names = feature_names(self.needs)
                    finish_store(store_writer, FEATURES, self.key, "features-", features=names)
        with self.processes.together():
            stored = self.stored()
        assert stored is not None
        return TrainingData(made.target, *stored)

    def _open_writer(self, path: Path) -> ArtifactWriter:
        """Open the writer of an offline store, new or unfinished."""
        names = ("batch_tokens", "device", "runtime", "activations", "threads", "versions")
        identity = self.key | {name: self.identity[name] for name in names}
        identity["features"] = feature_names(self.needs)
        return ArtifactWriter(path, identity=identity, overwrite=self.overwrite)

    def _load(self) -> PreTrainedModel:
        """Load the whole target and report how it runs."""
        setup = self.setup
        model = load_model(
            setup.checkpoint,
            dtype=setup.dtype,
            device=str(setup.device),
            runtime=setup.runtime,
            activations=setup.activations,
            reporter=self.reporter,
        )
        model.requires_grad_(False)
        return model

    def _make(
        self, store_writer: ArtifactWriter | None, out_writer: ArtifactWriter | None
    ) -> TrainingData:
        """Generate the texts and compute or store the features.

        Raises:
            TextError: the target generated too little text.
        """
        job, setup = self.job, self.setup
        with self.processes.together():
            model = self._load()
            runner = Runner(model, tokenizer=setup.tokenizer)
            # `make_plan` refused targets with a recurrent state.
            target = cast(AttentionTarget, runner.target)
            check_features(target, self.needs)
        generate = GroupWriter(store_writer, self.processes, self.reporter, as_tensors, as_samples)
        # Evaluation text is always the target's own greedy output without loops, since that is what
        # the heads will draft.
        held_out = generate(
            "held-out",
            self.held_out,
            lambda group, number: regenerate(
                runner,
                group,
                seq_len=setup.seq_len,
                seed=job.seed + number,
                temperature=0.0,
                batch_size=GENERATED_TOGETHER,
                most=_HELD_OUT_TOKENS,
                cut_loops=True,
            ),
        )
        train = self.train
        # After the evaluation text: regeneration may take long, and needs heads to be measurable.
        if job.regenerate and held_out:
            train = generate("regenerated", train, functools.partial(self._regenerate, runner))
        if not (train and held_out):
            for each in {store_writer, out_writer}:
                if each is not None:
                    each.delete()
            raise TextError(
                f"{', '.join(job.data)}: the target generated too little text to "
                f"{'train' if held_out else 'evaluate'} on: each of its texts ends"
                f"{'' if held_out else ' or repeats itself'} within {SHORTEST} tokens",
                hint=f"give more data{'' if held_out else ', or a larger --held-out'}",
            )
        if job.features == "online":
            return TrainingData(
                target,
                OnlineTexts(target, self.needs, train),
                OnlineTexts(target, self.needs, held_out),
            )
        # The name "own" is part of the shards' file names.
        stored = [
            store(
                store_writer,
                self.processes,
                name,
                target,
                self.needs,
                samples,
                pass_tokens=job.batch_tokens,
                reporter=self.reporter,
            )
            for name, samples in (("own", train), ("held-out", held_out))
        ]
        return TrainingData(target, *stored)

    def _regenerate(self, runner: Runner, group: Sequence[Sample], number: int) -> list[Sample]:
        """Generate the training texts of a group anew, by the target or by a server."""
        job, seq_len = self.job, self.setup.seq_len
        if self.server is not None:
            rewritten = rewrite(
                self.server,
                group,
                self.setup.tokenizer,
                seq_len=seq_len,
                temperature=job.temperature,
                seed=f"{job.seed}/{number}",
                template=job.template or None,
            )
            for sample in rewritten:
                origin = f"{self.setup.checkpoint.name}: its tokenizer"
                check_ids(sample.tokens, runner.target.num_tokens, origin)
            return rewritten
        return regenerate(
            runner,
            group,
            seq_len=seq_len,
            temperature=job.temperature,
            seed=job.seed + number,
            batch_size=GENERATED_TOGETHER,
        )

    def _load_shell(self) -> AttentionTarget:
        """Load the target without its layers."""
        setup = self.setup
        return AttentionTarget(
            load_without_blocks(setup.checkpoint, dtype=setup.dtype, device=setup.device)
        )
