"""Answers that the target writes anew, in the place of those that are given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from spectool.decode.generate import Runner
from spectool.distill.data.regenerate import regenerate
from spectool.distill.data.samples import Sample


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch, tiny: Callable[..., PreTrainedModel]) -> Runner:
    """The tiny Llama without an end-of-text token."""
    model = tiny("llama")
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    return Runner(model)


def sample_of(*stretches: tuple[list[int], bool], given: int = 0) -> Sample:
    return Sample(
        [token for tokens, _ in stretches for token in tokens],
        [loss_mask for tokens, loss_mask in stretches for _ in tokens],
        given,
    )


def test_text_keeps_its_first_quarter_and_goes_on_as_the_target(
    endless: Runner,
) -> None:
    tokens = [0, *range(10, 89)]
    (made,) = regenerate(
        endless,
        [sample_of((tokens[:1], False), (tokens[1:], True), given=20)],
        seq_len=80,
        temperature=0.0,
        seed=0,
        batch_size=2,
    )
    (plain,) = endless.generate([tokens[:20]], max_new_tokens=60)
    assert made.tokens == tokens[:20] + plain.token_ids
    assert made.loss_mask == [False] * 20 + [True] * 60


def test_turns_follow_the_answers_that_were_written(tiny: Callable[..., PreTrainedModel]) -> None:
    """End of turn is token 1; what the template writes after it stays."""
    model = tiny("llama")
    runner = Runner(model)
    ask, again = list(range(10, 40)), list(range(60, 70))
    answer = [*range(100, 120), 1, 77]
    given = sample_of((ask, False), (answer, True), (again, False), (answer, True))
    script = iter([[[*range(200, 220), 1]], [[*range(250, 270), 1]]])
    asked = []
    generate = runner.generate

    def written(prompts: list[list[int]], **options: object) -> object:
        asked.append([list(prompt) for prompt in prompts])
        results = generate(prompts, max_new_tokens=1)
        for result, tokens in zip(results, next(script), strict=True):
            result.token_ids[:] = tokens
            object.__setattr__(result, "finish_reason", "eos")
        return results

    runner.generate = written  # type: ignore[method-assign, assignment]
    (made,) = regenerate(runner, [given], seq_len=200, temperature=0.0, seed=0, batch_size=2)
    first, second = [*range(200, 220), 1], [*range(250, 270), 1]
    assert made.tokens == [*ask, *first, 77, *again, *second, 77]
    assert made.loss_mask == [False] * 30 + [True] * 21 + [False] * 11 + [True] * 21 + [False]
    assert asked == [[ask], [[*ask, *first, 77, *again]]]


def test_the_templates_end_of_turn_ends_an_answer(endless: Runner) -> None:
    """Though the model has no end of text, and the next turn follows."""
    ask, again = list(range(10, 40)), list(range(60, 70))
    (free,) = endless.generate([ask], max_new_tokens=30)
    end = next(token for token in free.token_ids[17:] if token not in free.token_ids[:17])
    length = free.token_ids.index(end) + 1
    answer = [*range(100, 120), end, 77]
    given = sample_of((ask, False), (answer, True), (again, False), (answer, True))
    given = dataclasses.replace(given, ends=frozenset([end]))
    (made,) = regenerate(endless, [given], seq_len=200, temperature=0.0, seed=0, batch_size=2)
    after = [*ask, *free.token_ids[:length], 77, *again]
    assert made.tokens[: len(after)] == after and made.loss_mask[30:][:length] == [True] * length


@pytest.mark.parametrize("cut_loops", [True, False])
def test_loops_end_a_sample_where_asked(endless: Runner, cut_loops: bool) -> None:
    """Greedy text of a random model soon repeats itself."""
    sample = sample_of(([0, 5, 6, 7], False), ([9] * 80, True), given=21)
    (made,) = regenerate(
        endless, [sample], seq_len=250, temperature=0.0, seed=0, batch_size=1, cut_loops=cut_loops
    )
    new = made.tokens[21:]
    (plain,) = endless.generate([made.tokens[:21]], max_new_tokens=229)
    assert new == plain.token_ids[: len(new)]
    assert (len(new) < 229) == cut_loops
