"""Predicted acceptance, next to what decoding counts and to definitions computed slowly."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectool.data.stored_log_probs import LogProbsWriter
from spectool.data.text import Prompt
from spectool.data.windows import Windows
from spectool.decode.generate import Runner
from spectool.decode.options import SamplingParams
from spectool.errors import UnsupportedError, UsageError
from spectool.evaluate.bench import Options, bench
from spectool.evaluate.log_probs import ResidentLogProbs
from spectool.evaluate.replay import expect_steps, replay
from spectool.model.loading import hash_vocabulary

from ..conftest import tokenizer

Tiny = Callable[..., PreTrainedModel]
Checkpoint = Callable[..., Path]
PROMPT = 6
NEW = 30
PROMPTS = [[5, 6, 7, 5, 6, 7], [9, 10, 11, 9, 10, 11], [20, 21, 22, 23, 20, 21]]


def store(path: Path, model: PreTrainedModel, rows: Sequence[Sequence[int]], top_k: int) -> Path:
    """Write a reference file of a model on windows of these tokens."""
    windows = Windows((torch.tensor(rows),), len(rows[0]), None)
    size = model.config.vocab_size
    log_probs = ResidentLogProbs(model)
    with LogProbsWriter(path, windows, size, top_k=top_k) as writer:
        for batch in windows.batches(size):
            writer.add(batch, log_probs(batch))
        writer.finish(source="", tokenizer=hash_vocabulary(tokenizer()))
    return path


@pytest.fixture
def written(tiny: Tiny) -> list[list[int]]:
    """The prompts, each with what the target writes after it greedily."""
    runner = Runner(tiny("llama"))
    results = runner.generate(PROMPTS, max_new_tokens=NEW)
    rows = [[*p, *result.token_ids] for p, result in zip(PROMPTS, results, strict=True)]
    assert {len(row) for row in rows} == {PROMPT + NEW}
    return rows


@pytest.mark.parametrize("top_k", [0, 1])
@pytest.mark.parametrize(
    "spec", ["ngram", "ngram:nodes=4,depth=2", "SELF:depth=3", "SELF:tree=rsd-c,width=2"]
)
def test_the_targets_greedy_text_is_predicted_exactly(
    tiny: Tiny,
    checkpoint: Checkpoint,
    written: list[list[int]],
    tmp_path: Path,
    spec: str,
    top_k: int,
) -> None:
    # A draft model that is often right: the target after a rounding.
    rounded = checkpoint("llama", dtype=torch.float16)
    spec = spec.replace("SELF", str(rounded))
    path = store(tmp_path / "stored", tiny("llama"), written, top_k)
    found = replay(path, [spec], prompt_tokens=PROMPT)
    (predicted,) = found.predictions
    runner = Runner(tiny("llama"), tokenizer=tokenizer())
    how = Options(drafts=[spec], max_new_tokens=NEW, protocol="speed-bench")
    (row,) = bench(runner, [Prompt(ids) for ids in PROMPTS], how).drafters
    assert found.greedy_share == 1 and predicted.is_exact and found.tokens == row.new_tokens
    assert predicted.tokens_per_forward.value == pytest.approx(row.tokens_per_forward, abs=1e-12)
    assert predicted.along_text.value == pytest.approx(row.tokens_per_forward, abs=1e-12)
    assert predicted.acceptance_by_depth == pytest.approx(row.acceptance_by_depth)
    assert predicted.acceptance.value == pytest.approx(row.acceptance_by_depth[0])
    bounds = predicted.tokens_per_forward
    assert bounds.lower <= bounds.value <= bounds.upper
    assert row.tokens_per_forward > 1


def test_tables_are_filled_as_in_decoding(
    tiny: Tiny, written: list[list[int]], tmp_path: Path
) -> None:
    path = store(tmp_path / "stored", tiny("llama"), written, 8)
    trigram, recycle = replay(path, ["trigram", "recycle"], prompt_tokens=PROMPT).predictions
    results = Runner(tiny("llama"), draft="trigram").generate(PROMPTS, max_new_tokens=NEW)
    forwards = sum(result.forwards for result in results)
    assert trigram.tokens_per_forward.value == pytest.approx(NEW * 3 / forwards, abs=1e-12)
    assert trigram.is_exact and not recycle.is_exact
    assert recycle.note is not None and "rejected" in recycle.note
    assert recycle.tokens_per_forward.value > 1


def test_a_text_of_another_hand_ends_no_step_that_the_target_would_go_on(
    tiny: Tiny, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """Kaplan and Meier's estimate, of a draft model that is the target: it is never rejected."""
    torch.manual_seed(1)
    rows = torch.randint(2, 200, (3, PROMPT + NEW)).tolist()
    path = store(tmp_path / "stored", tiny("llama"), rows, 0)
    spec = f"{checkpoint('llama')}:depth=3"
    found = replay(path, [spec], prompt_tokens=PROMPT)
    (predicted,) = found.predictions
    assert found.greedy_share < 0.2 and not predicted.is_exact
    assert predicted.along_text.value < 1.2
    assert predicted.acceptance.value == 1
    # Only prefills and the last steps, of no draft, are known to end.
    assert predicted.tokens_per_forward.value > predicted.along_text.value
    assert all(share == 1 for share in predicted.acceptance_by_depth)


def test_expected_steps_are_those_of_rejection_sampling_over_all_texts() -> None:
    """The steps given each text, weighted by its probability, are those of all possible drafts."""
    size, length, depth = 3, 4, 2
    generator = torch.Generator().manual_seed(3)
    laws: dict[tuple[str, tuple[int, ...]], Tensor] = {}

    def law(which: str, text: tuple[int, ...]) -> Tensor:
        if (which, text) not in laws:
            drawn = torch.rand(size, generator=generator, dtype=torch.float64) ** 2
            laws[which, text] = drawn / drawn.sum()
        return laws[which, text]

    def run(text: tuple[int, ...]) -> float:
        """Return the expected steps from a text on, over all drafts and their verdicts."""
        left = length - len(text)
        if not left:
            return 0.0
        num_drafted, total = min(depth, left - 1), 1.0

        def descend(accepted: tuple[int, ...], chance: float) -> float:
            at = text + accepted
            p = law("p", at)
            if len(accepted) == num_drafted:
                return sum(chance * float(p[x]) * run((*at, x)) for x in range(size))
            q, found = law("q", at), 0.0
            rest = (p - q).clamp(min=0)
            for x in range(size):
                both = float(torch.minimum(p[x], q[x]))
                found += descend((*accepted, x), chance * both)
                found += chance * float(rest[x]) * run((*at, x))
            return found

        return total + descend((), 1.0)

    expected = 0.0
    for text in itertools.product(range(size), repeat=length):
        chance, taken = 1.0, []
        for at, x in enumerate(text):
            p, q = float(law("p", text[:at])[x]), float(law("q", text[:at])[x])
            chance *= p
            taken.append(min(1.0, q / p))
        # The roots are the tokens before the text: index 0 is the last of the prompt.
        expected += chance * sum(expect_steps(taken, depth=depth, start=0, last=length)[:length])
    assert expected == pytest.approx(run(()), abs=1e-12)


def walk_slowly(
    row: list[int], target: PreTrainedModel, draft: PreTrainedModel, sampling: SamplingParams
) -> tuple[float, float, float]:
    """Return the expected forwards, first tokens accepted, and steps that draft, of a window.

    Every sequence of steps of at most two drawn tokens is walked with its probability.
    """
    p_LV, q_LV = (
        sampling.probs(model(input_ids=torch.tensor([row])).logits.detach())[0].double()
        for model in (target, draft)
    )
    last, sums = len(row) - 1, [1.0, 0.0, 0.0]

    def visit(root: int, weight: float) -> None:
        if root == last:
            return
        sums[0] += weight
        most, reached = min(2, last - root - 1), weight
        if most:
            sums[1] += weight * float(torch.minimum(p_LV[root], q_LV[root]).sum())
            sums[2] += weight
        for accepted in range(most):
            p, q = (float(each[root + accepted, row[root + accepted + 1]]) for each in (p_LV, q_LV))
            visit(root + accepted + 1, reached * (1 - min(1.0, q / p)))
            reached *= min(1.0, q / p)
        visit(root + most + 1, reached)

    visit(PROMPT, 1.0)
    return sums[0], sums[1], sums[2]


@pytest.mark.parametrize(
    ("top_k", "sampling"),
    [(0, SamplingParams(temperature=0.8)), (20, SamplingParams(temperature=1.0, top_k=12))],
)
def test_sampling_sums_the_laws_of_both_models(
    tiny: Tiny, checkpoint: Checkpoint, tmp_path: Path, top_k: int, sampling: SamplingParams
) -> None:
    results = Runner(tiny("llama")).generate(PROMPTS, max_new_tokens=NEW, **sampling.as_dict())
    shortest = min(12, *(len(result.token_ids) for result in results))
    assert shortest > 5
    pairs = zip(PROMPTS, results, strict=True)
    rows = [[*prompt, *result.token_ids[:shortest]] for prompt, result in pairs]
    path = store(tmp_path / "stored", tiny("llama"), rows, top_k)
    spec = f"{checkpoint('llama', seed=1)}:depth=2"
    found = replay(path, [spec, "ngram"], sampling=sampling, prompt_tokens=PROMPT)
    parts = [walk_slowly(row, tiny("llama"), tiny("llama", 1), sampling) for row in rows]
    forwards, chance, drafts = (sum(each) for each in zip(*parts, strict=True))
    drawn, looked_up = found.predictions
    assert drawn.tokens_per_forward.value == pytest.approx(3 * shortest / forwards, rel=1e-4)
    assert drawn.acceptance.value == pytest.approx(chance / drafts, rel=1e-4)
    assert drawn.acceptance_by_depth == [] and not drawn.is_exact
    assert looked_up.tokens_per_forward == looked_up.along_text
    assert 0 <= looked_up.acceptance.value < 1


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("skip", UnsupportedError, "reads states of the model, or runs it"),
        ("auto", UsageError, "cannot be tuned"),
        ("ngram:tune", UsageError, "cannot be tuned"),
        ("jacobi", UnsupportedError, "reads states of the model"),
    ],
)
def test_what_cannot_be_replayed_is_refused(
    tiny: Tiny,
    written: list[list[int]],
    tmp_path: Path,
    spec: str,
    error: type[Exception],
    words: str,
) -> None:
    path = store(tmp_path / "stored", tiny("llama"), written, 0)
    with pytest.raises(error, match=words):
        replay(path, [spec], prompt_tokens=PROMPT)


def test_sampling_that_the_file_cannot_tell_is_refused(
    tiny: Tiny, checkpoint: Checkpoint, written: list[list[int]], tmp_path: Path
) -> None:
    path = store(tmp_path / "stored", tiny("llama"), written, 4)

    def refuse(words: str, spec: str = "ngram", prompt_tokens: int = 4, **given: float) -> None:
        with pytest.raises((UsageError, UnsupportedError), match=words):
            sampling = SamplingParams(**given)  # type: ignore[arg-type]
            replay(path, [spec], sampling=sampling, prompt_tokens=prompt_tokens)

    refuse("keeps the 4 likeliest", temperature=1.0)
    refuse("keeps the 4 likeliest", temperature=1.0, top_k=5)
    refuse("knows no penalties", repetition_penalty=1.1)
    tree = f"{checkpoint('llama')}:tree=iid"
    refuse("chains of a fixed depth alone", tree, temperature=1.0, top_k=4)
    refuse("leaves nothing of a window", prompt_tokens=PROMPT + NEW - 1)
