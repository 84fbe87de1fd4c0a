from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from spectool.errors import NotFinite, TextError, UnsupportedError
from spectool.evaluate.audit.inverter import invert
from spectool.evaluate.audit.logprobs import audit_logprobs, measure_rank
from spectool.evaluate.audit.options import LogprobsOptions
from spectool.model.lm_head import read_lm_head
from spectool.shared_options import LoadOptions

Checkpoint = Callable[..., Path]


@pytest.mark.parametrize("rank", [1, 7, 20])
def test_the_rank_is_where_the_singular_values_fall(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, rank, generator=generator) for n in (60, 50))
    logp = torch.log_softmax(left @ right.T, -1)
    found, step = measure_rank(logp)
    assert found == rank and step > 1e3


def test_the_lm_head_is_what_it_computes_with(tiny: Callable[..., torch.nn.Module]) -> None:
    model = tiny("llama")
    weight_VD, bias_V = read_lm_head(model)  # type: ignore[arg-type]
    assert torch.equal(weight_VD, model.get_output_embeddings().weight)  # type: ignore[operator]
    assert not bias_V.any()


def test_log_probabilities_give_away_the_width_the_rest_and_the_prompt(
    checkpoint: Checkpoint,
) -> None:
    options = LogprobsOptions(
        limit=9_000, prompt_tokens=2, watched=2, steps=100, gate=("rank<=1", "inversion.exact>=0")
    )
    found = audit_logprobs(LoadOptions(model=str(checkpoint("llama"))), options)
    assert found.rank == found.width == 32 and found.step > 100
    assert found.shown == 132 == found.positions
    assert found.reconstruction_error < 2e-5 and abs(found.reconstruction_kl) < 1e-6
    inversion = found.inversion
    assert inversion.accuracy.lower > max(inversion.control.upper, inversion.chance.upper)
    assert inversion.first_only.lower > inversion.control.upper
    assert len(inversion.by_position) == 2
    assert [gate.holds for gate in found.gates] == [False, True]


def test_a_short_text_and_a_small_vocabulary_are_refused(checkpoint: Checkpoint) -> None:
    load = LoadOptions(model=str(checkpoint("llama")))
    with pytest.raises(TextError, match="the rank needs 132"):
        audit_logprobs(load, LogprobsOptions(limit=300))
    wide = checkpoint("llama", hidden_size=320)
    with pytest.raises(UnsupportedError, match="no larger than its width"):
        audit_logprobs(LoadOptions(model=str(wide)), LogprobsOptions(limit=300))


def test_prompts_are_watched_past_a_token_that_ends_texts(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    path = tmp_path / "ending"
    shutil.copytree(checkpoint("llama"), path)
    config = json.loads((path / "config.json").read_text())
    ends = {"eos_token_id": list(range(config["vocab_size"] - 1))}
    (path / "config.json").write_text(json.dumps(config | ends))
    (path / "generation_config.json").write_text(json.dumps(ends))
    options = LogprobsOptions(limit=2_500, prompts=50, prompt_tokens=2, watched=3, steps=1)
    assert audit_logprobs(LoadOptions(model=str(path)), options).inversion.watched == 3


def test_a_text_that_repeats_itself_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("a " * 3_000)
    options = LogprobsOptions(text=(str(tmp_path / "text.txt"),), steps=1)
    with pytest.raises(TextError, match="different prompts of 8 tokens; the inverter needs 10"):
        audit_logprobs(LoadOptions(model=str(checkpoint("llama"))), options)


def test_a_model_that_overflows_is_refused(overflowing: Path) -> None:
    load = LoadOptions(model=str(overflowing), dtype="float32")
    with pytest.raises(NotFinite, match=r"cannot be audited: model\.layers\.1"):
        audit_logprobs(load, LogprobsOptions(limit=9_000, steps=1))


def test_an_inverter_learns_what_there_is_and_leaves_the_global_state() -> None:
    generator = torch.Generator().manual_seed(4)
    prompts_NP = torch.randint(0, 12, (400, 2), generator=generator)
    codes = torch.randn(12, 8, generator=generator)
    # The first token is not to be seen.
    seen_NF = codes[prompts_NP[:, 1]]
    before = torch.random.get_rng_state()
    found = invert(seen_NF, prompts_NP, 300, steps=100, seed=0)
    assert torch.equal(before, torch.random.get_rng_state())
    first, last = found.right_NP.double().mean(0).tolist()
    assert last > 0.95 and first < 0.3
    control = invert(seen_NF, prompts_NP, 300, steps=100, seed=0, shuffled=True)
    assert control.right_NP.double().mean() < 0.3
