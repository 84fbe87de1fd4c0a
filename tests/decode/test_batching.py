"""Requests join and leave a running batch, and each has the tokens that it has alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from spectool.decode import engine as engine_module
from spectool.decode.control.base import Control
from spectool.decode.drafters.draft_model import DraftModelDrafter
from spectool.decode.drafters.eagle3 import Eagle3Drafter, Eagle3Heads
from spectool.decode.drafters.hydra import HydraDrafter, HydraHeads
from spectool.decode.drafters.medusa import MedusaDrafter, MedusaHeads
from spectool.decode.drafters.ppd import PPDDrafter, PPDHeads
from spectool.decode.engine import Engine, Event
from spectool.decode.generate import Runner
from spectool.decode.request import Request
from spectool.errors import NotFinite, SpectoolError, UsageError

from ..conftest import tokenizer
from .conftest import plain_text, with_exits
from .drafters.bare import disturb

Tiny = Callable[..., PreTrainedModel]

TREE = [((0,), 0.6), ((0, 0), 0.4), ((1,), 0.2), ((0, 0, 0), 0.1), ((1, 0), 0.1)]
# (tokens of the prompt, most new tokens): some end while others wait, run or are still being fed.
SIZES = [(30, 4), (1, 20), (12, 1), (70, 12), (9, 5), (41, 2), (3, 16), (18, 12)]
DRAFTERS = [
    "none",
    "ngram",
    "copy",
    "trigram",
    "recycle",
    "jacobi:window=6",
    "units:longest=3,placeholder=7",
    "skip:search=4",
    "ngram+recycle",
    "chain",
    "rsd-s",
    "exits",
    *(pytest.param(tree, marks=pytest.mark.slow) for tree in ("iid", "rsd-c")),
    "medusa",
    "hydra",
    "eagle3",
    "ppd",
]
HEADS: dict[str, tuple[Any, Any]] = {
    "medusa": (MedusaHeads, MedusaDrafter),
    "hydra": (HydraHeads, HydraDrafter),
    "eagle3": (Eagle3Heads, Eagle3Drafter),
    "ppd": (PPDHeads, PPDDrafter),
}


def open_runner(tiny: Tiny, endless: Any, name: str) -> Runner:
    model = endless(tiny("llama-deep" if name.startswith("skip") else "llama"))
    runner = Runner(model)
    if name in ("chain", "rsd-s", "iid", "rsd-c"):
        config = DraftModelDrafter.Config(tree=name, depth=3)
        runner.use(DraftModelDrafter(tiny("llama", 1), config, target=runner.target))
    elif name == "exits":
        config = DraftModelDrafter.Config(exits="auto", depth=3)
        draft = with_exits(tiny("llama", 1), [1, 2], [0.04, 0])
        runner.use(DraftModelDrafter(draft, config, target=runner.target))
    elif name in HEADS:
        torch.manual_seed(0)
        heads, drafter = HEADS[name]
        runner.use(drafter(disturb(heads(heads.Config(), model, None)).eval(), TREE))
    else:
        runner.use(name)
    return runner


def run(engine: Engine, requests: Sequence[Request], most: int = 10**6) -> list[Event]:
    """Submit requests and step until all ended, `most` times at most."""
    for request in requests:
        engine.submit(request)
    events = []
    while engine.busy and (most := most - 1) >= 0:
        events += engine.step()
    return events


def make_requests(runner: Runner, prompt_of: Any, sampled: Sequence[bool]) -> list[Request]:
    """Make requests of all sizes; every one that is sampled has params of its own."""
    return [
        runner.make_request(
            prompt_of(size, seed=index),
            index=index,
            max_new_tokens=limit,
            seed=5,
            **({"temperature": 0.5 + 0.1 * index, "top_k": 40 + index} if draws else {}),
        )
        for index, ((size, limit), draws) in enumerate(zip(SIZES, sampled, strict=True))
    ]


@pytest.mark.parametrize("name", DRAFTERS)
def test_requests_have_the_tokens_that_they_have_alone(
    tiny: Tiny, endless: Any, prompt_of: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Greedy and sampled requests share a batch, and prompts are fed in chunks."""
    runner = open_runner(tiny, endless, name)
    model = runner.target.model
    for sampled in ([False] * 8, [True, False] * 4):
        alone = make_requests(runner, prompt_of, sampled)
        expected = []
        for request, draws in zip(alone, sampled, strict=True):
            if draws:
                run(runner.engine(), [request])
                assert request.finish_reason == "length"
                expected.append(request.new_tokens)
            else:
                expected.append(plain_text(model, request.tokens, request.max_new_tokens))
        monkeypatch.setattr(engine_module, "CHUNK", 32)
        together = make_requests(runner, prompt_of, sampled)
        events = run(runner.engine(3), together)
        monkeypatch.undo()
        endless(model)
        for tokens, other in zip(expected, together, strict=True):
            assert other.new_tokens == tokens
            assert other.finish_reason == "length"
            brought = [e.tokens for e in events if e.request is other]
            assert [token for some in brought for token in some] == other.new_tokens
        assert name in ("none", "copy", "skip:search=4") or sum(r.accepted for r in together) > 0


def test_a_long_prompt_does_not_keep_others_waiting(
    tiny: Tiny, endless: Any, prompt_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every other step feeds one chunk of it, and the one after brings those that run a token."""
    monkeypatch.setattr(engine_module, "CHUNK", 16)
    runner = Runner(endless(tiny("llama")))
    engine = runner.engine(2)
    short, long = (runner.make_request(prompt_of(size), max_new_tokens=20) for size in (5, 50))
    for request in (short, long):
        engine.submit(request)
    brought = [[e.request for e in engine.step()] for _ in range(11)]
    # Prefill of the short one, then four chunks of the long one, the last with its first token.
    assert brought == [[short], *[[short], []] * 3, [short], [long], [short, long], [short, long]]


def test_a_free_row_is_taken_at_once(tiny: Tiny, endless: Any, prompt_of: Any) -> None:
    """No request waits for the slowest of a group: 10 rows of work need few steps."""
    runner = Runner(endless(tiny("llama")))
    limits = [40, 10, 10, 10, 10]
    requests = [runner.make_request(prompt_of(4), max_new_tokens=limit) for limit in limits]
    engine, steps = runner.engine(2), 0
    for request in requests:
        engine.submit(request)
    while engine.busy:
        engine.step()
        steps += 1
    # Groups of two would take 39 + 9 + 9 steps, and a prefill each.
    assert steps == 39 + 4


def test_a_request_whose_logits_are_no_numbers_ends_alone(
    tiny: Tiny, endless: Any, prompt_of: Any
) -> None:
    runner = Runner(endless(tiny("llama")), draft="ngram")
    prompts = [prompt_of(12, seed=seed) for seed in range(3)]
    plain = runner.generate(prompts, max_new_tokens=12)
    requests = [runner.make_request(prompt, max_new_tokens=12) for prompt in prompts]
    engine, passes = runner.engine(3), 0

    def spoil(module: Any, inputs: Any, output: Tensor) -> Tensor:
        nonlocal passes
        passes += 1
        if passes == 4:
            output = output.clone()
            output[1] = torch.nan
        return output

    handle = runner.target.model.get_output_embeddings().register_forward_hook(spoil)
    events = run(engine, requests)
    handle.remove()
    (failed,) = [event for event in events if event.error is not None]
    assert failed.request is requests[1] and isinstance(failed.error, NotFinite)
    count = len(requests[1].new_tokens)
    assert 0 < count < 12 and requests[1].new_tokens == plain[1].token_ids[:count]
    for index in (0, 2):
        assert requests[index].new_tokens == plain[index].token_ids


class _Breaks(Control[int]):
    """A control that fails after some tokens."""

    def start(self, tokens: Sequence[int]) -> int:
        return 0

    def advance(self, state: int, token: int) -> int:
        if state == 5:
            raise ValueError("no such state")
        return state + 1

    def process(self, state: int, logits_V: Tensor) -> Tensor:
        return logits_V


@pytest.mark.parametrize("name", ["none", "chain", "hydra"])
def test_a_request_whose_own_control_fails_ends_alone(
    tiny: Tiny, endless: Any, prompt_of: Any, name: str
) -> None:
    runner = open_runner(tiny, endless, name)
    prompts = [prompt_of(12, seed=seed) for seed in range(3)]
    plain = runner.generate(prompts, max_new_tokens=12)
    controls: list[Any] = [[], [_Breaks()], []]
    pairs = zip(prompts, controls, strict=True)
    requests = [runner.make_request(p, max_new_tokens=12, controls=own) for p, own in pairs]
    events = run(runner.engine(3), requests)
    assert [str(event.error) for event in events if event.error is not None] == ["no such state"]
    assert [requests[i].new_tokens for i in (0, 2)] == [plain[i].token_ids for i in (0, 2)]
    count = len(requests[1].new_tokens)
    assert 0 < count <= 6 and requests[1].new_tokens == plain[1].token_ids[:count]
    # Nothing of it is left: the next requests run as ever.
    assert [r.token_ids for r in runner.generate(prompts, max_new_tokens=12, batch_size=2)] == [
        r.token_ids for r in plain
    ]


class _Closes(Control[int]):
    """Excludes every token once a text, prompt included, is `length` tokens long."""

    def __init__(self, length: int) -> None:
        self.length = length

    def start(self, tokens: Sequence[int]) -> int:
        return len(tokens)

    def advance(self, state: int, token: int) -> int:
        return state + 1

    def process(self, state: int, logits_V: Tensor) -> Tensor:
        return logits_V.fill_(-torch.inf) if state >= self.length else logits_V


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", ["none", "ngram", "chain", "rsd-s", "jacobi:window=6", "hydra"])
def test_a_request_without_a_token_left_ends_alone(
    tiny: Tiny, endless: Any, prompt_of: Any, name: str, temperature: float
) -> None:
    runner = open_runner(tiny, endless, name)
    prompts = [prompt_of(12, seed=seed) for seed in range(3)]
    free = runner.generate(prompts, max_new_tokens=12, temperature=temperature)
    for kept in (0, 7):
        controls: list[Any] = [[], [_Closes(12 + kept)], []]
        requests = [
            runner.make_request(
                prompts[i],
                index=i,
                max_new_tokens=12,
                controls=controls[i],
                temperature=temperature,
            )
            for i in range(3)
        ]
        events = run(runner.engine(3), requests)
        (error,) = [event.error for event in events if event.error is not None]
        assert type(error) is SpectoolError
        assert f"prompt 2: its bans, biases and penalties exclude every token after {kept}" in str(
            error
        )
        assert [requests[i].new_tokens for i in (0, 2)] == [free[i].token_ids for i in (0, 2)]
        heard = [token for e in events if e.request is requests[1] for token in e.tokens]
        assert heard == requests[1].new_tokens and len(heard) == kept
        assert temperature or heard == free[1].token_ids[:kept]
    heard = []
    with pytest.raises(SpectoolError, match="exclude every token after 7 new ones"):
        runner.generate(
            prompts[:1],
            max_new_tokens=12,
            controls=[[_Closes(19)]],
            on_tokens=lambda index, tokens, text, drafted: heard.extend(tokens),
        )
    assert len(heard) == 7


def test_what_would_follow_the_end_of_a_text_may_be_excluded(
    tiny: Tiny, endless: Any, prompt_of: Any
) -> None:
    model, prompt = endless(tiny("llama")), prompt_of(9)
    runner = Runner(model)
    plain = runner.generate([prompt], max_new_tokens=12)[0].token_ids
    end = next(at for at in range(3, 12) if plain[at] not in plain[:at])
    config = DraftModelDrafter.Config(depth=12)
    runner.use(DraftModelDrafter(model, config, target=runner.target))
    (result,) = runner.generate(
        [prompt], max_new_tokens=12, eos=[plain[end]], controls=[[_Closes(9 + end + 1)]]
    )
    assert result.token_ids == plain[: end + 1] and result.finish_reason == "eos"


def test_a_broken_draft_model_ends_its_request_alone(
    tiny: Tiny, endless: Any, prompt_of: Any
) -> None:
    runner = Runner(endless(tiny("llama")))
    prompts = [prompt_of(12, seed=seed) for seed in range(3)]
    plain = runner.generate(prompts, max_new_tokens=12)
    others = {t for i in (0, 2) for t in (*prompts[i], *plain[i].token_ids)}
    broken = copy.deepcopy(tiny("llama", 1))
    broken.get_input_embeddings().weight.data[(set(prompts[1]) - others).pop()] = torch.nan
    broken.config._name_or_path = "./small"
    runner.use(DraftModelDrafter(broken, target=runner.target))
    requests = [runner.make_request(prompt, max_new_tokens=12) for prompt in prompts]
    events = run(runner.engine(3), requests)
    (error,) = [event.error for event in events if event.error is not None]
    assert isinstance(error, NotFinite) and "the draft model ./small gave logits" in str(error)
    assert [requests[i].new_tokens for i in (0, 2)] == [plain[i].token_ids for i in (0, 2)]


def test_generate_takes_no_events_of_other_requests(
    tiny: Tiny, endless: Any, prompt_of: Any
) -> None:
    runner = open_runner(tiny, endless, "chain")
    request = runner.make_request(prompt_of(9), max_new_tokens=12)
    engine = runner.engine()
    engine.submit(request)
    engine.step()
    with pytest.raises(UsageError, match="engine has requests of its own"):
        runner.generate([prompt_of(5)], max_new_tokens=3)
    drafter = runner.drafter
    runner.use("ngram")
    with pytest.raises(UsageError, match="engine has requests of its own"):
        runner.engine()
    runner.use(drafter)
    while engine.busy:
        engine.step()
    assert runner.generate([prompt_of(9)], max_new_tokens=12)[0].token_ids == request.new_tokens

    def submit(*args: Any) -> None:
        runner.engine().submit(runner.make_request(prompt_of(4), max_new_tokens=5))

    with pytest.raises(UsageError, match="engine has requests of its own"):
        runner.generate([prompt_of(5)], max_new_tokens=20, on_tokens=submit)
    assert not runner.engine().busy


@pytest.mark.parametrize("name", ["ngram", "chain", "eagle3"])
@pytest.mark.parametrize("which", [0, 1, 2, 3])
def test_cancel_frees_a_row(
    tiny: Tiny, endless: Any, prompt_of: Any, monkeypatch: pytest.MonkeyPatch, name: str, which: int
) -> None:
    """Two run, one is being fed, one waits; whichever is cancelled, the others go on."""
    monkeypatch.setattr(engine_module, "CHUNK", 16)
    runner = open_runner(tiny, endless, name)
    sizes = (5, 6, 60, 7)
    prompts = [prompt_of(size, seed=size) for size in sizes]
    requests = [runner.make_request(prompt, max_new_tokens=16) for prompt in prompts]
    engine = runner.engine(3)
    ids = [engine.submit(request) for request in requests]
    for _ in range(4):
        engine.step()
    engine.cancel(ids[which])
    cancelled = requests[which]
    before = list(cancelled.new_tokens)
    assert cancelled.finish_reason == "interrupted"
    events = engine.step()
    assert [event.tokens for event in events if event.request is cancelled] == [[]]
    while engine.busy:
        assert all(event.request is not cancelled for event in engine.step())
    assert cancelled.new_tokens == before
    for request, prompt in zip(requests, prompts, strict=True):
        if request is not cancelled:
            assert request.new_tokens == plain_text(runner.target.model, prompt, 16)


@pytest.mark.parametrize("name", ["chain", "eagle3"])
def test_an_interrupted_removal_does_not_keep_others_from_being_removed(
    tiny: Tiny, endless: Any, prompt_of: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    runner = open_runner(tiny, endless, name)
    plain = runner.generate([prompt_of(9)], max_new_tokens=12)
    engine = runner.engine(2)
    requests = [runner.make_request(prompt_of(9), max_new_tokens=12) for _ in range(2)]
    for request in requests:
        engine.submit(request)
    for _ in range(3):
        engine.step()
    drafter: Any = runner.drafter
    kept = drafter._draft_cache if name == "eagle3" else drafter
    select = kept._cache.select

    def interrupted(rows: Sequence[int]) -> None:
        select(rows)
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(kept._cache, "select", interrupted)
    with pytest.raises(KeyboardInterrupt):
        drafter.remove(requests[0])
    engine.close()
    assert runner.generate([prompt_of(9)], max_new_tokens=12)[0].token_ids == plain[0].token_ids


def test_cancel_releases_the_text_held_back(tiny: Tiny, endless: Any, prompt_of: Any) -> None:
    """A beginning of a stop string is text if the request ends there."""
    runner = Runner(endless(tiny("llama")), tokenizer=tokenizer())
    prompt = prompt_of(9)
    (plain,) = runner.generate([prompt], max_new_tokens=12)
    request = runner.make_request(prompt, max_new_tokens=20, stop=[plain.text + "never"])
    engine = runner.engine()
    number, streamed = engine.submit(request), ""
    for _ in range(8):
        streamed += "".join(event.text for event in engine.step())
    engine.cancel(number)
    engine.cancel(number)
    (event,) = engine.step()
    assert request.text is not None and len(event.text) > 0
    assert streamed + event.text == request.text.text


@pytest.mark.parametrize("name", ["ngram", "jacobi:window=6", "chain", "hydra", "eagle3"])
def test_nothing_is_left_of_a_request_that_ended_while_a_prompt_was_fed(
    tiny: Tiny, endless: Any, prompt_of: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The drafter drafts for the others as it does for each of them alone."""
    monkeypatch.setattr(engine_module, "CHUNK", 16)
    runner = open_runner(tiny, endless, name)
    removed, remove = list[Request](), runner.drafter.remove

    def note(request: Request) -> None:
        removed.append(request)
        remove(request)

    monkeypatch.setattr(runner.drafter, "remove", note)
    alone, together = (
        [
            runner.make_request(prompt_of(size, seed=size), max_new_tokens=limit)
            for size, limit in ((5, 3), (60, 12), (7, 12))
        ]
        for _ in range(2)
    )
    for request in alone:
        run(runner.engine(), [request])
    run(runner.engine(2), together)
    assert together[0] in removed
    for one, other in zip(alone, together, strict=True):
        assert other.new_tokens == one.new_tokens
        assert (other.drafted, other.accepted) == (one.drafted, one.accepted)


def test_a_request_that_joins_without_room_to_draft_leaves_the_draft_model_right(
    tiny: Tiny, endless: Any, prompt_of: Any
) -> None:
    """Its text never passes through the draft model, whose cache keeps its rows in step."""
    runner = open_runner(tiny, endless, "chain")
    first = runner.make_request(prompt_of(9), max_new_tokens=20)
    engine = runner.engine(3)
    engine.submit(first)
    for _ in range(2):
        engine.step()
    run(engine, [runner.make_request(prompt_of(6, seed=s), max_new_tokens=2) for s in (1, 2)])
    assert first.new_tokens == runner.generate([prompt_of(9)], max_new_tokens=20)[0].token_ids
