"""Loss masks of conversations and texts, and the batches of samples."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spectool.data.rows import Row
from spectool.distill.data import samples as room
from spectool.distill.data.samples import (
    Sample,
    batches,
    join,
    pack_sequences,
    pad,
    read_samples,
    split,
)
from spectool.errors import TextError

from ..conftest import tokenizer
from ..heard import Heard

TEMPLATE = (
    "{%- for m in messages -%}[{{ m['role'] }}]{{ m['content'] + '</s>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}[assistant]{%- endif -%}"
)
# Earlier answers lose what is in brackets, as templates of reasoning models do.
FORGETFUL = (
    "{%- for m in messages -%}[{{ m['role'] }}]"
    "{{ m['content'] if loop.last else m['content'].split(')')[-1] }}{{ '</s>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}[assistant]{%- endif -%}"
)
# A reasoning model's: its prompt opens a thought, and answers are written without theirs.
THINKING = (
    "{%- for m in messages -%}[{{ m['role'] }}]{{ m['content'].split(')')[-1] | trim }}"
    "{{ '</s>\n' }}"
    "{%- endfor -%}{%- if add_generation_prompt -%}[assistant](\n{%- endif -%}"
)
# The last answer gets an empty thought where it has none; earlier ones are written plainly.
HYBRID = (
    "{%- for m in messages -%}[{{ m['role'] }}]{{ '()\n' if loop.last and not add_generation_prompt"
    " and m['role'] == 'assistant' }}{{ m['content'] + '</s>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}[assistant](( {%- endif -%}"
)
# Knows no generation prompt at all.
PLAIN = "{%- for m in messages -%}[{{ m['role'] }}]{{ m['content'] + '</s>\n' }}{%- endfor -%}"
# Roles must alternate.
STRICT = (
    "{%- for m in messages if m['role'] != 'system' -%}"
    "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('alternate') }}"
    "{%- endif -%}{%- endfor -%}"
) + THINKING
TALK = [
    {"role": "system", "content": "Be brief and kind to everybody who asks"},
    {"role": "user", "content": "What does the function do with its argument?"},
    {"role": "assistant", "content": "(thinking of it) It returns the argument itself, unchanged"},
    {"role": "user", "content": "And the other one?"},
    {"role": "assistant", "content": "(once more) It raises an error that names the argument"},
]


def chatty(template: str | None = TEMPLATE) -> Any:
    changed = copy.deepcopy(tokenizer())
    changed.chat_template = template
    return changed


@pytest.fixture
def talk(tmp_path: Path) -> str:
    path = tmp_path / "talk.jsonl"
    path.write_text((json.dumps({"messages": TALK}) + "\n") * 2)
    return str(path)


def taught_text(sample: Sample) -> str:
    kept = [t for t, loss_mask in zip(sample.tokens, sample.loss_mask, strict=True) if loss_mask]
    return tokenizer().decode(kept)


def test_answers_are_taught_with_their_end(talk: str) -> None:
    (sample, _) = read_samples([talk], chatty(), seq_len=1000)
    assert taught_text(sample) == "".join(f"{m['content']}</s>\n" for m in (TALK[2], TALK[4]))
    whole = tokenizer().decode(sample.tokens)
    assert whole == "".join(f"[{m['role']}]{m['content']}</s>\n" for m in TALK)


def test_an_answer_that_the_template_rewrites_is_not_taught(talk: str) -> None:
    (sample, _) = read_samples([talk], chatty(FORGETFUL), seq_len=1000)
    assert taught_text(sample) == f"{TALK[4]['content']}</s>\n"


@pytest.mark.parametrize("template", [THINKING, HYBRID, PLAIN, STRICT])
def test_answers_are_found_however_the_template_asks_for_them(talk: str, template: str) -> None:
    """From the answer's first token to its end of turn, also where prompts open the reasoning."""
    (sample, _) = read_samples([talk], chatty(template), seq_len=1000)
    answers = [m["content"] for m in (TALK[2], TALK[4])]
    if template in (THINKING, STRICT):
        answers = [answer.split(")")[-1].strip() for answer in answers]
    assert taught_text(sample) == "".join(f"{answer}</s>\n" for answer in answers)


def test_an_answer_that_loses_its_thought_is_taught_without_it(tmp_path: Path) -> None:
    """The template drops the reasoning of earlier turns and keeps that of the last."""
    template = FORGETFUL.replace("')'", "'</think>'").replace(
        "[assistant]{%-", "[assistant]<think>{%-"
    )
    rows = [{**m, "content": m["content"].replace("(", "<think>").replace(")", "</think>")}
            for m in TALK]  # fmt: skip
    path = tmp_path / "talk.jsonl"
    path.write_text((json.dumps({"messages": rows}) + "\n") * 2)
    (sample, _) = read_samples([str(path)], chatty(template), seq_len=1000)
    answers = [m["content"] for m in (rows[2], rows[4])]
    earlier, last = answers[0].split("</think>")[-1], answers[1].removeprefix("<think>")
    assert taught_text(sample) == f"{earlier}</s>\n{last}</s>\n"


def test_a_template_that_hides_answers_is_named(talk: str) -> None:
    """The error names the template, not the data."""
    shouting = THINKING.replace("| trim", "| upper | reverse")
    message = r"talk.jsonl:1: the assistant.s answer cannot be located"
    with pytest.raises(TextError, match=message) as caught:
        read_samples([talk], chatty(shouting), seq_len=1000)
    assert caught.value.hint is not None
    assert "--template-arg" in caught.value.hint and "--field" in caught.value.hint


def test_a_conversation_knows_its_end_of_turn(talk: str) -> None:
    (sample, _) = read_samples([talk], chatty(), seq_len=1000)
    assert sample.ends == {1}


def test_of_a_text_with_its_answer_the_answer_is_taught(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    rows = [
        {"prompt": "def add(a, b):\n", "completion": "    return a + b  # the sum of both\n" * 3},
        {"instruction": "Add these two", "input": "a and b", "output": "The sum is a + b. " * 4},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    heard = Heard()
    samples = read_samples([str(path)], chatty(None), seq_len=200, reporter=heard)
    assert [taught_text(sample) for sample in samples] == [
        rows[0]["completion"],
        "\n" + rows[1]["output"],
    ]
    assert all(sample.tokens[0] == 0 and not sample.loss_mask[0] for sample in samples)
    assert heard.events[0].num_rows == 2
    # With a template an instruction is a turn; a text that goes on is none.
    samples = read_samples([str(path)], chatty(), seq_len=200)
    assert taught_text(samples[0]) == rows[0]["completion"]
    assert taught_text(samples[1]) == f"{rows[1]['output']}</s>\n"
    assert read_samples([str(path)], chatty(), seq_len=70)[0].tokens == samples[0].tokens[:70]


def test_tools_are_in_all_that_is_rendered(tmp_path: Path) -> None:
    path = tmp_path / "tools.jsonl"
    row = {"messages": TALK, "tools": [{"name": "add", "parameters": {}}]}
    path.write_text((json.dumps(row) + "\n") * 2)
    template = "{%- if tools -%}[tools]{{ tools | tojson }}{%- endif -%}" + TEMPLATE
    (sample, _) = read_samples([str(path)], chatty(template), seq_len=1000)
    assert tokenizer().decode(sample.tokens).startswith('[tools][{"type": "function"')
    assert taught_text(sample) == "".join(f"{m['content']}</s>\n" for m in (TALK[2], TALK[4]))


def test_conversations_are_cut_at_the_end(talk: str) -> None:
    whole = read_samples([talk], chatty(), seq_len=1000)[0]
    cut = read_samples([talk], chatty(), seq_len=len(whole.tokens) - 20)[0]
    assert cut.tokens == whole.tokens[:-20] and cut.loss_mask == whole.loss_mask[:-20]


def test_without_an_answer_there_is_nothing_to_learn(tmp_path: Path) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text((json.dumps({"messages": TALK[:2]}) + "\n") * 5)
    with pytest.raises(TextError, match=r"asked.jsonl: 0 samples with tokens in the loss"):
        read_samples([str(path)], chatty(), seq_len=100)


def test_text_is_taught_whole_but_for_the_start_token(tmp_path: Path) -> None:
    path = tmp_path / "plain.txt"
    text = "def f(x):\n    return x\n" * 40
    path.write_text(text)
    samples = read_samples([str(path)], tokenizer(), seq_len=50)
    assert all(s.tokens[0] == 0 and s.loss_mask == [False] + [True] * (len(s.tokens) - 1)
               for s in samples)  # fmt: skip
    assert {len(s.tokens) for s in samples[:-1]} == {50}
    assert "".join(map(taught_text, samples)) == text[: len("".join(map(taught_text, samples)))]


def test_one_text_is_too_little(tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("one text that makes one sample of some tokens, and not two")
    with pytest.raises(TextError, match="at least 2 are needed"):
        read_samples([str(path)], tokenizer(), seq_len=200)


def test_conversations_need_a_template(talk: str) -> None:
    with pytest.raises(TextError, match="no chat template"):
        read_samples([talk], chatty(None), seq_len=100)


def test_split_keeps_a_fifth_at_most_and_overlaps_nowhere() -> None:
    samples = [Sample([i] * 20, [True] * 20) for i in range(50)]
    train, held_out = split(samples, held_out=32, seed=1)
    assert sorted(train + held_out) == list(range(50)) and len(held_out) == 10
    assert split(samples, held_out=3, seed=1)[1] != split(samples, held_out=3, seed=2)[1]
    assert len(split(samples[:2], held_out=9, seed=0)[1]) == 1


def test_batches_hold_every_sample_once_an_epoch() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 90, (101,), generator=generator).tolist()
    samples = [Sample([1] * n, [True] * n) for n in lengths]
    made = batches(samples, batch_tokens=300, steps=None, epochs=2, seed=3)
    seen = [index for batch in made for index in batch]
    assert sorted(seen) == sorted([*range(101)] * 2)
    assert seen[:101] != seen[101:]
    padded = [len(b) * max(lengths[i] for i in b) for b in made]
    assert max(padded) <= 300 and sum(lengths) * 2 > 0.75 * sum(padded)
    assert batches(samples, batch_tokens=300, steps=7, epochs=9, seed=3) == made[:7]
    long = batches(samples, batch_tokens=300, steps=len(made) + 5, epochs=1, seed=3)
    assert long[: len(made)] == made and len(long) == len(made) + 5
    assert batches(samples, batch_tokens=300, steps=0, epochs=1, seed=3) == []


def test_padding_is_never_taught() -> None:
    tokens_BL, loss_mask_BL = pad([Sample([3, 4], [False, True]), Sample([5, 6, 7], [True] * 3)])
    assert tokens_BL.tolist() == [[3, 4, 0], [5, 6, 7]]
    assert loss_mask_BL.tolist() == [[False, True, False], [True, True, True]]


def test_packed_rows_hold_every_sample_once_an_epoch_and_little_else() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(5, 90, (101,), generator=generator).tolist()
    samples = [Sample([1] * n, [True] * n) for n in lengths]
    made = pack_sequences(samples, width=100, batch_tokens=300, steps=None, epochs=2, seed=3)
    seen = [index for step in made for row in step for index in row]
    assert sorted(seen) == sorted([*range(101)] * 2) and seen[:101] != seen[101:]
    rows = [sum(lengths[i] for i in row) for step in made for row in step]
    assert max(rows) <= 100 and sum(rows) > 0.97 * 100 * len(rows)
    assert {len(step) for step in made[: len(made) // 2 - 1]} == {3}
    how = {"width": 100, "batch_tokens": 300, "epochs": 1, "seed": 3}
    assert pack_sequences(samples, steps=5, **how) == made[:5]
    assert len(pack_sequences(samples, steps=len(made) + 4, **how)) == len(made) + 4
    assert pack_sequences(samples[:1], steps=2, **{**how, "batch_tokens": 32}) == [[[0]], [[0]]]


def test_joined_rows_say_which_token_is_whose() -> None:
    one, two, three = (Sample([n] * n, [n > 1] * n) for n in (1, 2, 3))
    tokens_BL, loss_mask_BL, segments_BL = join([[three, one], [two]])
    assert tokens_BL.tolist() == [[3, 3, 3, 1], [2, 2, 0, 0]]
    assert loss_mask_BL.tolist() == [[True] * 3 + [False], [True, True, False, False]]
    assert segments_BL is not None
    assert segments_BL.tolist() == [[0, 0, 0, 1], [0, 0, -1, -1]]
    tokens_BL, _, segments_BL = join([[one], [two]])
    assert tokens_BL.tolist() == [[1, 0], [2, 2]] and segments_BL is None


def test_an_endless_stream_is_read_as_far_as_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [0]

    def rows(source: str, *, field: str | None) -> Iterator[Row]:
        while True:
            asked[0] += 1
            yield Row("a text of some length that never changes and is cut at its end\n")

    monkeypatch.setattr(room, "read_rows", rows)
    found = read_samples(["hub:some/set"], tokenizer(), seq_len=64, max_tokens=500)
    assert asked[0] < 20 and 500 <= sum(len(s.tokens) for s in found) < 600
