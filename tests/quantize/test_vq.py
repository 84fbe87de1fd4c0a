"""Shared vectors, and the lm_head fitted with them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import spectool
from spectool.checkpoint.headers import read_layout
from spectool.checkpoint.tensors import open_checkpoint
from spectool.cli import app
from spectool.decode.generate import Runner
from spectool.errors import UnsupportedError, UsageError
from spectool.kernels import build
from spectool.kernels.lookup import Lookup
from spectool.kernels.registry import use_kernels
from spectool.model.architecture import Architecture
from spectool.model.kernels import attach_kernels
from spectool.model.packed import PackedLinear
from spectool.quantize.base import parse_quantizer
from spectool.quantize.export import export
from spectool.quantize.ledger import measure
from spectool.quantize.lm_head.base import LmHead, LmHeadReport
from spectool.quantize.lm_head.vq import (
    VQ,
    VQLinear,
    log_mass,
    token_entropy_within_codes,
)
from spectool.quantize.pack import Packing
from spectool.quantize.plan import make_plan

from ..conftest import contents

GENERATOR = torch.Generator()
IDS_BL = torch.tensor([[5, 9, 12, 7, 7, 3]])


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def lm_head(bias_V: Tensor | None = None, vocab: int = 60, width: int = 12) -> LmHead:
    """Draw an lm_head, and a text of its top tokens after random states."""
    weight_VD = torch.randn(vocab, width, generator=noise())
    states_TD = torch.randn(900, width, generator=noise(1))
    chosen_T = (states_TD @ weight_VD.T).argmax(-1)
    return LmHead(
        weight_VD=weight_VD,
        bias_V=bias_V,
        finish=Tensor.float,
        states_TD=states_TD,
        counts_V=torch.bincount(chosen_T, minlength=vocab),
        special=(0, 1),
    )


def fitted(bias_V: Tensor | None = None, **options: Any) -> tuple[VQLinear, LmHeadReport, LmHead]:
    original, quantizer = lm_head(bias_V), VQ(VQ.Config(**options))
    found = quantizer.fit_lm_head(original, noise(), lambda share: None)
    linear = quantizer.build((60, 12))
    linear.q.load_state_dict(found.fields)
    linear.bias = torch.nn.Parameter(found.bias_V, requires_grad=False)
    return linear, found.report, original


def kl(linear: Any, weight_VD: Tensor, states_TD: Tensor) -> float:
    with torch.inference_mode():
        wanted = (states_TD @ weight_VD.T).log_softmax(-1)
        found = linear(states_TD).log_softmax(-1)
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def test_a_code_for_every_row_loses_nothing() -> None:
    weight_nm = torch.randn(20, 12, generator=noise()).half().float()
    config = VQ.Config(codes=20, width=0, frequent=0)
    fields = VQ(config).pack(weight_nm, None, noise())
    linear = VQ(config).build((20, 12))
    linear.q.load_state_dict(fields)
    assert torch.equal(linear.dequantize(), weight_nm)
    x_Tm = torch.randn(5, 12, generator=noise(2))
    with torch.inference_mode():
        assert torch.allclose(linear(x_Tm), x_Tm @ weight_nm.T, atol=1e-5)


@pytest.mark.parametrize(("width", "stages"), [(0, 1), (0, 2), (4, 1), (5, 3)])
def test_rows_are_sums_of_what_codes_name(width: int, stages: int) -> None:
    weight_nm = torch.randn(40, 12, generator=noise())
    config = VQ.Config(codes=8, width=width, stages=stages, frequent=0)
    fields = VQ(config).pack(weight_nm, None, noise())
    linear = VQ(config).build((40, 12))
    linear.q.load_state_dict(fields)
    size = width or 12
    groups = math.ceil(12 / size)
    for row in (0, 17, 39):
        want: list[float] = []
        for g in range(groups):
            part = [0.0] * size
            for s in range(stages):
                code = int(fields["codes"][row, s * groups + g])
                part = [
                    a + float(b) for a, b in zip(part, fields["codebook"][s, g, code], strict=True)
                ]
            want += part
        assert linear.dequantize()[row].tolist() == pytest.approx(want[:12], abs=1e-5)


def test_more_codes_and_more_stages_err_less() -> None:
    weight_nm = torch.randn(200, 16, generator=noise())

    def error(**options: Any) -> float:
        config = VQ.Config(**{"frequent": 0, **options})
        linear = VQ(config).build((200, 16))
        linear.q.load_state_dict(VQ(config).pack(weight_nm, None, noise()))
        return float((linear.dequantize() - weight_nm).square().sum())

    for changes in (
        [{"codes": k, "width": 0} for k in (4, 16, 64, 200)],
        [{"codes": 16, "width": 8, "stages": s} for s in (1, 2, 3)],
        [{"codes": 16, "width": w} for w in (16, 8, 4, 2)],
    ):
        errors = [error(**options) for options in changes]
        assert errors == sorted(errors, reverse=True) and errors[0] > 1.2 * errors[-1]


def test_two_levels_are_the_softmax() -> None:
    """Compare with the factored softmax, which needs the logits of codes only."""
    linear, _, text = fitted(codes=16, width=0, frequent=6, epochs=2)
    code_V = linear.q.codes[:, 0].long()
    assert linear.bias is not None
    mass_K = log_mass(linear.bias, code_V, 16)
    logit_TK = text.states_TD @ linear.q.codebook[0, 0].float().T
    with torch.inference_mode():
        want = linear(text.states_TD).log_softmax(-1)
    found = logit_TK[:, code_V] + linear.bias - (logit_TK + mass_K).logsumexp(-1)[:, None]
    assert torch.allclose(found, want, atol=1e-5)
    assert torch.allclose(found.exp().sum(-1), torch.ones(len(found)), atol=1e-5)
    empty = log_mass(torch.zeros(3), torch.tensor([0, 0, 2]), 4)
    assert empty.tolist() == pytest.approx([math.log(2), -math.inf, 0.0, -math.inf])


def test_learning_lowers_the_kl_and_more_codes_more() -> None:
    found = []
    for codes in (12, 24, 48):
        linear, metrics, original = fitted(codes=codes, width=0, frequent=6)
        assert metrics.loss_after < 0.9 * metrics.loss_start
        fresh_TD = torch.randn(400, 12, generator=noise(9))
        found.append(kl(linear, original.weight_VD, fresh_TD))
        assert found[-1] < 1.6 * metrics.loss_after
    assert found == sorted(found, reverse=True)
    _, metrics, _ = fitted(codes=16, width=3)
    assert metrics.loss_after < 0.9 * metrics.loss_start and metrics.nats_within_codes == 0


def test_special_and_frequent_tokens_share_with_nobody() -> None:
    linear, _, text = fitted(codes=16, width=0, frequent=6)
    codes = linear.q.codes[:, 0].tolist()
    apart = {*text.special, *text.counts_V.argsort(descending=True, stable=True)[:6].tolist()}
    assert all(codes.count(codes[token]) == 1 for token in apart)
    assert len(set(codes)) <= 16 < 60 and max(codes) == len(set(codes)) - 1, "unused codes go"


def test_the_bound_is_the_entropy_within_codes() -> None:
    counts_V = torch.tensor([4.0, 4.0, 8.0, 0.0], dtype=torch.float64)
    codes_VC = torch.tensor([[0], [0], [1], [1]])
    assert token_entropy_within_codes(counts_V, codes_VC) == pytest.approx(0.5 * math.log(2))
    assert token_entropy_within_codes(counts_V, torch.arange(4)[:, None]) == 0
    assert token_entropy_within_codes(torch.zeros(4, dtype=torch.float64), codes_VC) == 0


def test_a_bias_that_is_there_stays() -> None:
    bias_V = 3 * torch.randn(60, generator=noise(5))
    linear, metrics, text = fitted(bias_V, codes=32, width=3)
    with torch.inference_mode():
        wanted = (text.states_TD @ text.weight_VD.T + bias_V).log_softmax(-1)
        found = linear(text.states_TD).log_softmax(-1)
    apart = float((wanted.exp() * (wanted - found)).sum(-1).mean())
    assert apart == pytest.approx(metrics.loss_after, rel=0.4) and apart < 0.1


def test_a_shortlist_decides_by_its_rows() -> None:
    plain, _, text = fitted(codes=16, width=3)
    linear, _, _ = fitted(codes=16, width=3, shortlist=8)
    x_TD = text.states_TD[:50]
    assert linear.bias is not None and plain.bias is not None
    with torch.inference_mode():
        found, rough = linear(x_TD), plain(x_TD)
        alone = torch.cat([linear(row[None]) for row in x_TD])
    exact = x_TD @ linear.rows(slice(None)).T + linear.bias
    best = rough.topk(8, -1).indices
    assert torch.allclose(found.gather(-1, best), exact.gather(-1, best), atol=1e-4)
    rest = torch.ones_like(found, dtype=torch.bool).scatter(-1, best, False)
    assert torch.allclose(found[rest], rough[rest], atol=1e-4)
    assert torch.allclose(found, alone, atol=1e-5), "rows do not depend on each other"
    top = (x_TD @ text.weight_VD.T).argmax(-1)
    agree = [float((logits.argmax(-1) == top).float().mean()) for logits in (found, rough)]
    assert agree[0] > agree[1]


@pytest.mark.skipif(build.missing() is not None, reason="no C compiler here")
@pytest.mark.parametrize("shortlist", [0, 8])
@pytest.mark.parametrize("width", [0, 5])
def test_in_decoding_a_head_multiplies_from_tables(width: int, shortlist: int) -> None:
    linear, _, text = fitted(codes=16, width=width, frequent=4, shortlist=shortlist)
    x_TD = text.states_TD[:20]
    with torch.inference_mode():
        expected = linear(x_TD)
        choices = attach_kernels(nn.Sequential(linear), torch.float32)
        assert str(choices["vq"]) == "kernel"
        calls: list[int] = []
        assert linear.product is not None
        original = linear.product.kernel.linear
        with use_kernels(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                Lookup, "linear", lambda _, x, *rest: calls.append(len(x)) or original(x, *rest)
            )
            found, alone = linear(x_TD), torch.cat([linear(row[None]) for row in x_TD])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, alone), "rows do not depend on each other"
    assert calls == [20, *[1] * 20]


@pytest.mark.parametrize("options", [{"codes": 16, "width": 0, "frequent": 4}, {"codes": 16}])
def test_contract(check_contract: Callable[..., None], options: dict[str, Any]) -> None:
    check_contract("vq", torch.randn(42, 123) * 0.05, **options)


def test_what_cannot_be_is_refused() -> None:
    weight_nm = torch.randn(20, 8)
    with pytest.raises(UsageError, match="--codes 21: the matrix has 20 rows"):
        VQ(VQ.Config(codes=21)).pack(weight_nm, None, noise())
    with pytest.raises(UsageError, match="leave none to share"):
        VQ.Config(codes=16, width=0, frequent=16)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "gpt2", "gemma2", "opt"])
@pytest.mark.parametrize("spec", ["vq:codes=64,width=0,frequent=20", "vq:codes=32,shortlist=9"])
def test_a_model_with_a_learnt_head(
    checkpoint: Callable[..., Path],
    compress: Callable[..., Path],
    text_file: str,
    family: str,
    spec: str,
) -> None:
    source, reports = checkpoint(family), list[Any]()
    job = {
        "lm_head": parse_quantizer(spec + ",epochs=3"),
        "calibration": [text_file],
        "samples": 6,
        "seq_len": 48,
    }
    out = compress(source, "rtn", bits=8, group_size=16, job=job, reports=reports)
    metrics = reports[0].outside.lm_head
    assert metrics.loss_after < metrics.loss_start
    model: Any = spectool.load(out)
    output = model.get_output_embeddings()
    assert isinstance(output, PackedLinear) and output.bias is not None
    # The embedding stays what it was, tied or not.
    before: Any = spectool.load(source)
    assert torch.equal(model.get_input_embeddings().weight, before.get_input_embeddings().weight)
    with torch.inference_mode():
        first, second = (spectool.load(out)(IDS_BL).logits for _ in range(2))
        unpacked = spectool.load(out, runtime="dense")(IDS_BL).logits
        wanted = before(IDS_BL).logits.log_softmax(-1)
    assert torch.equal(first, second)
    assert torch.allclose(unpacked, first, atol=1e-4)
    apart = float((wanted.exp() * (wanted - first.log_softmax(-1))).sum(-1).mean())
    assert apart < 3 * metrics.loss_after + 0.5
    ledger = measure(read_layout(out))
    (entry,) = [entry for entry in ledger.entries if entry.outside]
    assert entry.name == reports[0].outside.layers[-1].name
    planned = Architecture(open_checkpoint(source))
    plan = make_plan(planned, parse_quantizer("rtn:bits=8,group_size=16"), lm_head=job["lm_head"])
    assert plan.num_parameters == ledger.num_parameters
    headers = sum(file.stat().st_size for file in out.glob("*.safetensors")) - plan.file_bytes
    assert 0 < headers < 20000
    why = "shortlist=9,.* more than a product" if "shortlist" in spec else "was fitted with a bias"
    with pytest.raises(UnsupportedError, match=why):
        export(open_checkpoint(out), out.with_name("exported"), "dense")
    # Drafting still changes no output, with any sampling options.
    runner = Runner(out, dtype=torch.float32)
    for control in ({}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}):
        plain = runner.generate([[5, 6, 7]], max_new_tokens=16, **control)
        runner.use("ngram")
        drafted = runner.generate([[5, 6, 7]], max_new_tokens=16, **control)
        if not control:
            assert drafted[0].token_ids == plain[0].token_ids
        runner.use("none")


def test_killed_before_the_head(
    checkpoint: Callable[..., Path], compress: Callable[..., Path], text_file: str
) -> None:
    job = {
        "lm_head": parse_quantizer("vq:codes=64,epochs=1"), "calibration": [text_file],
        "samples": 6, "seq_len": 32,
    }  # fmt: skip
    source = checkpoint("llama-tied")
    want = compress(source, "rtn", job=job, out="want")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Packing, "_fit_lm_head", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compress(source, "rtn", job=job)
    out = compress(source, "rtn", job=job)
    assert contents(want) == contents(out)


def test_the_command(checkpoint: Callable[..., Path], tmp_path: Path, text_file: str) -> None:
    source, out = checkpoint("llama"), tmp_path / "out"
    command = ["quantize", "rtn", str(source), str(out), "--calibration", text_file]
    command += ["--samples", "6", "--seq-len", "32"]
    runner = CliRunner()
    for wrong, message in (
        ("vq:codes=4000", "lm_head: vq:codes=4000 has more codes than the 320 rows"),
        ("vq:codes=66,width=0", "2 special and 64 frequent tokens have codes of their own"),
        ("int8", "only vq fits an lm_head"),
        ("vq:code=4", "unknown option 'code'"),
    ):
        done = runner.invoke(app, [*command, "--lm-head", wrong])
        assert done.exit_code == 2 and message in done.stderr, done.stderr
        assert not list(tmp_path.glob("out*"))
    done = runner.invoke(app, ["quantize", "vq", *command[2:]])
    assert done.exit_code == 2 and "more codes than the 32 rows" in done.stderr
    assert not list(tmp_path.glob("out*"))
    done = runner.invoke(app, [*command, "--lm-head", "vq:codes=32", "--skip", "lm_head"])
    assert (
        done.exit_code == 2
        and "--skip lm_head: lm_head is fitted by --lm-head already" in done.stderr
    )
    done = runner.invoke(app, [*command, "--lm-head", "vq:codes=32,epochs=1"])
    assert done.exit_code == 0, done.stderr
    assert "lm_head: KL from the original on held-out calibration text" in done.stdout
    command = json.loads(runner.invoke(app, ["inspect", str(out), "--json"]).stdout)["command"]
    assert "--lm-head vq:codes=32,epochs=1,frequent=64," in command
