"""transformers' streamers get what is generated."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

import spectool
from spectool.decode.generate import Runner
from spectool.errors import UsageError

PROMPTS = ["def make", "import torch", "return the"]


class Recorder(BaseStreamer):
    """A streamer that records its calls."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.values: list[list[int] | str] = []

    def put(self, value: torch.Tensor) -> None:
        assert value.dtype == torch.long
        self.shapes.append(tuple(value.shape))
        self.values.append(value.flatten().tolist())

    def end(self) -> None:
        self.values.append("end")


@pytest.fixture
def opened(checkpoint: Callable[..., Path], endless: Any) -> Runner:
    runner = Runner(checkpoint("llama"), draft="ngram")
    endless(runner.target.model)
    return runner


@pytest.mark.parametrize("with_callback", [False, True])
def test_prompts_then_steps_then_an_end_each(opened: Runner, with_callback: bool) -> None:
    recorder = Recorder()
    steps: list[list[int]] = []
    prompts = [[5, 6, 7, 5, 6], [9, 8, 9]]
    results = opened.generate(
        prompts,
        max_new_tokens=20,
        streamer=recorder,
        on_tokens=(lambda i, tokens, text, drafted: steps.append(tokens))
        if with_callback
        else None,
    )
    middle = recorder.values.index("end")
    parts = recorder.values[: middle + 1], recorder.values[middle + 1 :]
    for prompt, result, values in zip(prompts, results, parts, strict=True):
        assert values[0] == prompt
        assert [token for step in values[1:-1] for token in step] == result.token_ids
        assert len(values) - 2 == result.forwards
        assert values[-1] == "end" and values.count("end") == 1
    assert recorder.shapes[0] == (1, 5)
    assert all(len(shape) == 1 for shape in recorder.shapes[1 : middle - 1])
    assert any(shape[0] > 1 for shape in recorder.shapes[1:]), "nothing was accepted"
    if with_callback:
        assert steps == [v for v in recorder.values if v not in [*prompts, "end"]]
    assert results == opened.generate(prompts, max_new_tokens=20)


def test_a_text_streamer_prints_the_text(
    opened: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert opened.tokenizer is not None
    for skip_prompt in (True, False):
        streamer = TextStreamer(opened.tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        results = opened.generate(PROMPTS, max_new_tokens=25, streamer=streamer)
        shown = ("" if skip_prompt else p for p in PROMPTS)
        expected = "".join(p + r.text + "\n" for p, r in zip(shown, results, strict=True))
        assert capsys.readouterr().out == expected


def test_an_iterator_in_another_thread_gets_the_text(checkpoint: Callable[..., Path]) -> None:
    path = checkpoint("llama")
    tokenizer = Runner(path).tokenizer
    assert tokenizer is not None
    streamer = TextIteratorStreamer(
        tokenizer, skip_prompt=True, timeout=60, skip_special_tokens=True
    )
    results: list[Any] = []
    player = threading.Thread(
        target=lambda: results.extend(
            spectool.generate(
                path, prompts=PROMPTS, draft="ngram", max_new_tokens=25, streamer=streamer
            )
        )
    )
    player.start()
    texts = ["".join(streamer) for _ in PROMPTS]
    player.join()
    assert texts == [result.text for result in results]


def test_a_streamer_is_ended_when_generation_fails(
    opened: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    for options in ({"temperature": -1.0}, {"stop": [""]}, {"batch_size": 2}):
        recorder = Recorder()
        with pytest.raises(UsageError):
            opened.generate([[5, 6]], streamer=recorder, **options)
        assert recorder.values == ["end"]
    recorder = Recorder()
    monkeypatch.setattr(opened.target, "verify", None)
    with pytest.raises(TypeError):
        opened.generate([[5, 6], [7]], streamer=recorder)
    assert recorder.values[0] == [5, 6] and recorder.values[2:] == ["end"]


def test_what_ctrl_c_leaves_comes_before_the_end(
    opened: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    observe, left = opened.drafter.observe, 3

    def struck(outcomes: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        observe(outcomes)

    # Between a commit and its report to the streamer.
    monkeypatch.setattr(opened.drafter, "observe", struck)
    recorder = Recorder()
    results = opened.generate([[5, 6, 7]], streamer=recorder, keep_interrupted=True)
    assert results[0].finish_reason == "interrupted"
    assert [token for step in recorder.values[1:-1] for token in step] == results[0].token_ids
    assert recorder.values[-1] == "end" and recorder.values.count("end") == 1


def test_a_batch_has_no_streamer(opened: Runner) -> None:
    with pytest.raises(UsageError, match="a streamer takes one prompt at a time"):
        opened.generate([[5], [6]], batch_size=2, streamer=Recorder())
