"""Files of a packed checkpoint beside its shards."""

from __future__ import annotations

import json

from spectool.checkpoint.artifact import ArtifactWriter
from spectool.checkpoint.dtypes import with_plain_dtypes
from spectool.checkpoint.formats import FORMAT_VERSION
from spectool.checkpoint.headers import PACKED_INDEX, Layout, read_header
from spectool.checkpoint.tensors import Checkpoint, torch_dtype
from spectool.checkpoint.trained import read_companions
from spectool.files import json_bytes
from spectool.model.loading import config_dtype
from spectool.quantize.job import QuantizeJob
from spectool.quantize.ledger import Ledger, measure
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
    files[PACKED_INDEX] = json_bytes(index)
    return files


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
