"""Acceptance head: labels, loss and states against their equations, training, files, decoding."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer
from typer.testing import CliRunner

from spectool.checkpoint.headers import HEADS, HEADS_FILE
from spectool.checkpoint.tensors import open_checkpoint
from spectool.cli import app
from spectool.decode.drafters.draft_model import DraftModelDrafter
from spectool.decode.generate import Runner
from spectool.decode.heads.acceptance import AcceptanceHead, open_acceptance
from spectool.decode.options import SamplingParams
from spectool.decode.request import Request
from spectool.decode.sampling import Draws
from spectool.decode.target.attention import AttentionTarget
from spectool.distill.data.samples import Sample
from spectool.distill.objectives.acceptance import (
    AcceptanceObjective,
    Pair,
    acceptance,
    calibrate,
    draft_chains,
    weighted_loss,
)
from spectool.distill.train_acceptance import AcceptanceJob, AcceptanceReport, train_acceptance
from spectool.errors import CheckpointError, SpectoolError, UsageError
from spectool.training import Training

from ..stopping import stopped
from .conftest import storing_always

Checkpoints = Callable[..., Path]


def random_head(width: int, **options: Any) -> AcceptanceHead:
    torch.manual_seed(3)
    head = AcceptanceHead(AcceptanceHead.Config(**options), width)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.3)
    return head.eval()


def last_state(model: Any, tokens: list[int]) -> Tensor:
    """Return the state [D] after the final norm at the last token, by a pass of its own."""
    done = model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
    state: Tensor = done.hidden_states[-1][0, -1]
    return state


def last_probs(model: Any, tokens: list[int]) -> Tensor:
    probs: Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0, -1].softmax(-1)
    return probs


def test_the_head_is_that_of_the_equations() -> None:
    """A head that learnt a / (a + w (1 - a)) gives a."""
    head, state_RD = random_head(5, num_blocks=2, reject_weight=4.0), torch.randn(7, 5)
    for state_D, found in zip(state_RD, head.probs(state_RD), strict=True):
        for block in head.blocks:
            product = block.weight @ state_D + block.bias
            state_D = state_D + product / (1 + (-product).exp())
        rejected, accepted = (head.out.weight @ state_D + head.out.bias).exp()
        learnt = accepted / (accepted + rejected)
        torch.testing.assert_close(found / (found + 4 * (1 - found)), learnt)


def test_loss_and_labels_are_those_of_the_equations() -> None:
    torch.manual_seed(0)
    p_RV, q_RV = torch.randn(6, 9).softmax(-1), torch.randn(6, 9).softmax(-1)
    drawn_R, logits_R2 = torch.randint(9, (6,)), torch.randn(6, 2)
    label_R = acceptance(p_RV, q_RV, drawn_R)
    above = below = 0.0
    for r in range(6):
        a = min(1.0, float(p_RV[r, drawn_R[r]]) / float(q_RV[r, drawn_R[r]]))
        assert float(label_R[r]) == pytest.approx(a)
        rejected, accepted = logits_R2[r].softmax(-1).log().tolist()
        above -= a * accepted + 6 * (1 - a) * rejected
        below += a + 6 * (1 - a)
    assert float(weighted_loss(logits_R2, label_R, 6.0)) == pytest.approx(above / below, rel=1e-5)


def test_calibration_is_counted_by_bins() -> None:
    found = calibrate(torch.tensor([0.05, 0.95, 0.99, 1.0]), torch.tensor([0.25, 1.0, 0.5, 0.9]))
    assert [row["tokens"] for row in found["calibration"]] == [1, 3]
    assert found["calibration"][1]["seen"] == pytest.approx(0.8)
    assert found["calibration_error"] == pytest.approx((0.2 + 3 * 0.18) / 4)


class Beginning(random.Random):
    """Random numbers that choose one beginning of a text."""

    end = 6

    def sample(self, *given: Any, **options: Any) -> Any:
        assert self.end in given[0]
        return [self.end]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_states_and_labels_are_those_of_single_passes(tiny: Any, temperature: float) -> None:
    """In mixed texts labels follow the text and states the mix; in chains both follow the chain."""
    draft, model = AttentionTarget(tiny("llama", 1)), tiny("llama")
    pair = Pair(draft, model, temperature)
    tokens = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    sample = Sample(tokens, [False] * 4 + [True] * 6)
    objective = AcceptanceObjective.__new__(AcceptanceObjective)
    objective.pair, objective.config = pair, AcceptanceHead.Config(data_share=0.0)
    state_RD, label_R = objective.mix([Sample([3, 4], [False] * 2), sample], "seed")
    assert len(state_RD) == len(label_R) == 6

    def label(before: list[int], token: int) -> float:
        p_V, q_V = (last_probs(each, before) for each in (model, draft.model))
        if temperature == 0:
            return float(p_V.argmax() == token)
        return min(1.0, float(p_V[token] / q_V[token]))

    with torch.no_grad():
        # The drawn tokens are found by their states, since each stands where it was drawn.
        mixed = tokens[:4]
        for at, (state_D, a) in enumerate(zip(state_RD, label_R, strict=True), start=4):
            states_VD = draft.model(
                torch.tensor([[*mixed, token] for token in range(320)]), output_hidden_states=True
            ).hidden_states[-1][:, -1]
            away_V = (states_VD - state_D).abs().amax(-1)
            token = int(away_V.argmin())
            assert float(away_V[token]) < 1e-4
            assert float(a) == pytest.approx(label(tokens[:at], token), abs=1e-4)
            mixed.append(token)
    drafted = draft_chains(pair, [sample], Beginning(0))
    chain = tokens[:6]
    for state_BD, label_B in drafted:
        with torch.no_grad():
            states_VD = draft.model(
                torch.tensor([[*chain, token] for token in range(320)]), output_hidden_states=True
            ).hidden_states[-1][:, -1]
            token = int((states_VD - state_BD[0]).abs().amax(-1).argmin())
            assert torch.allclose(states_VD[token], state_BD[0], atol=1e-4)
            assert float(label_B[0]) == pytest.approx(label(chain, token), abs=1e-4)
        chain.append(token)
    assert len(chain) == 6 + 8


def request_of(tokens: list[int], index: int = 0, temperature: float = 0.0) -> Request:
    return Request(
        index=index, tokens=list(tokens), draws=Draws(0, index), max_new_tokens=100, context=256,
        sampling=SamplingParams(temperature=temperature),
    )  # fmt: skip


@pytest.mark.parametrize("threshold", [0.0, 0.6, 0.97, 1.0])
def test_chains_end_where_the_equation_says(tiny: Any, threshold: float) -> None:
    """Requests of one batch end at different depths, one token after the last that was judged."""
    draft_model = tiny("llama", 1)
    config = DraftModelDrafter.Config(depth=6, threshold=threshold)
    drafter = DraftModelDrafter(draft_model, config, target=AttentionTarget(tiny("llama")))
    head = drafter.acceptance_head = random_head(drafter.draft_model.width)
    requests = [request_of([5 + 11 * b, 6, 7 + b], b) for b in range(4)]
    drafter.add([], None)  # type: ignore[arg-type]
    lengths = []
    for request, draft in zip(requests, drafter.propose(requests, [6] * 4), strict=True):
        chain, accepted = list(request.tokens), 1.0
        with torch.no_grad():
            goes_on = True
            while len(chain) < len(request.tokens) + 6 and goes_on:
                goes_on = 1 - accepted <= threshold
                chain.append(int(last_probs(draft_model, chain).argmax()))
                accepted *= float(head.probs(last_state(draft_model, chain)[None])[0])
        assert draft.tokens == chain[len(request.tokens) - 1 :]
        lengths.append(len(draft) - 1)
    expected = {0.0: {2}, 1.0: {6}}.get(threshold)
    assert set(lengths) == expected if expected else len(set(lengths)) > 1


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_greedy_text_is_plain_text(tiny: Any, endless: Any, batch_size: int) -> None:
    runner, prompts = Runner(endless(tiny("llama"))), [[5, 6, 7], [9, 8], [40, 41, 42, 43], [7]]
    plain = runner.generate(prompts, max_new_tokens=24)
    # The target itself drafts, so that chains are accepted as far as they go.
    for seed in (0, 1):
        config = DraftModelDrafter.Config(depth=5, threshold=0.8)
        drafter = DraftModelDrafter(tiny("llama", seed), config, target=runner.target)
        drafter.acceptance_head = random_head(drafter.draft_model.width)
        runner.use(drafter)
        results = runner.generate(prompts, max_new_tokens=24, batch_size=batch_size)
        assert [r.token_ids for r in results] == [r.token_ids for r in plain]
        assert all(result.lossless for result in results)
        assert seed or sum(r.accepted for r in results) > 20


def train(
    source: Path, draft: Path, out: Path, data: str, where: Any = None, **asked: Any
) -> AcceptanceReport:
    job = AcceptanceJob(
        config=AcceptanceHead.Config(num_blocks=1),
        **{
            "draft_model": str(draft), "data": (data,), "steps": 6, "seq_len": 48,
            "batch_tokens": 256, "held_out": 4, "learning_rate": 1e-2, **asked,
        },
    )  # fmt: skip
    return train_acceptance(open_checkpoint(source), out, job, **(where or {}))


def contents(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_a_training_learns_which_tokens_are_accepted(
    checkpoint: Checkpoints, data: str, tmp_path: Path
) -> None:
    report = train(
        checkpoint("llama"), checkpoint("llama", seed=1), tmp_path / "out", data, steps=60
    )
    assert report.best["score"] > report.initial["score"] + 0.02
    assert report.best["calibration_error"] < report.initial["calibration_error"]
    record = json.loads((tmp_path / "out" / HEADS).read_text())
    assert record["training"]["calibration"] == report.best
    assert set(record["target"]["draft_model"]) == {"fingerprint", "lineage", "hidden_size"}
    tensors = load_file(tmp_path / "out" / HEADS_FILE)
    assert set(tensors) == {"blocks.0.weight", "blocks.0.bias", "out.weight", "out.bias"}


def test_a_stopped_run_goes_on_to_the_same_bytes(
    checkpoint: Checkpoints, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, draft = checkpoint("llama"), checkpoint("llama", seed=1)
    train(source, draft, tmp_path / "whole", data)
    monkeypatch.setattr(Training, "__init__", storing_always(Training.__init__))
    where = {"metrics": tmp_path / "metrics.jsonl"}
    with stopped(AcceptanceObjective, "accumulate", after=4):
        train(source, draft, tmp_path / "out", data, where)
    with pytest.raises(UsageError, match="another source"):
        train(source, checkpoint("llama", seed=2), tmp_path / "out", data)
    train(source, draft, tmp_path / "out", data, where)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    lines = where["metrics"].read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[1:]] == [*range(7)]


def test_the_target_may_write_the_texts(
    checkpoint: Checkpoints, data: str, tmp_path: Path, endless: Any
) -> None:
    report = train(
        checkpoint("llama"), checkpoint("llama", seed=1), tmp_path / "out", data, steps=1,
        regenerate=True, held_out=2, seq_len=40,
    )  # fmt: skip
    assert report.record.training["regenerate"] and report.best["predicted"] > 0


def test_weights_of_nan_end_the_training(
    checkpoint: Checkpoints, data: str, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(checkpoint("llama", seed=1), tmp_path / "broken"))
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = 1e38
    tensors["model.norm.weight"][1] = 1e38
    save_file({n: t * 1e30 if "norm.w" in n else t for n, t in tensors.items()},
              broken / "model.safetensors", {"format": "pt"})  # fmt: skip
    with pytest.raises(SpectoolError, match="NaN or infinite"):
        train(checkpoint("llama"), broken, tmp_path / "out", data)
    assert not (tmp_path / "out").exists()


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


def test_the_command_and_what_its_result_is_for(
    checkpoint: Checkpoints, data: str, tmp_path: Path
) -> None:
    source, draft, out = checkpoint("llama"), checkpoint("llama", seed=1), tmp_path / "head"
    words = ["train-heads", "acceptance", source, out, "--draft-model", draft, "--data", data,
             "--steps", 2, "--seq-len", 48, "--batch-tokens", 256, "--held-out", 4]  # fmt: skip
    done = run(*words)
    assert done.exit_code == 0, done.stderr
    assert "plan: acceptance (num_blocks=3" in done.stderr and "predicted    seen" in done.stdout
    assert "predicted    seen" in run("inspect", out).stdout
    again = json.loads(run("inspect", out, "--json").stdout)["command"].split()
    places = {"MODEL": source, "OUT": tmp_path / "again", "DATA": data, "DRAFT": draft}
    assert run(*[places.get(word, word) for word in again[1:]]).exit_code == 0
    assert contents(tmp_path / "again") == contents(out)

    asked = ["generate", source, "--prompt", "def run(", "--max-new-tokens", 9, "--json"]
    plain = json.loads(run(*asked, "--draft", "none").stdout)
    drafted = json.loads(run(*asked, "--draft", f"{draft}:acceptance={out},threshold=0.9").stdout)
    assert drafted["results"][0]["token_ids"] == plain["results"][0]["token_ids"]
    assert drafted["lossless"] and drafted["drafter"] == "draft_model"
    for wrong, message in (
        (f"{draft}:acceptance={out},tree=iid", "the head takes chains, not tree=iid"),
        (f"{draft}:acceptance={tmp_path}", "no draft heads"),
        (f"{source}:acceptance={out}", "was trained for another draft model than"),
        (f"{out}", "its acceptance head drafts nothing itself"),
        (f"{draft}:acceptance={out},threshold=2", "must be at most 1"),
    ):
        done = run(*asked[:-1], "--draft", wrong)
        assert done.exit_code == 2 and done.stderr.count("error:") == 1, (wrong, done.stderr)
        assert message in done.stderr, (wrong, done.stderr)


def test_files_that_do_not_fit_are_refused(
    checkpoint: Checkpoints, data: str, tmp_path: Path
) -> None:
    source, draft, out = checkpoint("llama"), checkpoint("llama", seed=1), tmp_path / "head"
    train(source, draft, out, data, steps=0)
    target = Runner(source).target
    drafting = Runner(draft).target

    def opened(path: Path, to: Any = target, **options: Any) -> AcceptanceHead:
        options = {"allow_other_target": False, **options}
        return open_acceptance(path, draft=drafting, target=to, tokenizer=None, **options)

    assert opened(out).config.num_blocks == 1
    with pytest.raises(CheckpointError, match="trained for another checkpoint than"):
        opened(out, drafting)
    opened(out, drafting, allow_other_target=True)
    tensors = load_file(out / HEADS_FILE)
    for number, (change, message) in enumerate((
        ({"out.bias": torch.tensor([math.nan, 0])}, "NaN or infinite"),
        ({"out.bias": torch.zeros(3)}, "are not those of its options"),
        ({"more": torch.zeros(3)}, "are not those of its options"),
    )):  # fmt: skip
        damaged = Path(shutil.copytree(out, tmp_path / f"damaged-{number}"))
        save_file({**tensors, **change}, damaged / HEADS_FILE)
        with pytest.raises(CheckpointError, match=message):
            opened(damaged, checksums=False)
    other = Path(shutil.copytree(draft, tmp_path / "other"))
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<|another|>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(CheckpointError, match="its tokenizer is not that of"):
        train(source, other, tmp_path / "new", data)
    assert not list(tmp_path.glob("new*"))
