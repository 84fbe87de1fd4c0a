"""Every method of draft heads through one trainer: stored, read back, drafting, resumed."""

from __future__ import annotations

import gzip
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from spectool.checkpoint.artifact import ArtifactWriter
from spectool.checkpoint.headers import HEADS_FILE
from spectool.checkpoint.tensors import open_checkpoint
from spectool.decode.generate import Runner
from spectool.decode.heads.artifact import read_record
from spectool.distill.train_heads import HeadsJob, HeadsReport, train_heads
from spectool.errors import UnsupportedError
from spectool.methods import import_method, list_trainable
from spectool.quantize import run as quantizing
from spectool.quantize.base import parse_quantizer
from spectool.quantize.job import QuantizeJob
from spectool.training import Training

from ..conftest import contents, tokenizer
from ..stopping import stopped
from .conftest import storing_always

OPTIONS: dict[str, dict[str, Any]] = {"hydra-plain": {"variant": "plain"}}
ALL = [*list_trainable(), *OPTIONS]
# Heads apart, in a chain, of a layer, and in the pass; the others with the slow tests.
ONE_OF_A_KIND = ("medusa", "hydra", "eagle3", "ppd")
MOST_SLOW = [
    pytest.param(name, marks=[] if name in ONE_OF_A_KIND else pytest.mark.slow) for name in ALL
]
Train = Callable[..., HeadsReport]


@pytest.fixture
def train(tmp_path: Path) -> Train:
    data = tmp_path / "text.txt"
    text = Path(__file__).parents[2] / "core/data/calibration/mixed.txt"
    data.write_text(text.read_text()[:1600])

    def run(name: str, source: Path, out: str = "out", **asked: Any) -> HeadsReport:
        method = name.removesuffix("-plain")
        config = import_method(method, "drafter").Heads.Config(**OPTIONS.get(name, {}))
        job = HeadsJob(
            method=method,
            config=config,
            **{
                "data": [str(data)], "steps": 3, "seq_len": 64, "batch_tokens": 256, "held_out": 2,
                **asked,
            },
        )  # fmt: skip
        return train_heads(open_checkpoint(source), tmp_path / out, job)

    return run


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *((name, "llama") for name in ALL),
        *((name, "gpt2") for name in ONE_OF_A_KIND),
        *(pytest.param(name, "qwen3", marks=pytest.mark.slow) for name in ALL),
    ],
)
def test_what_is_written_drafts_and_changes_nothing(
    train: Train, checkpoint: Callable[..., Path], tmp_path: Path, name: str, family: str
) -> None:
    """Heads read back equal those that were stored, and equal seeds give equal bytes."""
    dtype = torch.bfloat16 if family == "llama" else torch.float32
    source = checkpoint(family, dtype=dtype)
    report = train(name, source)
    if family == "qwen3":
        train(name, source, "again")
        assert contents(tmp_path / "out") == contents(tmp_path / "again")
    assert report.record == read_record(tmp_path / "out")
    runner = Runner(source, dtype=torch.float32)
    prompts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3]]
    plain = runner.generate(prompts, max_new_tokens=8)
    runner.use(str(tmp_path / "out"))
    opened: Any = runner.drafter
    stored = load_file(tmp_path / "out" / HEADS_FILE)
    assert stored.keys() == opened._heads.state_dict().keys()
    for key, value in opened._heads.state_dict().items():
        assert torch.equal(value, stored[key].to(value.dtype))
    for batch_size in (1, 2):
        results = runner.generate(prompts, max_new_tokens=8, batch_size=batch_size)
        assert [r.token_ids for r in results] == [r.token_ids for r in plain]
        assert all(r.drafted > 0 for r in results)


@pytest.fixture(scope="module")
def gemma3n(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a model with several hidden states between its layers, each with its own width."""
    path = tmp_path_factory.mktemp("gemma3n")
    # Some random models end their texts too early to be evaluated on.
    torch.manual_seed(3)
    config = transformers.Gemma3nTextConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
        vocab_size_per_layer_input=320, hidden_size_per_layer_input=8, num_kv_shared_layers=0,
        altup_num_inputs=2, laurel_rank=4, activation_sparsity_pattern=None,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


@pytest.mark.parametrize("name", ["eagle3", "clover", "hidden-transfer"])
def test_states_of_more_dimensions_are_refused_where_heads_read_them(
    train: Train, gemma3n: Path, tmp_path: Path, name: str
) -> None:
    with pytest.raises(UnsupportedError, match="hidden states have more dimensions than batch"):
        train(name, gemma3n, steps=1)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("name", ["hydra", pytest.param("chimera", marks=pytest.mark.slow)])
def test_layers_of_several_widths_do_not_keep_heads_of_the_last_states_from_training(
    train: Train, gemma3n: Path, name: str
) -> None:
    assert train(name, gemma3n, steps=1).steps == 1


@pytest.mark.parametrize("family", ["llama-tied", pytest.param("llama", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MOST_SLOW)
def test_a_model_with_a_packed_embedding_and_head_is_taught(
    train: Train, checkpoint: Callable[..., Path], tmp_path: Path, name: str, family: str
) -> None:
    """Heads of the quantized model, and heads of the original, run on the quantized model."""
    source, packed = checkpoint(family), tmp_path / "packed"
    choice = parse_quantizer("rtn:group_size=16")
    job = QuantizeJob(method="rtn", config=choice.config, embeddings=choice)
    quantizing.quantize(open_checkpoint(source), packed, job)
    runner = Runner(packed, dtype=torch.float32)
    plain = runner.generate([[5, 6, 7]], max_new_tokens=8)
    for index, taught_on in enumerate((source, packed)):
        train(name, taught_on, f"heads-{index}")
        runner.use(str(tmp_path / f"heads-{index}"))
        results = runner.generate([[5, 6, 7]], max_new_tokens=8)
        assert results[0].token_ids == plain[0].token_ids and results[0].drafted > 0


@pytest.mark.parametrize("name", ["medusa", "chimera", "hydra"])
def test_where_the_output_matrix_is_learnt(
    train: Train, checkpoint: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    """The fitted lm_head has a bias and the original has none; heads of each serve both."""
    source, packed = checkpoint("llama"), tmp_path / "packed"
    choice, text = parse_quantizer("rtn:group_size=16"), str(tmp_path / "text.txt")
    head = parse_quantizer("vq:codes=16,epochs=2")
    job = QuantizeJob(
        method="rtn", config=choice.config, lm_head=head, calibration=[text], samples=4, seq_len=48
    )
    quantizing.quantize(open_checkpoint(source), packed, job)
    train(name, source, "of-source")
    train(name, packed, "of-packed")
    for target in (source, packed):
        runner = Runner(target, dtype=torch.float32)
        plain = runner.generate([[5, 6, 7]], max_new_tokens=8)
        for heads in ("of-source", "of-packed"):
            runner.use(str(tmp_path / heads))
            results = runner.generate([[5, 6, 7]], max_new_tokens=8)
            assert results[0].token_ids == plain[0].token_ids and results[0].drafted > 0


@pytest.mark.parametrize("name", MOST_SLOW)
def test_a_stopped_run_goes_on_to_the_same_bytes(
    train: Train,
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """Dropout and chosen positions are among what must be drawn again."""
    source = checkpoint("llama")
    train(name, source, "whole", steps=5)
    monkeypatch.setattr(Training, "__init__", storing_always(Training.__init__))
    with stopped(ArtifactWriter, "add_shard", after=2, only="state"):
        train(name, source, steps=5)
    assert not (tmp_path / "out").exists()
    train(name, source, steps=5)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


# Peak learning rates for a short training.
RATES = {"eagle3": 6e-3, "ppd": 2e-2, "clover": 1e-3}


@pytest.mark.slow
@pytest.mark.parametrize("model", ["stories260K", "codestory-10M"])
@pytest.mark.parametrize("name", ALL)
def test_a_short_training_pays_and_changes_nothing(
    train: Train, shared: Path, tmp_path: Path, name: str, model: str
) -> None:
    """On a real checkpoint training helps, by the estimate and by decoding."""
    source = shared / "models" / model
    data = tmp_path / "stories.jsonl"
    with gzip.open(shared / "data/text/tinystories_train.jsonl.gz", "rt") as file:
        data.write_text("".join(itertools.islice(file, 400)))
    asked: dict[str, Any] = {
        "data": [str(data)], "seq_len": 256, "batch_tokens": 1024, "held_out": 16,
        "learning_rate": RATES.get(name, 3e-3),
    }  # fmt: skip
    report = train(name, source, steps=40, **asked)
    untrained = train(name, source, "untrained", steps=0, **asked)
    assert report.tokens_per_forward > untrained.tokens_per_forward
    valid = gzip.decompress((shared / "data/text/tinystories_valid.txt.gz").read_bytes()).decode()
    stories = [story for story in valid.split("\n\n") if len(story) > 300][:20]
    prompts = [" ".join(story.split()[: 4 + i]) for i, story in enumerate(stories)]
    runner = Runner(source, dtype=torch.float32)
    plain = runner.generate(prompts, max_new_tokens=48)
    forwards = {}
    for out in ("out", "untrained"):
        runner.use(str(tmp_path / out))
        for batch_size in (1, 7):
            results = runner.generate(prompts, max_new_tokens=48, batch_size=batch_size)
            assert [r.token_ids for r in results] == [r.token_ids for r in plain]
        assert all(r.drafted > 0 for r in results)
        forwards[out] = sum(r.forwards for r in results)
    assert forwards["out"] < forwards["untrained"]
