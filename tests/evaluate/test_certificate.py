"""The certificate of losslessness: what is equal, and that planted faults are found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spectool.checkpoint.tensors import open_checkpoint
from spectool.decode import verify
from spectool.decode.generate import Runner
from spectool.decode.sampling import StepRandom
from spectool.decode.target.open import open_target
from spectool.decode.tree import Draft
from spectool.decode.verify import Verdict
from spectool.evaluate import certificate
from spectool.evaluate.certificate import Certificate, Options, certify
from spectool.evaluate.certify.laws import compute_p
from spectool.evaluate.certify.rows import promises_rows
from spectool.evaluate.certify.texts import measure_gap
from spectool.kernels import build
from spectool.kernels.products import PackedProduct
from spectool.model.loading import load_model
from spectool.quantize.job import QuantizeJob
from spectool.quantize.methods.rtn import RTN
from spectool.quantize.run import quantize

Make = Callable[..., Path]

PROMPTS = [list(range(40, 60)), [7, 8, 9, 7, 8, 9, 7], [100, 3, 200, 100, 3]]
needs_kernel = pytest.mark.skipif(build.missing_products() is not None, reason="no kernel here")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer shapes and samples: what is missing shows no other property."""
    monkeypatch.setattr(certificate, "WIDTHS", (1, 2, 16))
    monkeypatch.setattr(certificate, "BATCHES", (1, 3))
    monkeypatch.setattr(certificate, "LAW_PROMPTS", 2)
    monkeypatch.setattr(certificate, "LAW_SAMPLES", 100)


@pytest.fixture(scope="module")
def packed(checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "out"
    # torch's exp and cos round the last elements of a tensor otherwise than whole vectors; heads
    # and MLP here are whole vectors of every processor.
    wide = checkpoint("llama", hidden_size=256, intermediate_size=256)
    quantize(
        open_checkpoint(wide),
        out,
        QuantizeJob(method="rtn", config=RTN.Config(bits=4), calibration=()),
    )
    return out


def run(path: Path, dtype: torch.dtype, *drafts: str, **options: Any) -> Certificate:
    opened = open_checkpoint(path)
    runner = Runner(load_model(opened, dtype=dtype))
    given: dict[str, Any] = {"max_new_tokens": 12, "batch_sizes": (1, 3), **options}
    return certify(runner, opened, PROMPTS, Options(drafts=drafts, **given))


def test_every_drafter_without_training_is_checked(checkpoint: Make) -> None:
    found = run(checkpoint("llama"), torch.float32)
    names = ["ngram", "copy", "recycle", "trigram", "jacobi", "trigram+recycle"]
    assert set(names) <= set(found.drafters) and found.broken == []
    assert found.promises == {"modules": ["texts", "laws"], "fused": ["rows", "texts", "laws"]}
    assert found.forward == ["modules", "fused"]
    assert "draft_model" not in {*found.drafters, *found.left_out}
    # Plain decoding in a batch is compared too, and so is another sample of plain texts.
    texts = {(each.forward, each.drafter, each.batch_size) for each in found.texts}
    pairs = {(n, b) for n in found.drafters for b in (1, 3)} | {("none", 3)}
    assert texts == {(forward, *pair) for forward in found.forward for pair in pairs}
    assert all(each.identical == each.prompts == 3 and not each.partings for each in found.texts)
    assert found.tokens == sum(each.tokens for each in found.texts) > 0
    assert [law.drafter for law in found.laws] == 2 * ["none", *found.drafters]
    assert all(law.degrees >= 2 and law.samples == 200 for law in found.laws)
    assert any(law.accepted for law in found.laws)
    fused = [each for each in found.rows if each.forward == "fused"]
    shapes = {(each.kind, each.width, each.batch): each.rows for each in fused}
    assert shapes["tree", 16, 3] == 48 and shapes["mixed", 16, 3] == 40
    assert 2 * len(shapes) == len(found.rows) == 2 * (2 * 3 + 3 * 3)
    assert all(each.differ == 0 for each in fused)
    assert json.loads(found.encode())["model"] == open_checkpoint(checkpoint("llama")).fingerprint()


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_packed_models_are_equal_bits(packed: Path, dtype: torch.dtype) -> None:
    found = run(packed, dtype, "recycle", "jacobi")
    assert found.promises == {key: ["rows", "texts", "laws"] for key in ("modules", "fused")}
    assert found.broken == [] and found.identical
    assert sum(each.rows for each in found.rows) > 150
    assert all(each.differ == 0 == each.largest for each in found.rows)


@needs_kernel
def test_packed_experts_by_modules_promise_no_rows(checkpoint: Make, tmp_path: Path) -> None:
    """Their router multiplies by torch."""
    job = QuantizeJob(method="rtn", config=RTN.Config(bits=4), calibration=())
    quantize(open_checkpoint(checkpoint("qwen3_moe")), tmp_path / "out", job)
    model = load_model(open_checkpoint(tmp_path / "out"), dtype=torch.float32)
    for forward, promised in (("fused", True), ("modules", False), ("fused", True)):
        assert promises_rows(open_target(model, forward=forward)) == promised


@needs_kernel
def test_a_product_that_depends_on_the_number_of_rows_is_found(
    packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = PackedProduct.__call__

    def multiply(self: PackedProduct, x: torch.Tensor, bias: Any) -> torch.Tensor:
        rows = x.numel() // x.shape[-1]
        return original(self, x, bias) * (1 + 1e-5 * (rows > 2))

    monkeypatch.setattr(PackedProduct, "__call__", multiply)
    found = run(packed, torch.float32, "recycle")
    assert len(found.broken) == 1 and "rows have other logits than alone" in found.broken[0]
    assert not found.identical
    for each in found.rows:
        # Fused layers call the products in C.
        if each.forward == "fused":
            assert each.differ == 0
            continue
        assert (each.differ > 0) == (each.width * each.batch > 2) == (each.largest > 0)


def test_texts_of_a_model_that_depends_on_the_number_of_rows_part(checkpoint: Make) -> None:
    """By modules rows are not promised to be equal bits here, but texts in float32 are."""
    opened = open_checkpoint(checkpoint("llama"))
    model: Any = load_model(opened, dtype=torch.float32)

    def disturb(module: Any, inputs: Any, logits_BNV: torch.Tensor) -> torch.Tensor:
        # Raises the second half of the vocabulary in passes of several rows.
        shifted = logits_BNV.clone()
        shifted[..., logits_BNV.shape[-1] // 2 :] += 0.2 * (logits_BNV.shape[1] > 1)
        return shifted

    model.lm_head.register_forward_hook(disturb)
    runner = Runner(model)
    found = certify(runner, opened, PROMPTS, Options(drafts=("recycle",), max_new_tokens=24))
    texts, fused = found.texts
    assert texts.identical < texts.prompts and fused.identical < fused.prompts
    assert any("rows have other logits" in each for each in found.broken)
    assert any("recycle" in each and "not plain decoding's" in each for each in found.broken)
    plain = Runner(model).generate(PROMPTS, max_new_tokens=24)
    for parting in texts.partings:
        ids = plain[parting.prompt].token_ids
        assert ids[parting.position] == parting.plain != parting.drafted
        assert parting.gap is not None and 0 <= parting.gap <= 0.2 + 1e-5


def test_the_gap_is_that_of_transformers(checkpoint: Make) -> None:
    runner = Runner(load_model(open_checkpoint(checkpoint("llama")), dtype=torch.float32))
    gap = measure_gap(runner.target, PROMPTS[0], [5, 6], 30, 31)
    with torch.inference_mode():
        logits_V = runner.target.model(torch.tensor([[*PROMPTS[0], 5, 6]])).logits[0, -1]
    assert gap == pytest.approx(float(logits_V[30] - logits_V[31]), abs=1e-5)


def test_a_sampler_with_another_law_is_found(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verifier that is greedy at the root samples other texts, of every drafter."""

    def greedy_root(draft: Draft, probs_NV: torch.Tensor, rng: StepRandom) -> Verdict:
        emit_N = verify.token_match(draft, probs_NV, rng).emit_N.clone()
        if len(draft) > 1:
            emit_N[0] = probs_NV[0].argmax()
        return Verdict(emit_N)

    choose = verify.choose_verifier

    def faulty(kinds: Any, rule: Any, **options: Any) -> verify.Verification:
        if options["temperature"] == 0:
            return choose(kinds, rule, **options)
        return verify.Verification("token_match", greedy_root, True)

    monkeypatch.setattr("spectool.decode.generate.choose_verifier", faulty)
    monkeypatch.setattr(certificate, "LAW_SAMPLES", 200)
    found = run(checkpoint("llama"), torch.float32, "recycle")
    for law in found.laws:
        assert law.p_value > 0.01 if law.drafter == "none" else law.p_value < 1e-5
    assert len(found.broken) == len(found.forward) == 2
    assert all("recycle: sampled texts have another law" in each for each in found.broken)


@pytest.mark.parametrize(
    ("statistic", "degrees", "p_value"),
    [(3.841, 1, 0.05), (18.307, 10, 0.05), (149.449, 100, 0.001), (0.0, 4, 1.0), (9.0, 0, 1.0)],
)
def test_p_values_are_those_of_tables(statistic: float, degrees: int, p_value: float) -> None:
    assert compute_p(statistic, degrees) == pytest.approx(p_value, rel=2e-3)


def test_recurrent_models_have_chains_alone(
    checkpoint: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificate, "LAW_SAMPLES", 10)
    found = run(checkpoint("mamba2"), torch.float32, "ngram", max_new_tokens=6)
    assert {each.kind for each in found.rows} == {"chain"} and found.broken == []
    assert {each.batch for each in found.rows} == {1, 3}


def test_a_lossy_drafter_breaks_no_promise(checkpoint: Make) -> None:
    how = certificate.VerifyOptions(verify="typical", lossy=True)
    found = run(
        checkpoint("llama"),
        torch.float32,
        "recycle",
        verification=how,
        sampling=certificate.SamplingParams(temperature=1.5),
    )
    assert not found.laws[1].lossless and found.broken == []
