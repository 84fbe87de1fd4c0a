"""Heads exported to formats of servers compute the same, and are read back unchanged."""

from __future__ import annotations

import json
import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from spectool.checkpoint.tensors import open_checkpoint
from spectool.decode.generate import Runner
from spectool.decode.heads import convert
from spectool.decode.heads.artifact import read_record
from spectool.errors import CheckpointError, SpectoolError, UnsupportedError, UsageError
from spectool.methods import METHODS
from spectool.quantize.base import parse_quantizer
from spectool.quantize.job import QuantizeJob
from spectool.quantize.run import quantize

from .conftest import Train

Checkpoint = Callable[..., Path]
Make = Callable[..., tuple[Path, Path, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of heads and of their exports, by how they were made."""
    kept: dict[str, Path] = defaultdict(lambda: tmp_path_factory.mktemp("made") / "kept")
    return kept


@pytest.fixture
def make(train: Train, checkpoint: Checkpoint, tmp_path: Path, made: dict[str, Path]) -> Make:
    """Return `make(family, method, format, options)`: checkpoint, heads and their export.

    The latter two are copies that a test may change.
    """

    def run(
        family: str, method: str, name: str, options: dict[str, Any] | None = None
    ) -> tuple[Path, Path, Path]:
        layers = {"n_layer": 4} if family == "gpt2" else {"num_hidden_layers": 4}
        source = checkpoint(family, **({} if family == "gemma3" else layers))
        kept = made[json.dumps([family, method, name, options])]
        if kept.exists():
            shutil.copytree(kept, tmp_path, dirs_exist_ok=True)
        else:
            train(source, "heads", method=method, options=options, steps=2)
            convert.export(tmp_path / "heads", open_checkpoint(source), tmp_path / "served", name)
            shutil.copytree(tmp_path, kept)
        return source, tmp_path / "heads", tmp_path / "served"

    return run


def back(train: Train, source: Path, served: Path, method: str, **options: Any) -> Path:
    train(source, "back", method=method, options=options, steps=0, init_from=str(served))
    return served.parent / "back"


def equal(one: Path, other: Path) -> bool:
    a, b = (load_file(path / "heads.safetensors") for path in (one, other))
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def read_config(path: Path) -> Any:
    return json.loads((path / "config.json").read_text())


def edit(path: Path, **changes: Any) -> None:
    (path / "config.json").write_text(json.dumps({**read_config(path), **changes}))


@pytest.mark.parametrize(
    "options",
    [
        {"num_layers": 2},
        {"draft_vocab": 30},
        {"shared_head": True},
        {"shared_head": True, "draft_vocab": 30},
    ],
)
def test_medusa_as_its_server_computes_it(
    make: Make, train: Train, options: dict[str, Any]
) -> None:
    source, heads, served = make("llama", "medusa", "vllm-medusa", options)
    config, tensors = read_config(served), load_file(served / "model.safetensors")
    assert config["model_type"] == "medusa" and config["medusa_fc_bias"] is True
    runner = Runner(source, draft=str(heads), dtype=torch.float32)
    own: Any = runner.drafter._heads.requires_grad_(False)  # type: ignore[attr-defined]
    state_RD = torch.randn(5, config["hidden_size"], generator=torch.Generator().manual_seed(1))
    for k in range(config["num_heads"]):
        x = state_RD
        for j in range(config["num_hidden_layers"]):
            block = f"blocks.{k}.layers.{j}"
            y = x @ tensors[f"{block}.weight"].T + tensors[f"{block}.bias"]
            x = x + y * y.sigmoid()
        logits = x @ tensors[f"lm_heads.{0 if config['original_lm_head'] else k}.weight"].T
        assert logits.shape[1] == config["truncated_vocab_size"]
        best = logits.argmax(-1)
        best = tensors["token_map"][best] if "token_map" in tensors else best
        step = own.step(state_RD, k)
        assert torch.equal(own.guess(step, k, 1)[:, 0, 0], best)
    assert equal(back(train, source, served, "medusa"), heads)
    assert read_record(served.parent / "back").options == read_record(heads).options


@pytest.mark.parametrize(
    ("family", "name", "options"),
    [
        ("llama", "eagle3", {}),
        ("llama-tied", "eagle3", {"draft_vocab": 30}),
        ("gpt2", "eagle3", {}),
        ("qwen3", "speculators", {"draft_vocab": 30}),
        ("gemma3", "speculators", {}),
    ],
)
def test_eagle3_comes_back(
    make: Make, train: Train, family: str, name: str, options: dict[str, Any]
) -> None:
    """The layer has the names and meaning of the authors' code, which is not run here."""
    source, heads, served = make(family, "eagle3", name, options)
    config, tensors = read_config(served), load_file(served / "model.safetensors")
    layer = "midlayer." if name == "eagle3" else "layers.0."
    own = load_file(heads / "heads.safetensors")
    assert set(tensors) == {
        *(key.replace("midlayer.", layer) for key in own if key != "token_map"),
        *(["d2t", "t2d"] if options else []),
        *(["embed_tokens.weight"] if name == "speculators" else []),
    }
    shape = config if name == "eagle3" else config["transformer_layer_config"]
    assert tensors[f"{layer}self_attn.q_proj.weight"].shape == (
        shape["num_attention_heads"] * shape["head_dim"], 2 * shape["hidden_size"],
    )  # fmt: skip
    if options:
        ids = own["token_map"]
        assert torch.equal(torch.arange(30) + tensors["d2t"], ids)
        assert torch.equal(tensors["t2d"].nonzero()[:, 0], ids)
    states = config["eagle_aux_hidden_state_layer_ids"]
    runner = Runner(source, draft=str(heads), dtype=torch.float32)
    assert runner.drafter is not None
    assert [state - 1 for state in states] == list(runner.drafter.needs.layers)
    if name == "eagle3":
        # Outputs of layers there, what layers read here.
        nested = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
        assert nested == [state - 1 for state in states]
    else:
        every = torch.arange(shape["vocab_size"])
        embedding = runner.target.model.get_input_embeddings()
        assert torch.equal(tensors["embed_tokens.weight"], embedding(every))
    assert equal(back(train, source, served, "eagle3"), heads)
    runner.use(str(served.parent / "back"))
    (result,) = runner.generate([[5, 6, 7]], max_new_tokens=8)
    assert result.drafted > 0


def test_eagle3_of_others(make: Make, train: Train) -> None:
    """Draft tokens in any order, SGLang's numbering of layers, a biased or foreign lm_head."""
    source, heads, served = make("llama", "eagle3", "eagle3", {"draft_vocab": 30})
    file = served / "model.safetensors"
    tensors = load_file(file)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    ids = (torch.arange(30) + tensors["d2t"])[order]
    shuffled = {"d2t": ids - torch.arange(30), "lm_head.weight": tensors["lm_head.weight"][order]}
    save_file({**tensors, **shuffled}, file)
    config = read_config(served)
    del config["eagle_aux_hidden_state_layer_ids"]
    (served / "config.json").write_text(json.dumps(config))
    assert equal(back(train, source, served, "eagle3", ttt_steps=2), heads)
    assert read_record(served.parent / "back").options["ttt_steps"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_before_residual": True}, "norm_before_residual"),
        ({"num_hidden_layers": 2}, "has 2 layers"),
        ({"intermediate_size": 64}, "intermediate_size 64, the target 56"),
        ({"rope_theta": 5e5, "rope_parameters": None}, "rope_parameters"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 2, 1]}, r"states \[2, 2, 1\]"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}, "states 1 to 4"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2]}, r"fc.weight is \(32, 96\)"),
        ({"speculators_model_type": "dflash"}, "holds dflash, no heads"),
        ({"architectures": ["LlamaForCausalLM"]}, "holds llama, no heads"),
        ({"hidden_size": "wide"}, "do not fit together"),
        ({"num_attention_heads": 0}, "do not fit together"),
    ],
)
def test_what_is_not_ours_is_refused(
    make: Make, train: Train, change: dict[str, Any], message: str
) -> None:
    source, _, served = make("llama", "eagle3", "eagle3")
    edit(served, **change)
    with pytest.raises((UnsupportedError, UsageError, CheckpointError), match=message):
        back(train, source, served, "eagle3")
    assert sorted(path.name for path in served.parent.iterdir()) in (
        ["heads", "served"], ["back.partial", "back.partial.json", "heads", "served"],
    )  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"d2t": -torch.arange(30)},
        {"d2t": torch.zeros(29).long()},
        {"d2t": torch.full((30,), 1000)},
        {"d2t": torch.full((30,), -1)},
        {"d2t": torch.zeros(30)},
        {"d2t": None},
        {"t2d": torch.zeros(320).bool()},
        {"fc.weight": torch.full((32, 96), torch.nan)},
        {"fc.weight": torch.ones(32, 96, dtype=torch.int8)},
    ],
)
def test_ids_that_cannot_be_are_refused(
    make: Make, train: Train, change: dict[str, torch.Tensor | None]
) -> None:
    source, _, served = make("llama", "eagle3", "eagle3", {"draft_vocab": 30})
    file = served / "model.safetensors"
    tensors = {**load_file(file), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    message = (
        r"not distinct ids of 320|expected 30 whole numbers|d2t is absent, but lm_head has "
        r"30 rows and the target 320 tokens|do not name the same|3072 of 3072 weights are NaN"
        r"|fc.weight is int8, expected floating-point"
    )
    with pytest.raises(CheckpointError, match=message):
        back(train, source, served, "eagle3")


def test_an_embedding_in_half_precision_is_the_targets(
    train: Train, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """The norm is scaled in bfloat16 when written, and in float32 during training."""
    source = checkpoint("gemma3", dtype=torch.bfloat16)
    train(source, "heads", method="eagle3", steps=0)
    convert.export(tmp_path / "heads", open_checkpoint(source), tmp_path / "served", "speculators")
    where = {"dtype": torch.float32}
    train(source, "back", method="eagle3", steps=0, init_from=str(tmp_path / "served"), where=where)
    assert equal(tmp_path / "back", tmp_path / "heads")


def test_other_places_are_refused(
    make: Make, train: Train, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, heads, served = make("llama", "eagle3", "speculators")
    other = checkpoint("llama", num_hidden_layers=4, seed=1)
    with pytest.raises(CheckpointError, match="its embedding is not the target's"):
        back(train, other, served, "eagle3")
    with pytest.raises(UsageError, match="holds eagle3 heads, not medusa"):
        back(train, source, served, "medusa")
    with pytest.raises(CheckpointError, match="absent"):
        back(train, source, tmp_path / "absent", "eagle3")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(CheckpointError, match="is a LoRA adapter"):
        back(train, source, adapter, "eagle3")
    (served / "model.safetensors").rename(served / "pytorch_model.bin")
    with pytest.raises(UnsupportedError, match="pickled"):
        back(train, source, served, "eagle3")
    with pytest.raises(CheckpointError, match="trained for another checkpoint"):
        convert.export(heads, open_checkpoint(other), tmp_path / "new", "eagle3")
    with pytest.raises(UsageError, match="exists already"):
        convert.export(heads, open_checkpoint(source), served, "eagle3")
    assert not (tmp_path / "new").exists()


def test_what_a_format_cannot_hold(
    make: Make, train: Train, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = checkpoint("gemma3")
    train(source, "scaled", method="eagle3", steps=0)
    with pytest.raises(UnsupportedError, match="this target scales it") as caught:
        convert.export(tmp_path / "scaled", open_checkpoint(source), tmp_path / "x", "eagle3")
    assert caught.value.hint is not None and "speculators" in caught.value.hint
    source = checkpoint("llama")
    train(source, "shallow", method="eagle3", steps=0)
    with pytest.raises(UnsupportedError, match="fuse three of the target's states, these heads 2"):
        convert.export(tmp_path / "shallow", open_checkpoint(source), tmp_path / "x", "eagle3")
    train(source, "hydra", method="hydra", steps=0)
    with pytest.raises(UnsupportedError, match="holds eagle3 heads, these are hydra") as caught:
        convert.export(tmp_path / "hydra", open_checkpoint(source), tmp_path / "x", "speculators")
    assert caught.value.hint is not None and "no server reads hydra heads" in caught.value.hint
    assert not (tmp_path / "x").exists()


def test_training_goes_on_from_heads(train: Train, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A training starts from the trained weights, on a quantized target as on the dense one."""
    source = checkpoint("llama")
    first = train(source, "first", method="hydra", steps=15)
    path = str(tmp_path / "first")
    again = train(source, "again", method="hydra", steps=0, init_from=path)
    assert equal(tmp_path / "first", tmp_path / "again")
    assert again.initial["score"] == pytest.approx(first.tokens_per_forward)
    assert again.record.training["init_from"].startswith("sha256:")
    assert first.record.training["init_from"] is None
    more = train(source, "more", method="hydra", steps=30, init_from=path)
    assert more.tokens_per_forward >= first.tokens_per_forward
    assert not equal(tmp_path / "first", tmp_path / "more")
    with pytest.raises(UsageError, match=r"guess 320 tokens"):
        train(source, "other", method="hydra", options={"draft_vocab": 30}, steps=0, init_from=path)
    record = tmp_path / "first" / "spectool_heads.json"
    record.write_text(record.read_text().replace('"tokenizer": "sha256:', '"tokenizer": "sha256:0'))
    with pytest.raises(CheckpointError, match="another tokenizer"):
        train(source, "other", method="hydra", steps=0, init_from=path)
    record.write_text(record.read_text().replace('"sha256:0', '"sha256:'))
    with pytest.raises(SpectoolError, match="is absent, expected"):
        train(source, "other", method="hydra", options={"num_heads": 5}, steps=0, init_from=path)
    assert not list(tmp_path.glob("other*"))


def test_formats_hold_what_the_table_says(tmp_path: Path) -> None:
    served = {form.method for form in convert.FORMATS.values()}
    elsewhere = {name for name, row in METHODS.items() if row.trainable and len(row.runs_in) > 1}
    assert served == elsewhere


def test_heads_of_a_learnt_lm_head(
    train: Train, checkpoint: Checkpoint, data: str, tmp_path: Path
) -> None:
    """medusa's matrices then have a bias, which the format cannot hold; eagle3's have none."""
    source, packed = checkpoint("llama", num_hidden_layers=4), tmp_path / "packed"
    job = QuantizeJob(
        method="rtn",
        config=parse_quantizer("rtn:group_size=16").config,
        lm_head=parse_quantizer("vq:codes=16,width=0,frequent=4,epochs=0"),
        calibration=[data],
        samples=2,
        seq_len=48,
    )
    quantize(open_checkpoint(source), packed, job)
    train(packed, "medusa", method="medusa", steps=1)
    with pytest.raises(UnsupportedError, match="biases of lm_heads") as caught:
        convert.export(
            tmp_path / "medusa", open_checkpoint(packed), tmp_path / "served", "vllm-medusa"
        )
    assert "generate --draft" in str(caught.value.hint)
    train(packed, "eagle3", method="eagle3", steps=1)
    convert.export(tmp_path / "eagle3", open_checkpoint(packed), tmp_path / "served", "eagle3")
    own = load_file(tmp_path / "eagle3/heads.safetensors")
    served = load_file(tmp_path / "served/model.safetensors")
    assert torch.equal(served["lm_head.weight"], own["lm_head.weight"])
