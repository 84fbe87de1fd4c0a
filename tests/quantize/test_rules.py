"""Several methods in one artifact: rules files, embeddings and lm_heads."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

import spectool
from spectool.checkpoint.headers import read_layout
from spectool.checkpoint.tensors import open_checkpoint
from spectool.cli import app
from spectool.data.windows import cut
from spectool.errors import CheckpointError, UsageError
from spectool.evaluate.log_probs import BlockwiseLogProbs, ResidentLogProbs
from spectool.evaluate.measures.layers import layer_errors
from spectool.kernels import build
from spectool.model.architecture import Architecture
from spectool.model.kernels import ProductLinear
from spectool.model.loading import load_model
from spectool.model.packed import PackedEmbedding, PackedLinear, dense_weight
from spectool.quantize.base import parse_quantizer
from spectool.quantize.export import export
from spectool.quantize.ledger import measure
from spectool.quantize.methods.int8 import Int8
from spectool.quantize.methods.rtn import RTN
from spectool.quantize.pack import Packing
from spectool.quantize.plan import make_plan
from spectool.quantize.rules import Rule, format_rules, make_skip_rules, read_rules

from ..conftest import contents
from ..stopping import stopped

Checkpoints = Callable[..., Path]
Compress = Callable[..., Path]


IDS_BL = torch.tensor([[5, 9, 12, 7, 7, 3]])
INT8 = Int8()

RULES_FILE = """
layers:
- {match: "*.down_proj", method: rtn, bits: 8, group_size: 0}
- {match: layers.1.mlp, method: dense}
- {match: "*.o_proj", method: gptq, bits: 3, group_size: 16}
- {match: lm_head, method: int8}
"""


def rules(tmp_path: Path, text: str = RULES_FILE) -> list[Rule]:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    return read_rules(path)


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(IDS_BL).logits
    return found


@pytest.mark.parametrize(
    ("entries", "behind", "ahead"),
    [
        (["*: rtn", "down_proj: int8"], "entry 2 (down_proj)", "entry 1 (*)"),
        (["model: rtn", "lm_head: int8", "layers.1.mlp: dense"], "entry 3", "entry 1 (model)"),
        (
            ["layers.0: int8", "layers.1: rtn", "q_proj: nf4"],
            "entry 3 (q_proj)",
            r"entry 1 \(layers.0\), .*entry 2 \(layers.1\)",
        ),
        (["*: rtn", "lm_head: int8"], "entry 2 (lm_head)", "entry 1 (*)"),
    ],
)
def test_a_rule_wholly_behind_earlier_ones_is_refused(
    checkpoint: Checkpoints, tmp_path: Path, entries: list[str], behind: str, ahead: str
) -> None:
    with pytest.raises(UsageError, match="has no effect") as caught:
        make_plan_of(checkpoint("llama"), tmp_path, entries)
    first, last = str(caught.value).split("has no effect")
    assert behind in first and (ahead in last or re.search(ahead, last))


@pytest.mark.parametrize(
    ("entries", "skip"),
    [
        (["down_proj: int8", "*: rtn"], []),
        (["down_proj: int8", "down_proj: int8", "layers.0.mlp.down_proj: int8"], []),
        (["down_proj: int8", "layers.0: nf4"], ["layers.0"]),
        (["q_proj: dense", "layers.0.self_attn.q_proj: dense"], ["q_proj"]),
    ],
)
def test_a_rule_that_says_the_same_or_is_skipped_is_not(
    checkpoint: Checkpoints, tmp_path: Path, entries: list[str], skip: list[str]
) -> None:
    make_plan_of(checkpoint("llama"), tmp_path, entries, skip)


def make_plan_of(source: Path, path: Path, entries: list[str], skip: Sequence[str] = ()) -> None:
    lines = ["layers:"]
    for entry in entries:
        match, _, method = entry.partition(": ")
        lines.append(f'- {{match: "{match}", method: {method}}}')
    all_rules = [*make_skip_rules(skip), *rules(path, "\n".join(lines))]
    make_plan(Architecture(open_checkpoint(source)), INT8, rules=all_rules, allow_dense=True)


def test_the_first_rule_that_matches_decides(
    checkpoint: Checkpoints, compress: Compress, tmp_path: Path, text_file: str
) -> None:
    job = {
        "rules": rules(tmp_path),
        "calibration": [text_file],
        "samples": 4,
        "seq_len": 32,
        "allow_dense": True,
    }
    source = checkpoint("llama")
    out = compress(source, "rtn", bits=4, job=job)
    modules = read_layout(out).modules
    packed_by = {
        name: (entry["method"], entry["options"].get("bits")) for name, entry in modules.items()
    }
    assert packed_by.pop("lm_head") == ("int8", None)
    for layer in (0, 1):
        start = f"model.layers.{layer}"
        assert packed_by.pop(f"{start}.mlp.down_proj") == ("rtn", 8)
        assert packed_by.pop(f"{start}.self_attn.o_proj") == ("gptq", 3)
        for part in "qkv":
            assert packed_by.pop(f"{start}.self_attn.{part}_proj") == ("rtn", 4)
    # In the second layer's MLP only matrices of an earlier rule are packed.
    assert set(packed_by) == {f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up")}

    # A rule packs a matrix to the same bytes as its method alone.
    whole = compress(source, "rtn", bits=8, group_size=0, out="whole")
    name = "model.layers.1.mlp.down_proj"
    mixed, alone = (
        {k: t for f in path.glob("*.safetensors") for k, t in load_file(f).items()}
        for path in (out, whole)
    )
    for field in ("codes", "scale", "zero"):
        assert torch.equal(mixed[f"{name}.q.{field}"], alone[f"{name}.q.{field}"])

    # The artifact contains the rules to make it again.
    assert read_rules(out / "rules.yaml")[0].quantizer == RTN(RTN.Config(bits=8, group_size=0))
    again = compress(
        source, "rtn", bits=4, out="again", job={**job, "rules": read_rules(out / "rules.yaml")}
    )
    for path in out.glob("*.safetensors"):
        assert load_file(path).keys() == load_file(again / path.name).keys()
    assert torch.equal(logits(spectool.load(out)), logits(spectool.load(again)))


def test_a_plan_and_its_text_are_the_same(tmp_path: Path) -> None:
    first = rules(tmp_path)
    second = rules(tmp_path, format_rules(first))
    assert [(r.match, r.quantizer) for r in first] == [(r.match, r.quantizer) for r in second]
    assert str(first[0].quantizer) == "rtn:bits=8,group_size=0" and str(INT8) == "int8"
    assert parse_quantizer("rtn:bits=8,group_size=0") == first[0].quantizer


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: [", "is not YAML"),
        ("- a", "one list `layers`"),
        ("layers: []", "one list `layers`"),
        ("layers: [{match: a}]\nmore: 1", "one list `layers`"),
        ("layers: [{match: a}]", "entry 1: expected match and method"),
        ("layers: [{match: q_proj, method: rtn, bits: 9}]", r"entry 1 \(q_proj\): --bits 9: must"),
        ("layers: [{match: q_proj, method: rtm}]", "no quantizer is called 'rtm'"),
        ("layers: [{match: q_proj, method: rtn, bit: 3}]", "unknown option 'bit'"),
        ("layers: [{match: q_proj, method: dense, bits: 3}]", "dense takes no options"),
        ("layers: [{match: layers.7, method: rtn}]", r"entry 1 \(layers.7\): matches no linear"),
        ("layers: [{match: lm_head, method: gptq}]", "gptq needs activations"),
        (
            "layers: [{match: lm_head, method: vq, codes: 32}]",
            "vq is fitted on text, by --lm-head vq",
        ),
        ("layers: [{match: q_proj, method: scalar, bits: .nan}]", "--bits nan: must be finite"),
    ],
)
def test_bad_plans_are_one_line(
    checkpoint: Checkpoints, tmp_path: Path, text: str, message: str
) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(text)
    out = tmp_path / "out"
    command = ["quantize", "rtn", str(checkpoint("llama")), str(out), "--rules", str(path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 2 and not out.exists() and not out.with_name("out.partial").exists()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert re.search(message, line)


def test_a_plan_that_is_absent(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_rules(tmp_path / "none.yaml")


def test_a_tied_head_cannot_be_packed_alone(checkpoint: Checkpoints, compress: Compress) -> None:
    rule = Rule("lm_head", INT8, "--rules")
    with pytest.raises(UsageError, match=r"lm_head is tied to model\.embed_tokens"):
        compress(checkpoint("llama-tied"), job={"rules": [rule]})


FAMILIES = ["llama", "llama-tied", "gpt2", "opt", "gpt_neox", "gemma2", "gemma3", "qwen3_moe"]


@pytest.mark.parametrize(
    ("family", "choice"),
    [
        *((family, "rtn:bits=4,group_size=16") for family in FAMILIES),
        *(("llama-tied", choice) for choice in ("int8", "olive", "hqq:bits=4")),
        ("gemma3", "int8"),
    ],
)
def test_embedding_and_head_are_packed_and_read_back(
    checkpoint: Checkpoints, compress: Compress, family: str, choice: str
) -> None:
    source = checkpoint(family)
    job = {"embeddings": parse_quantizer(choice), "allow_dense": True}
    out = compress(source, "rtn", bits=8, group_size=16, job=job)
    layout = read_layout(out)
    model: Any = load_model(open_checkpoint(out), keep_fields=True)
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(table, PackedEmbedding) and isinstance(head, PackedLinear)
    tied = spectool.load(source).config.get_text_config().tie_word_embeddings
    outside = [name for name, entry in layout.modules.items() if "outside" in entry]
    assert len(outside) == (1 if tied else 2)
    # The same model with these matrices dense: the same numbers.
    others = compress(source, "rtn", bits=8, group_size=16, out="dense", job={"allow_dense": True})
    dense: Any = load_model(open_checkpoint(others), keep_fields=True)
    for ours, theirs in (
        (table, dense.get_input_embeddings()),
        (head, dense.get_output_embeddings()),
    ):
        theirs.weight = nn.Parameter(dense_weight(ours), requires_grad=False)
    assert torch.equal(logits(model), logits(dense))
    # By products, of which the lm_head and its embedding may share one, up to the order of sums.
    fast: Any = spectool.load(out, activations="exact")
    table, head = fast.get_input_embeddings(), fast.get_output_embeddings()
    assert isinstance(head, ProductLinear) == (build.missing() is None)
    assert (table.packed is head) == tied
    scale = float(logits(dense).abs().max())
    torch.testing.assert_close(logits(fast), logits(dense), rtol=0, atol=1e-5 * scale)
    # So does the dequantized model, and the exported one.
    unpacked: Any = spectool.load(out, runtime="dense")
    assert torch.equal(logits(unpacked), logits(dense))
    shared = unpacked.get_input_embeddings().weight is unpacked.get_output_embeddings().weight
    assert shared == tied
    export(open_checkpoint(out), out.with_name("exported"), "dense")
    exported: Any = spectool.load(out.with_name("exported"))
    wanted = unpacked.state_dict()
    for name, value in exported.state_dict().items():
        # A Conv1D is dequantized as a linear.
        same = wanted[name]
        assert torch.equal(value, same) or (value.ndim == 2 and torch.equal(value, same.T)), name
    # Products of experts round differently with the tensor's offset in its file.
    torch.testing.assert_close(logits(exported), logits(dense), rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_blocks_are_calibrated_behind_the_packed_embedding(
    checkpoint: Checkpoints,
    compress: Compress,
    text_file: str,
    family: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    embed = Packing._embed

    def spy(self: Packing) -> Any:
        streams = embed(self)
        assert self.stream.calibration is not None
        both = (each.hidden_SLD.clone() for each in (streams.original, streams.packed))
        seen.append((self.stream.calibration.ids_SL, *both))
        return streams

    monkeypatch.setattr(Packing, "_embed", spy)
    source, coarse = checkpoint(family), parse_quantizer("rtn:bits=2,group_size=8")
    job = {"embeddings": coarse, "calibration": [text_file], "samples": 4, "seq_len": 32}
    out = compress(source, "gptq", job=job)
    ((ids_SL, original_SLD, packed_SLD),) = seen
    for path, found_SLD in ((source, original_SLD), (out, packed_SLD)):
        model: Any = spectool.load(path)
        with torch.inference_mode():
            assert torch.equal(model.get_input_embeddings()(ids_SL), found_SLD)
    assert not torch.equal(original_SLD, packed_SLD)


def test_a_tied_matrix_is_stored_once_and_counted_apart(
    checkpoint: Checkpoints, compress: Compress
) -> None:
    source = checkpoint("llama-tied")
    reports: list[Any] = []
    out = compress(source, "rtn", job={"embeddings": INT8}, reports=reports)
    plain = compress(source, "rtn", out="plain")
    ledger, without = measure(read_layout(out)), measure(read_layout(plain))
    assert ledger.linears == without.linears and ledger.file < without.file
    assert ledger.num_parameters == without.num_parameters
    (entry,) = [entry for entry in ledger.entries if entry.outside]
    assert entry.name == "model.embed_tokens" and 8 < entry.bits < 9.1
    (layer,) = reports[0].outside.layers
    assert layer.name == entry.name and 0 < layer.error < 1e-3
    assert not any("lm_head" in name for name in read_layout(out).tensors)
    # A tie that the architecture does not have, or to a missing matrix.
    config = json.loads((out / "config.json").read_text())
    entry = config["quantization_config"]["modules"]["model.embed_tokens"]
    for wrong in ("model.layers.0.mlp.up_proj", "model.no_head"):
        entry["tied"] = wrong
        (out / "config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=f"{wrong}: the architecture"):
            spectool.load(out)


def test_walked_blockwise_as_in_memory(checkpoint: Checkpoints, compress: Compress) -> None:
    for family in ("llama", "llama-tied", "gemma3"):
        out = compress(checkpoint(family), "rtn", out=family, job={"embeddings": INT8})
        windows = cut(list(range(3, 60)), length=16, bos=0)
        resident = ResidentLogProbs(spectool.load(out, activations="exact"))
        opened = open_checkpoint(out)
        where: Any = {"dtype": torch.float32, "device": torch.device("cpu")}
        where["activations"] = "exact"
        blockwise = BlockwiseLogProbs(opened, windows, **where)
        for batch in windows.batches(300):
            assert torch.allclose(resident(batch), blockwise(batch), atol=1e-5)


def test_layer_errors_name_what_lies_outside(checkpoint: Checkpoints, compress: Compress) -> None:
    source = checkpoint("llama")
    out = compress(source, "rtn", job={"embeddings": INT8})
    errors = layer_errors(open_checkpoint(out), open_checkpoint(source))
    names = {layer.name for layer in errors}
    assert {"model.embed_tokens", "lm_head"} < names and len(names) == 16


def test_a_dtype_moves_activations_not_codes(checkpoint: Checkpoints, compress: Compress) -> None:
    out = compress(checkpoint("gemma3"), "rtn", job={"embeddings": INT8})
    model: Any = load_model(open_checkpoint(out), dtype="bfloat16", keep_fields=True)
    assert model.get_input_embeddings()(IDS_BL).dtype == torch.bfloat16
    assert logits(model).dtype == torch.bfloat16
    assert model.get_input_embeddings().q.codes.dtype == torch.int8


def test_killed_between_the_methods_of_a_block(
    checkpoint: Checkpoints, compress: Compress, tmp_path: Path, text_file: str
) -> None:
    job = {
        "rules": rules(tmp_path),
        "embeddings": INT8,
        "calibration": [text_file],
        "samples": 4,
        "seq_len": 32,
        "allow_dense": True,
    }
    source = checkpoint("llama")
    want = compress(source, "jlcm", bits=2, epochs=1, groups=1, job=job, out="want")
    with stopped(Packing, "_fit", after=4):
        compress(source, "jlcm", bits=2, epochs=1, groups=1, job=job)
    assert contents(want) == contents(compress(source, "jlcm", bits=2, epochs=1, groups=1, job=job))


def test_the_command_offers_and_inspect_repeats(checkpoint: Checkpoints, tmp_path: Path) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    path = tmp_path / "rules.yaml"
    path.write_text("layers: [{match: down_proj, method: rtn, bits: 8}]")
    runner = CliRunner()
    command = ["quantize", "rtn", str(source), str(out), "--bits", "2", "--group-size", "0"]
    plain = runner.invoke(app, [*command, "--dry-run"])
    assert "--embeddings int8 quantizes them too" in plain.stderr
    more = [*command, "--rules", str(path), "--embeddings", "int8"]
    done = runner.invoke(app, more)
    assert done.exit_code == 0, done.stderr
    assert "on 12, rtn (bits=8, group_size=128, symmetric=False) on 2 of 14 linears" in done.stderr
    assert "int8 on lm_head" in done.stderr and "quantizes them too" not in done.stderr
    report = json.loads(runner.invoke(app, ["inspect", str(out), "--json"]).stdout)
    assert "--rules RULES --embeddings int8" in report["command"]
    assert runner.invoke(app, ["inspect", str(out)]).stdout.count("of the blocks") == 1
    bad = runner.invoke(app, [*command[:3], str(tmp_path / "b"), "--embeddings", "ptq161"])
    assert bad.exit_code == 2 and "--embeddings: ptq161 needs activations" in bad.stderr


@pytest.mark.parametrize(
    ("name", "pattern", "hit"),
    [
        ("model.layers.1.mlp.up_proj", "up_proj", True),
        ("model.layers.1.mlp.up_proj", "layers.1", True),
        ("model.layers.11.mlp.up_proj", "layers.1", False),
        ("model.layers.1.mlp.up_proj", "layers.1.mlp", True),
        ("model.layers.1.mlp.up_proj", "mlp.layers", False),
        ("model.layers.1.mlp.up_proj", "up", False),
        ("model.layers.1.mlp.up_proj", "*.up_*", True),
        ("model.layers.1.mlp.up_proj", "layers.?", False),
        ("model.layers.1.mlp.up_proj", "*layers.[0-3].*", True),
    ],
)
def test_patterns(name: str, pattern: str, hit: bool) -> None:
    assert Rule(pattern, None, "here").matches(name) is hit
