"""Penalties equal transformers' processors to the bit, at every node of a tree."""

import pytest
import torch
from transformers import NoRepeatNGramLogitsProcessor, RepetitionPenaltyLogitsProcessor

from spectool.decode.control.base import ControlStates
from spectool.decode.control.bias import LogitBias
from spectool.decode.control.penalties import NoRepeatNgram, RepetitionPenalty

VOCAB = 11


def texts(number: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(VOCAB, (number, length), generator=generator).tolist()


@pytest.mark.parametrize("length", [1, 2, 5, 40, 300])
@pytest.mark.parametrize("penalty", [0.7, 1.3, 2.0])
def test_repetition_equals_transformers(length: int, penalty: float) -> None:
    for text in texts(4, length):
        logits = torch.randn(1, VOCAB)
        expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([text]), logits.clone())
        states = ControlStates.start([RepetitionPenalty(penalty)], text[: length // 2])
        for token in text[length // 2 :]:
            states = states.advance(token)
        assert torch.equal(states.process(logits[0].clone()), expected[0])


@pytest.mark.parametrize("length", [1, 2, 5, 40, 300])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_runs_that_were_there_are_excluded_as_by_transformers(length: int, size: int) -> None:
    for text in texts(4, length):
        logits = torch.randn(1, VOCAB)
        expected = NoRepeatNGramLogitsProcessor(size)(torch.tensor([text]), logits.clone())
        states = ControlStates.start([NoRepeatNgram(size)], text[: length // 2])
        for token in text[length // 2 :]:
            states = states.advance(token)
        assert torch.equal(states.process(logits[0].clone()), expected[0])


def test_tokens_that_a_smaller_vocabulary_lacks_are_passed_over() -> None:
    """A draft model may have fewer tokens than the text that it continues."""
    controls = [RepetitionPenalty(2.0), NoRepeatNgram(2), LogitBias({9: 1.0, 1: 1.0})]
    logits = ControlStates.start(controls, [0, 9, 0, 2, 0]).process(torch.ones(5))
    assert logits.tolist() == [0.5, 2.0, -torch.inf, 1.0, 1.0]


@pytest.mark.parametrize("length", [3, 63, 64, 200])
def test_branches_of_a_tree_do_not_know_each_other(length: int) -> None:
    """Each node's states are those of the text that leads to it, wherever tables are merged."""
    (prompt,) = texts(1, length)
    controls = [RepetitionPenalty(1.7), NoRepeatNgram(2)]
    tokens, parents = [prompt[-1], 3, 4, 3, 4, 5, 3], [-1, 0, 0, 1, 1, 2, 5]
    paths = [prompt]
    for token, parent in zip(tokens[1:], parents[1:], strict=True):
        paths.append([*paths[parent], token])
    logits = torch.randn(VOCAB)
    root = ControlStates.start(controls, prompt)
    for path, states in zip(paths, root.along(tokens, parents), strict=True):
        alone = ControlStates.start(controls, path)
        assert torch.equal(states.process(logits.clone()), alone.process(logits.clone()))
    assert torch.equal(
        root.process(logits.clone()), ControlStates.start(controls, prompt).process(logits.clone())
    )
