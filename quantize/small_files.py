"""Files of a packed checkpoint beside its shards."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spectool.checkpoint.artifact import ArtifactWriter
from spectool.checkpoint.card import README, Card, describe_options, read_origin
from spectool.checkpoint.dtypes import with_plain_dtypes
from spectool.checkpoint.formats import FORMAT_VERSION
from spectool.checkpoint.headers import PACKED_INDEX, Layout, read_header
from spectool.checkpoint.hub import is_local
from spectool.checkpoint.tensors import Checkpoint, torch_dtype
from spectool.checkpoint.trained import TRAINED_NOTE, read_companions
from spectool.files import json_bytes
from spectool.model.loading import config_dtype
from spectool.quantize.job import QuantizeJob
from spectool.quantize.ledger import measure
from spectool.quantize.pack import make_entry
from spectool.quantize.plan import QuantizePlan
from spectool.quantize.rules import format_rules

# File with the rules that the artifact was made by.
RULES_FILE = "rules.yaml"


def make_small_files(
    checkpoint: Checkpoint, plan: QuantizePlan, job: QuantizeJob, writer: ArtifactWriter
) -> dict[str, bytes]:
    """Make all files except the shards: configuration, index, tokenizer, licence, README.

    `checkpoint` is the one before preprocessing.
    """
    files, identity = read_companions(checkpoint), dict(writer.manifest["identity"])
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
        "modules": modules,
        "source": identity.pop("source"),
        "made_by": identity,
    }
    plain = with_plain_dtypes(checkpoint.layout.config, checkpoint.path)
    config = {**plain, "quantization_config": quantization}
    # The source's weight files, which the artifact does not have.
    config.pop("transformers_weights", None)
    if plan.architecture.untied:
        # Stored separately, though declared tied.
        config["tie_word_embeddings"] = False
    if config_dtype(checkpoint.layout) is None:
        # Without it transformers takes the dtype of the first tensor, which may be a field.
        dtypes = map(torch_dtype, checkpoint.layout.tensors.values())
        first = next(dtype for dtype in dtypes if dtype.is_floating_point)
        config["dtype"] = str(first).removeprefix("torch.")
    layout = Layout(path=writer.partial, config=config, tensors=tensors)
    files["config.json"] = json_bytes(config)
    base = None if is_local(checkpoint.name) else checkpoint.name
    card = packed_card(layout, read_origin(checkpoint.path, base=base))
    files[README] = str(card).encode()
    index = {
        "metadata": {
            "total_parameters": plan.num_parameters,
            "total_size": layout.num_bytes,
            "files": sorted([*shards, *files, PACKED_INDEX]),
            "checksums": writer.checksums(),
        },
        "weight_map": {name: entry.path.name for name, entry in tensors.items()},
    }
    files[PACKED_INDEX] = json_bytes(index)
    return files


def packed_card(
    layout: Layout,
    origin: Mapping[str, Any],
    *,
    training: Mapping[str, Any] | None = None,
    **measured: Any,
) -> Card:
    """Return the card of a packed checkpoint.

    `origin`: licence and base, as `read_origin` has them. `training`: the record of a later
    training of its fields. `measured`: the fields of `Card` about figures.
    """
    record = layout.quantization or {}
    made_by, ledger = record.get("made_by") or {}, measure(layout)
    more = [
        f"{matrices} by `{made_by[key]['method']}` with {describe_options(made_by[key]['options'])}"
        for matrices, key in (("embedding and lm_head", "embeddings"), ("lm_head", "lm_head"))
        if made_by.get(key)
    ]
    more += [f"matrices named in `{RULES_FILE}` by its rules"] if made_by.get("rules") else []
    method, options = made_by.get("method"), describe_options(made_by.get("options") or {})
    lines = [
        f"Method `{method}` with {options}{''.join(f'; {each}' for each in more)}.",
        "",
        "| | bits |",
        "|---|---:|",
        f"| per weight of the {len(ledger.entries)} packed matrices | {ledger.linears:.4f} |",
        f"| per parameter of all weight files | {ledger.file:.4f} |",
    ]
    if training is not None:
        lines += ["", TRAINED_NOTE]
    return Card(
        title="A checkpoint packed by spectool",
        name=f"{layout.config.get('model_type')}-{method}",
        tags=[str(method)],
        relation="quantized",
        lines=lines,
        loading=_LOADING,
        origin=origin,
        fingerprint=(record.get("source") or {}).get("fingerprint"),
        **measured,
    )


_LOADING = """## Load it

```python
import spectool

model = spectool.load("PATH")
```

or, with `import spectool` before it, `AutoModelForCausalLM.from_pretrained("PATH")`. On the command
line: `spectool generate PATH`, `spectool eval PATH`, `spectool inspect PATH`.
"""
