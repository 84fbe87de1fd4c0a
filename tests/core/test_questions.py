"""Questions with several turns, each asked after the answer to the one before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spectool.data.questions import read_questions
from spectool.data.text import Prompt
from spectool.errors import TextError

from ..conftest import tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
Write = Callable[..., str]


@pytest.fixture
def chatty() -> Any:
    made = tokenizer().__class__(tokenizer_object=tokenizer().backend_tokenizer, eos_token="</s>")
    made.chat_template = TEMPLATE
    return made


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def file(*rows: dict[str, Any]) -> str:
        path = tmp_path / "questions.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)))
        return str(path)

    return file


def unfold(prompt: Prompt, *answers: str) -> list[Prompt]:
    """Return a question's prompts in order, each after the answer to the one before."""
    prompts = [prompt]
    for answer in answers:
        follow = prompts[-1].follow
        assert follow is not None
        prompts.append(follow(answer))
    return prompts


def test_each_turn_follows_all_turns_and_answers_before(chatty: Any, write: Write) -> None:
    rows = [{"turns": ["one", "two", "three"], "category": "math"}, {"turns": ["alone"]}]
    first, second = read_questions(write(*rows), chatty)
    prompts = unfold(first, "yes", "no")
    texts = [chatty.decode(prompt.given) for prompt in prompts]
    end = "</s>"
    assert texts[0] == f"<user>one{end}<assistant>"
    assert texts[1] == f"<user>one{end}<assistant>yes{end}<user>two{end}<assistant>"
    assert texts[2].endswith(f"yes{end}<user>two{end}<assistant>no{end}<user>three{end}<assistant>")
    assert [prompt.num_turns for prompt in prompts] == [3, 2, 1]
    assert prompts[2].follow is None and second.follow is None
    ends = frozenset([chatty.eos_token_id])
    assert {prompt.ends for prompt in prompts} == {ends} and second.num_turns == 1
    assert [first.category, prompts[2].category, second.category] == ["conversation"] * 2 + [None]


def test_a_system_message_stays_and_given_answers_go(chatty: Any, write: Write) -> None:
    turns = [("system", "brief"), ("user", "one"), ("assistant", "theirs"), ("user", "two")]
    row = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (first,) = read_questions(write(row), chatty)
    texts = [chatty.decode(prompt.given) for prompt in unfold(first, "ours")]
    assert texts[0] == "<system>brief</s><user>one</s><assistant>"
    assert texts[1].startswith("<system>brief</s><user>one</s><assistant>ours</s><user>two")


def test_without_a_template_turns_are_lines_if_asked_for(write: Write) -> None:
    path = write({"turns": ["one", "two"]})
    with pytest.raises(TextError, match="no chat template"):
        read_questions(path, tokenizer())
    (first,) = read_questions(path, tokenizer(), field="turns")
    assert [prompt.given for prompt in unfold(first, "yes")] == ["one", "one\nyes\ntwo"]


def test_speed_benchs_categories_are_its_own_and_its_placeholders_refused(
    chatty: Any, write: Write
) -> None:
    row = {"turns": ["one"], "category": "math", "sub_category": "algebra", "question_id": "a"}
    (first,) = read_questions(write(row), chatty)
    assert first.category == "math"
    hidden = {**row, "turns": ["FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING X"]}
    with pytest.raises(TextError, match=r"jsonl:2: holds no question but a placeholder") as refused:
        read_questions(write(row, hidden), chatty)
    assert refused.value.hint is not None and "prepare_data.py" in refused.value.hint


def test_limits_count_questions(chatty: Any, write: Write) -> None:
    rows = [{"turns": [f"{n}"], "category": name} for n, name in enumerate("aabb")]
    path = write(*rows)
    assert len(read_questions(path, chatty, limit=3)) == 3
    found = read_questions(path, chatty, per_category=1)
    assert [prompt.category for prompt in found] == ["a", "b"]


def test_spec_bench_is_read_whole(shared: Path, chatty: Any) -> None:
    found = read_questions(str(shared / "data/prompts/spec_bench.jsonl.gz"), chatty)
    assert len(found) == 480 and sum(prompt.num_turns for prompt in found) == 560
