"""Quantization of a checkpoint: from a job to an artifact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from spectool.checkpoint import artifact
from spectool.checkpoint.artifact import ArtifactWriter
from spectool.checkpoint.dense import check_dense, read_companions
from spectool.checkpoint.dtypes import with_plain_dtypes
from spectool.checkpoint.formats import FORMAT_VERSION
from spectool.checkpoint.headers import PACKED_INDEX, Layout, read_header
from spectool.checkpoint.tensors import Checkpoint, open_checkpoint, text_fingerprint, torch_dtype
from spectool.data.template import encode
from spectool.data.text import builtin_text, check_ids, read_text
from spectool.distill.objectives.base import training_bytes
from spectool.errors import UsageError
from spectool.machine import reproducible
from spectool.methods import resolve
from spectool.model.architecture import Architecture
from spectool.model.blocks import check_walkable
from spectool.model.loading import load_tokenizer, stated_dtype
from spectool.options import Config
from spectool.quantize.base import Quantizer
from spectool.quantize.budget import Budget, choose, discard_survey, list_candidates, survey
from spectool.quantize.calibration import sample_sequences
from spectool.quantize.fitting import BlockQuantizer
from spectool.quantize.ledger import Ledger, measure
from spectool.quantize.plan import BASE_BYTES, QuantizePlan, make_plan
from spectool.quantize.preprocess import (
    HELD_OUT,
    MOST_HELD_OUT,
    Preprocess,
    Reshaping,
    TrainingWindows,
)
from spectool.quantize.rules import Rule, format_rules, skipping
from spectool.quantize.walk import BlockWalk, make_entry
from spectool.report import SILENT, Reporter, ShortCalibration
from spectool.version import __version__

# File in the artifact with the rules that it was made by.
RULES_FILE = "plan.yaml"

# Characters read of a streamed data set per calibration token. English prose has about four per
# token; the surplus lets sequences be drawn from different parts.
STREAMED_CHARACTERS = 16

# Peak bytes per character while tokenizing (measured with BPE of 1k and 6k tokens: 154 to 158).
TOKENIZED_BYTES = 160

# Suffixes of compressed texts, and the approximate compression ratio of English prose.
COMPRESSED, COMPRESSION = (".gz", ".xz", ".parquet"), 4


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeJob:
    """All options of a quantization except where it runs.

    `method` and `config` pack the blocks' matrices that neither `skip` nor a rule names; with a
    `budget` its candidates do, chosen by measured errors. `embeddings` packs the embedding and the
    lm_head, which otherwise stay dense; `lm_head` is the method of a fitted lm_head.
    """

    method: str
    config: Config
    rules: Sequence[Rule] = ()
    embeddings: Quantizer | None = None
    lm_head: Quantizer | None = None
    budget: Budget | None = None
    calibration: Sequence[str] | None = None
    samples: int = 128
    seq_len: int = 2048
    text_field: str | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    skip: Sequence[str] = ()
    allow_dense: bool = False
    seed: int = 0
    preprocess: Preprocess | None = None

    @property
    def quantizer(self) -> Quantizer:
        """The default method with its options."""
        kind: type[Quantizer] = resolve(self.method, "quantizer")
        return kind(self.config)


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """Records of a quantization.

    `blocks`: layers, output error, fits and matrices packed without data, by block; `outside`: the
    same of embedding and lm_head. `preprocess`: held-out perplexities `packed` and `merged`.
    """

    outside: dict[str, Any]
    blocks: list[dict[str, Any]]
    preprocess: dict[str, float] | None = None

    @property
    def layers(self) -> list[dict[str, Any]]:
        """Records of all packed matrices, outside the blocks first."""
        return [layer for part in (self.outside, *self.blocks) for layer in part["layers"]]


def prepare(
    checkpoint: Checkpoint, job: QuantizeJob, *, device: str, batch_size: int = 4
) -> QuantizePlan:
    """Return the plan of a job; for a budget that of its first candidate.

    Reads headers only, except the values of tied matrices that are both stored.

    Raises:
        UsageError: a rule matches nothing, or no candidate fits the budget.
        UnsupportedError: the source is quantized already, or cannot be packed.
    """
    check_dense(checkpoint)
    if job.preprocess is not None:
        for quantizer in _list_quantizers(job):
            if quantizer.rounds_inputs:
                raise UsageError(f"--preprocess trains weights; {quantizer.name} rounds inputs too")
    architecture = Architecture(checkpoint)
    plan = _plan(architecture, job, device=device, batch_size=batch_size)
    if job.budget is not None:
        list_candidates(plan, job.budget, job.rules)
    return plan


def _plan(
    architecture: Architecture, job: QuantizeJob, *, device: str, batch_size: int
) -> QuantizePlan:
    """Make the plan of a job, with the memory of tokenizing and of preprocessing."""
    length = sequence_length(architecture, job.seq_len)
    plan = make_plan(
        architecture,
        job.quantizer if job.budget is None else job.budget.candidates[0],
        rules=[*skipping(job.skip), *job.rules],
        embeddings=job.embeddings,
        lm_head=job.lm_head,
        allow_dense=job.allow_dense,
        calibration_tokens=job.samples * length if calibrates(job) else 0,
        sequence_tokens=length,
        batch_tokens=batch_size * length,
        on_device=device != "cpu",
    )
    # Peaks before the block walk: tokenizing, and training the whole model for --preprocess.
    characters = _count_characters(job.calibration or ())
    if calibrates(job) and not job.calibration:
        characters = len(builtin_text())
    host, on_device = TOKENIZED_BYTES * characters, 0
    if job.preprocess is not None:
        host = max(host, TOKENIZED_BYTES * _count_characters(job.preprocess.text))
        training = training_bytes(architecture, job.preprocess.batch_size * length)
        # After training on a device the merged matrices are copied to the host.
        host = max(host, 4 * plan.num_weights if plan.device_bytes else training)
        on_device = BASE_BYTES + training
    return replace(
        plan,
        host_bytes=max(plan.host_bytes, BASE_BYTES + host),
        device_bytes=plan.device_bytes and max(plan.device_bytes, on_device),
    )


def _count_characters(sources: Sequence[str]) -> int:
    """Estimate the characters in the files among `sources`; streamed data sets are negligible."""
    files = [path for path in map(Path, sources) if path.is_file()]
    return sum(
        path.stat().st_size * (COMPRESSION if path.suffix in COMPRESSED else 1) for path in files
    )


def quantize(
    checkpoint: Checkpoint,
    out: Path,
    job: QuantizeJob,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_size: int = 4,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> QuantizeReport:
    """Quantize a checkpoint into the directory `out`.

    Calibration computes in `dtype`; weights are always packed from float32.

    Raises:
        InputError: the checkpoint, the text, the options or `out` cannot be used.
        SpectoolError: the disk is full; the same call resumes.
    """
    artifact.check_target(out, overwrite=overwrite)
    artifact.check_paths(checkpoint.path, out)
    plan = prepare(checkpoint, job, device=device, batch_size=batch_size)
    architecture = plan.architecture
    if job.budget is None:
        reporter.plan(plan)
    ids_SL, opened, shell = None, False, None
    if calibrates(job):
        ids_SL, opened = _calibration_ids(checkpoint, architecture, job, reporter)
        shell = check_walkable(
            architecture,
            checkpoint,
            length=ids_SL.shape[1],
            dtype=dtype,
            device=torch.device(device),
            with_lm_head=job.lm_head is not None,
        )
        if job.lm_head is not None or job.preprocess is not None:
            # This shell holds the lm_head, which the block walk does not need in memory, or the
            # weights before preprocessing. The walk creates its own.
            shell = None
        if len(ids_SL) < job.samples:
            reporter.event(ShortCalibration(len(ids_SL), job.samples))
    # Where activations matter, the stored bytes depend on how they are computed.
    computed: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "batch_size": batch_size,
    }
    quantizers = _list_quantizers(job)
    if any(each is not None for each in (job.preprocess, job.budget, job.lm_head)) or any(
        isinstance(each, BlockQuantizer) or "hessian" in each.statistics for each in quantizers
    ):
        # Sums are split among threads, and their last bits can change codes.
        computed["threads"] = torch.get_num_threads()
    made_by = {**_record_options(job, ids_SL, computed), "device": torch.device(device).type}
    source = {"fingerprint": checkpoint.fingerprint(), "revision": checkpoint.revision}
    metrics, reshape = None, None
    if job.preprocess is not None:
        windows = _windows(checkpoint, architecture, job, reporter)
        made_by["preprocess"] = {**asdict(job.preprocess), **computed, **windows.record}
        reshape = Reshaping(
            options=job.preprocess,
            windows=windows,
            scratch=out.with_name(out.name + ".preprocess"),
            identity={"source": source, **made_by},
            checkpoint=checkpoint,
            architecture=architecture,
            plan=plan,
            device=torch.device(device),
            seed=job.seed,
            reporter=reporter,
        )
        reshape.check(overwrite=overwrite)
    identity = {"source": source, **made_by}
    with (
        reproducible(torch.device(device)),
        ArtifactWriter(out, identity=identity, overwrite=overwrite) as writer,
    ):
        reshaped = checkpoint
        if reshape is not None:
            merged, metrics = reshape.run(
                lambda path: quantize(
                    checkpoint,
                    path,
                    replace(job, preprocess=None),
                    device=device,
                    dtype=dtype,
                    batch_size=batch_size,
                    reporter=_Progress(reporter),
                )
            )
            trusted = checkpoint.trust_remote_code
            reshaped = open_checkpoint(merged, trust_remote_code=trusted)
            architecture = Architecture(reshaped)
        walk = BlockWalk(
            checkpoint=reshaped,
            architecture=architecture,
            plan=plan,
            seed=job.seed,
            writer=writer,
            metadata=identity,
            ids_SL=ids_SL,
            device=torch.device(device),
            dtype=dtype,
            batch_size=batch_size,
            opened=opened,
            shell=shell,
            reporter=reporter,
        )
        if job.budget is not None:
            candidates = list_candidates(plan, job.budget, job.rules)
            chosen = choose(plan, job.budget, candidates, survey(walk, candidates))
            job = replace(job, budget=None, rules=(*job.rules, *chosen))
            walk.plan = plan = _plan(architecture, job, device=device, batch_size=batch_size)
            reporter.plan(plan)
        report = QuantizeReport(*walk.run(), metrics)
        discard_survey(walk)
        writer.finish(
            _make_small_files(
                checkpoint,
                plan,
                job,
                writer,
                source,
                made_by,
                untied=architecture.untied,
            )
        )
    if reshape is not None:
        shutil.rmtree(reshape.scratch)
    return report


class _Progress(Reporter):
    """Reporter that passes on the progress alone, of a run inside another."""

    def __init__(self, outer: Reporter) -> None:
        self._outer = outer

    def progress(self, done: float, total: int, what: str) -> None:
        self._outer.progress(done, total, what)


def _list_quantizers(job: QuantizeJob) -> list[Quantizer]:
    """List every quantizer that the job may pack a matrix by."""
    ruled = [rule.quantizer for rule in job.rules]
    budgeted = job.budget.candidates if job.budget else (job.quantizer,)
    return [quantizer for quantizer in (*budgeted, job.embeddings, *ruled) if quantizer is not None]


def calibrates(job: QuantizeJob) -> bool:
    """Return whether the job runs calibration text through the model.

    Methods without statistics and without a fit need none; given text is used all the same, for
    the output errors.
    """
    needing_text = (job.calibration, job.budget, job.lm_head)
    return any(each is not None for each in needing_text) or any(
        quantizer.calibrates for quantizer in _list_quantizers(job)
    )


def sequence_length(architecture: Architecture, seq_len: int) -> int:
    """Return the tokens of a calibration sequence: `seq_len`, at most the model's context."""
    return min(seq_len, architecture.layout.context or seq_len)


def _calibration_ids(
    checkpoint: Checkpoint,
    architecture: Architecture,
    job: QuantizeJob,
    reporter: Reporter,
) -> tuple[Tensor, bool]:
    """Read the calibration sequences [S, L]; also return whether each opens with a start token."""
    ids, bos = _read_tokens(
        checkpoint, architecture, job, job.calibration or (), job.samples, reporter
    )
    generator = torch.Generator().manual_seed(job.seed)
    length = sequence_length(architecture, job.seq_len)
    ids_SL = sample_sequences(ids, samples=job.samples, length=length, bos=bos, generator=generator)
    return ids_SL, bos is not None


def _windows(
    checkpoint: Checkpoint,
    architecture: Architecture,
    job: QuantizeJob,
    reporter: Reporter,
) -> TrainingWindows:
    """Read the sequences of preprocessing, held-out ones from the end of the text.

    The two kinds share no token.
    """
    options = job.preprocess
    assert options is not None
    num_train = options.steps * options.batch_size
    ids, bos = _read_tokens(checkpoint, architecture, job, options.text, num_train, reporter)
    generator = torch.Generator().manual_seed(job.seed)
    length = sequence_length(architecture, job.seq_len)
    cut = int((1 - HELD_OUT) * len(ids))
    train_SL, held_out_SL = (
        sample_sequences(
            part,
            samples=samples,
            length=length,
            bos=bos,
            generator=generator,
            option="--preprocess",
        )
        for part, samples in ((ids[:cut], num_train), (ids[cut:], MOST_HELD_OUT))
    )
    return TrainingWindows(train_SL, held_out_SL)


def _read_tokens(
    checkpoint: Checkpoint,
    architecture: Architecture,
    job: QuantizeJob,
    sources: Sequence[str],
    samples: int,
    reporter: Reporter,
) -> tuple[list[int], int | None]:
    """Read and tokenize text for `samples` sequences; return token ids and the start token."""
    tokenizer = load_tokenizer(checkpoint)
    text = read_text(
        sources,
        tokenizer,
        field=job.text_field,
        template=job.template or None,
        max_characters=STREAMED_CHARACTERS
        * (samples + 1)
        * sequence_length(architecture, job.seq_len),
        reporter=reporter,
    )
    ids, bos = encode(tokenizer, text), tokenizer.bos_token_id
    table: Any = architecture.model.get_input_embeddings()
    start = [] if bos is None else [bos]
    check_ids([*ids, *start], table.num_embeddings, f"{checkpoint.path}: its tokenizer")
    return ids, bos


def _record_options(
    job: QuantizeJob, ids_SL: Tensor | None, computed: dict[str, Any]
) -> dict[str, Any]:
    """Return the job as JSON-safe metadata, with the calibration data and the versions used."""
    calibration = None
    if ids_SL is not None:
        calibration = {
            "fingerprint": text_fingerprint(ids_SL.tolist()),
            "builtin": not job.calibration,
            "samples": len(ids_SL),
            "seq_len": ids_SL.shape[1],
            **computed,
        }
    return {
        "method": job.method,
        "options": job.config.as_dict(),
        "rules": [rule.as_dict() for rule in job.rules],
        "embeddings": None if job.embeddings is None else job.embeddings.as_dict(),
        "lm_head": None if job.lm_head is None else job.lm_head.as_dict(),
        "budget": None if job.budget is None else job.budget.as_dict(),
        "skip": sorted(job.skip),
        "allow_dense": job.allow_dense,
        "seed": job.seed,
        "calibration": calibration,
        "format_version": FORMAT_VERSION,
        "versions": {
            "spectool": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _make_small_files(
    checkpoint: Checkpoint,
    plan: QuantizePlan,
    job: QuantizeJob,
    writer: ArtifactWriter,
    source: dict[str, Any],
    made_by: dict[str, Any],
    *,
    untied: bool,
) -> dict[str, bytes]:
    """Make all files except the shards: configuration, index, tokenizer, licence, README.

    `untied`: the source stores separately what its configuration declares tied.
    """
    files = read_companions(checkpoint)
    shards = sorted(writer.manifest["shards"])
    tensors = {}
    for shard in shards:
        tensors.update({entry.name: entry for entry in read_header(writer.path(shard))[1]})
    modules = {
        key: make_entry(plan.quantizers[key], matrix)
        for part in (plan.outside, *plan.matrices.values())
        for key, matrix in part.items()
    }
    if job.rules:
        files[RULES_FILE] = format_rules(job.rules).encode()
    quantization = {
        "quant_method": "spectool",
        "format_version": FORMAT_VERSION,
        "source": source,
        "modules": modules,
        "made_by": made_by,
    }
    plain = with_plain_dtypes(checkpoint.layout.config, checkpoint.path)
    config = {**plain, "quantization_config": quantization}
    # The source's weight files, which the artifact does not have.
    config.pop("transformers_weights", None)
    if untied:
        config["tie_word_embeddings"] = False
    if stated_dtype(checkpoint.layout) is None:
        # Without it transformers takes the dtype of the first tensor, which may be a field.
        dtypes = map(torch_dtype, checkpoint.layout.tensors.values())
        first = next(dtype for dtype in dtypes if dtype.is_floating_point)
        config["dtype"] = str(first).removeprefix("torch.")
    layout = Layout(path=writer.partial, config=config, tensors=tensors, metadata={})
    files["config.json"] = _json(config)
    files["README.md"] = _readme(job, measure(layout)).encode()
    index = {
        "metadata": {
            "total_parameters": plan.num_parameters,
            "total_size": layout.num_bytes,
            "files": sorted([*shards, *files, PACKED_INDEX]),
            "checksums": writer.checksums(),
        },
        "weight_map": {name: entry.path.name for name, entry in tensors.items()},
    }
    files[PACKED_INDEX] = _json(index)
    return files


def _json(value: Any) -> bytes:
    """Encode a JSON file."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def _readme(job: QuantizeJob, ledger: Ledger) -> str:
    """Write the artifact's README."""
    options = json.dumps(job.config.as_dict(), sort_keys=True)
    more = [
        f"{matrices} by `{quantizer}`"
        for matrices, quantizer in (
            ("embedding and lm_head", job.embeddings),
            ("lm_head", job.lm_head),
        )
        if quantizer is not None
    ]
    more += [f"matrices named in `{RULES_FILE}` by its rules"] if job.rules else []
    return f"""# A checkpoint packed by spectool

Method `{job.method}` with {options}{"".join(f"; {each}" for each in more)}.

| | bits |
|---|---:|
| per weight of the {len(ledger.entries)} packed matrices | {ledger.linears:.4f} |
| per parameter of all weight files | {ledger.file:.4f} |

```python
import spectool

model = spectool.load("PATH")
```

or, with `import spectool` before it, `AutoModelForCausalLM.from_pretrained("PATH")`. On the command
line: `spectool generate PATH`, `spectool eval PATH`, `spectool inspect PATH`.
"""
