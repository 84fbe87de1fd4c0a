"""The law of whole texts through the real loop, against exact enumeration on three tokens.

The same check must reject planted faults, or it proves nothing.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from spectool.decode import verify
from spectool.decode.drafters.draft_model import DraftModelConfig, DraftModelDrafter
from spectool.decode.generate import Runner
from spectool.decode.sampling import Control, Source
from spectool.decode.tree import Draft
from spectool.decode.verify import Verdict

VOCAB = 3
LENGTH = 4
PROMPT = [0, 1, 2, 0, 1]
SAMPLES = 4000


def toy(seed: int) -> PreTrainedModel:
    """A Llama of three tokens whose laws are far from flat and differ between seeds."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.7,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


@torch.inference_mode()
def exact_law(model: PreTrainedModel, control: Control) -> dict[tuple[int, ...], float]:
    """The probability of each text of LENGTH tokens, from the model's own cacheless logits."""
    texts = list(itertools.product(range(VOCAB), repeat=LENGTH))
    logits = model(torch.tensor([PROMPT + list(text) for text in texts]), use_cache=False).logits
    law = {}
    for text, logits_SV in zip(texts, logits, strict=True):
        rows = logits_SV[len(PROMPT) - 1 : -1]
        laws = control.laws(rows[None])[0].double()
        law[text] = float(laws[range(LENGTH), list(text)].prod())
    return law


def agrees(counts: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> bool:
    """Total variation below 1.5 times its noise floor, and chi-square with p above 1e-3."""
    size = sum(counts.values())
    distance = sum(abs(counts[text] / size - p) for text, p in law.items()) / 2
    floor = sum((2 * p * (1 - p) / (torch.pi * size)) ** 0.5 for p in law.values()) / 2
    cells = [(counts[text], p * size) for text, p in law.items() if p * size >= 5]
    rest = (size - sum(c for c, _ in cells), size - sum(e for _, e in cells))
    if rest[1] >= 5:
        cells.append(rest)
    chi2 = sum((count - expected) ** 2 / expected for count, expected in cells)
    p_value = torch.special.gammaincc(
        torch.tensor((len(cells) - 1) / 2.0), torch.tensor(chi2 / 2.0)
    )
    return distance < 1.5 * floor and float(p_value) > 1e-3


def sample(runner: Runner, size: int, **options: Any) -> Counter[tuple[int, ...]]:
    results = runner.generate(
        [PROMPT] * size, max_new_tokens=LENGTH, batch_size=1000, seed=11, **options
    )
    return Counter(tuple(result.token_ids) for result in results)


def runner_for(pair: str, model: PreTrainedModel) -> Runner:
    runner = Runner(model)
    if pair == "ngram":
        runner.use("ngram:min_n=1,nodes=4,depth=2")
    if pair == "draft_model":
        config = DraftModelConfig(depth=2)
        runner.use(DraftModelDrafter(toy(1), config, target=runner.target))
    return runner


FILTERED = {"temperature": 0.8, "top_p": 0.9}


@pytest.mark.parametrize("pair", ["none", "ngram", "draft_model"])
def test_the_law_is_the_targets(pair: str) -> None:
    model = toy(0)
    runner = runner_for(pair, model)
    counts = sample(runner, SAMPLES, temperature=1.0)
    assert agrees(counts, exact_law(model, Control(temperature=1.0)))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"temperature": 1.5}, FILTERED])
@pytest.mark.parametrize("pair", ["none", "ngram", "draft_model", "draft_model+token-match"])
def test_the_law_is_the_targets_with_many_samples(pair: str, options: dict[str, float]) -> None:
    model = toy(0)
    pair, _, rule = pair.partition("+")
    counts = sample(runner_for(pair, model), 30_000, verify=rule or None, **options)
    assert agrees(counts, exact_law(model, Control(**options)))


def test_filters_hold_in_the_loop() -> None:
    model = toy(0)
    counts = sample(runner_for("draft_model", model), SAMPLES // 2, **FILTERED)
    assert agrees(counts, exact_law(model, Control(**FILTERED)))


def without_residual(draft: Draft, laws_NV: Tensor, source: Source) -> Verdict:
    verdict = verify.rejection(draft, laws_NV, source)
    return Verdict(source.pick(laws_NV, draft.depths), verdict.accept_N)


def always_likeliest(draft: Draft, laws_NV: Tensor, source: Source) -> Verdict:
    """The fault of samplers whose root token stays greedy."""
    emit_N = verify.token_match(draft, laws_NV, source).emit_N.clone()
    emit_N[0] = laws_NV[0].argmax()
    return Verdict(emit_N)


def reported(change: Callable[[Tensor], Tensor]) -> Callable[[Draft, Tensor, Source], Verdict]:
    """The rule, told that tokens were drawn from something they were not drawn from."""
    true_rule = verify.rejection

    def rule(draft: Draft, laws_NV: Tensor, source: Source) -> Verdict:
        if draft.laws_NV is not None:
            draft.laws_NV = change(draft.laws_NV)
        return true_rule(draft, laws_NV, source)

    return rule


FAULTS: dict[str, tuple[str, str, Any]] = {
    "no residual": ("draft_model", "rejection", without_residual),
    "swapped q": ("draft_model", "rejection", reported(lambda q_NV: q_NV.flip(-1))),
    "stale q": ("draft_model", "rejection", reported(lambda q_NV: q_NV[:1].expand_as(q_NV))),
    "greedy root": ("ngram", "token_match", always_likeliest),
    "greedy plain": ("none", "token_match", always_likeliest),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pair, name, rule = FAULTS[fault]
    model = toy(0)
    runner = runner_for(pair, model)
    faulty = verify.Pairing(name, rule, True)
    monkeypatch.setattr("spectool.decode.generate.rule_for", lambda *given, **options: faulty)
    counts = sample(runner, SAMPLES // 2, temperature=1.0)
    assert not agrees(counts, exact_law(model, Control(temperature=1.0)))


def test_the_pairs_drafts_are_really_used() -> None:
    """A law that is right because nothing was ever accepted or rejected would be no evidence."""
    model = toy(0)
    for pair in ("ngram", "draft_model"):
        results = runner_for(pair, model).generate(
            [PROMPT] * 200, max_new_tokens=LENGTH, batch_size=200, temperature=1.0
        )
        drafted = sum(r.drafted for r in results)
        accepted = sum(r.accepted for r in results)
        assert 0.15 * drafted < accepted < 0.85 * drafted
