from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from spectool.cli.events import describe
from spectool.decode.generate import Runner
from spectool.decode.options import SamplingOptions, SamplingParams
from spectool.evaluate.baselines import ASSISTED, PLAIN, PROMPT_LOOKUP, Job, open_baselines

from ..heard import Heard

PROMPTS = [[5, 6, 7, 5, 6], list(range(30, 60)) * 2, [9]]
LIMITS = [1, 14, 5]
JOBS = [Job(tokens=prompt, limit=limit) for prompt, limit in zip(PROMPTS, LIMITS, strict=True)]


@pytest.fixture
def draft(checkpoint: Callable[..., Path]) -> str:
    return str(checkpoint("llama", seed=1))


# Their caches and masks differ: full, sliding, learned positions.
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_greedy_output_is_plain_decoding(
    family: str, tiny: Callable[..., PreTrainedModel], draft: str
) -> None:
    runner = Runner(tiny(family))
    plain = runner.generate(PROMPTS, max_new_tokens=LIMITS)
    drafters = [runner.open(spec) for spec in ("ngram", draft + ":depth=2,tune")]
    found = open_baselines(runner, drafters, control=SamplingParams(), seed=0)
    assert list(found) == [PLAIN, PROMPT_LOOKUP, ASSISTED]
    for name, decode in found.items():
        results = decode(JOBS)
        assert [r.token_ids for r in results] == [r.token_ids for r in plain], name
        most = [len(r.token_ids) for r in results]
        assert all(1 <= r.forwards <= n for r, n in zip(results, most, strict=True))
        if name == PLAIN:
            assert [r.forwards for r in results] == most


def test_a_prompts_own_ends_are_the_same(tiny: Callable[..., PreTrainedModel]) -> None:
    runner = Runner(tiny("llama"))
    plain = runner.generate(PROMPTS, max_new_tokens=LIMITS)
    ends = [(), (plain[1].token_ids[3],), ()]
    ours = runner.generate(PROMPTS, max_new_tokens=LIMITS, eos=ends)
    assert len(ours[1].token_ids) <= 4 and ours[2].token_ids == plain[2].token_ids
    for decode in open_baselines(runner, [], control=SamplingParams(), seed=0).values():
        theirs = decode([replace(job, ends=own) for job, own in zip(JOBS, ends, strict=True)])
        assert [r.token_ids for r in theirs] == [r.token_ids for r in ours]


def test_penalties_are_the_same_distribution(tiny: Callable[..., PreTrainedModel]) -> None:
    runner = Runner(tiny("llama"))
    sampling = SamplingOptions(repetition_penalty=1.3, no_repeat_ngram_size=2)
    plain = runner.generate(PROMPTS, max_new_tokens=LIMITS, **sampling)
    for decode in open_baselines(runner, [], control=SamplingParams(**sampling), seed=0).values():
        assert [r.token_ids for r in decode(JOBS)] == [r.token_ids for r in plain]


def test_samples_follow_the_seed_and_the_distribution(tiny: Callable[..., PreTrainedModel]) -> None:
    runner = Runner(tiny("llama"))

    def drawn(seed: int, **sampling: float) -> list[list[int]]:
        decode = open_baselines(runner, [], control=SamplingParams(**sampling), seed=seed)[PLAIN]  # type: ignore[arg-type]
        return [result.token_ids for result in decode(JOBS)]

    hot = {"temperature": 1.2, "top_p": 0.95, "min_p": 0.01}
    assert drawn(1, **hot) == drawn(1, **hot) != drawn(2, **hot)
    greedy = [r.token_ids for r in runner.generate(PROMPTS, max_new_tokens=LIMITS)]
    assert drawn(1, temperature=1.2, top_k=1) == greedy


def test_the_checkpoints_own_settings_change_nothing_and_stay(
    checkpoint: Callable[..., Path],
) -> None:
    runner = Runner(checkpoint("llama"), dtype=torch.float32)
    settings = runner.target.model.generation_config
    settings.repetition_penalty = 9.0
    (expected,) = runner.generate(PROMPTS[1:2], max_new_tokens=12)
    for decode in open_baselines(runner, [], control=SamplingParams(), seed=0).values():
        assert decode([Job(tokens=PROMPTS[1], limit=12)])[0].token_ids == expected.token_ids
    assert runner.target.model.generation_config is settings


def test_one_assistant_for_each_checkpoint(
    tiny: Callable[..., PreTrainedModel], checkpoint: Callable[..., Path], draft: str
) -> None:
    runner = Runner(tiny("llama"))
    other = str(checkpoint("llama", seed=2))
    drafters = [runner.open(spec) for spec in (draft, draft + ":depth=1", other)]
    names = list(open_baselines(runner, drafters, control=SamplingParams(), seed=0))
    assert names[2:] == [f"{ASSISTED} by {path}" for path in (draft, other)]


def test_a_draft_with_another_head_or_a_short_context(
    tiny: Callable[..., PreTrainedModel], checkpoint: Callable[..., Path]
) -> None:
    runner, heard = Runner(tiny("gpt2")), Heard()
    wide, short = checkpoint("gpt2", vocab_size=352), checkpoint("gpt2", n_positions=32)
    drafters = [runner.open(str(path)) for path in (wide, short)]
    found = open_baselines(runner, drafters, control=SamplingParams(), seed=0, reporter=heard)
    assert list(found)[2:] == [f"{ASSISTED} by {short}"] and len(heard.events) == 1
    (line,) = describe(heard.events[0])
    assert str(wide) in line and "352" in line
    # Without its learned positions the draft would fail on the second prompt.
    plain = runner.generate(PROMPTS, max_new_tokens=LIMITS)
    results = found[f"{ASSISTED} by {short}"](JOBS)
    assert [r.token_ids for r in results] == [r.token_ids for r in plain]
