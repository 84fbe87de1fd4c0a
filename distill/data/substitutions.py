"""Labels of drafted tokens by their effect on the answer: the data of a judge head.

For a prompt the target writes its greedy reply. The places where the draft model prefers another
token are then visited from left to right. Each time the draft model's token is put in, and the
target goes on from there. Does it come to the answer of its own first reply? Then the token is
unimportant, and the new text is kept; else it is important, and the text before is restored. So
every token is seen after a text as judge decoding leaves it behind.

The answer that counts is the target's own, not the right one: a token is to change nothing in what
the target would have written, also where that is wrong. Compared with the right answer every token
of a wrong reply would be important, or none.

Source: Garipov et al., AutoJudge, 2025 (arXiv:2504.20039), section 3 and algorithm 1. Shapes: R
substitutions, L tokens of a text, D width of both models' states together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from spectool.data.text import read_prompts
from spectool.decode.generate import Runner
from spectool.decode.prompts import encode
from spectool.decode.protocol import Needs
from spectool.decode.target.attention import AttentionTarget
from spectool.distill.data.samples import Sample, pad
from spectool.distill.data.texts import chunk
from spectool.distill.objectives.base import read_logits
from spectool.distill.options import JudgeOptions
from spectool.distill.teacher import read_features
from spectool.errors import TextError
from spectool.report import Reporter

# Texts that pass together.
TOGETHER = 8


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and the right answer. `ends`: tokens that end a reply besides the model's own."""

    tokens: list[int]
    ends: frozenset[int]
    answer: str


@dataclass(frozen=True, slots=True)
class Rule:
    """Limit of a reply's length, and the pattern whose last match is its answer."""

    pattern: re.Pattern[str]
    max_new_tokens: int

    @classmethod
    def of(cls, job: JudgeOptions) -> Rule:
        """Make the rule that options describe."""
        return cls(re.compile(job.answer), job.max_new_tokens)

    def find(self, text: str) -> str | None:
        """Return the answer in a text, the first group of the match if one took part in it."""
        found = None
        for match in self.pattern.finditer(text):
            found = next((group for group in match.groups() if group is not None), match[0])
        return None if found is None else found.strip()


@dataclass(frozen=True, slots=True)
class Labelled:
    """The substitutions of one prompt: states [R, D] of their tokens, and which are important.

    `is_right`: whether the target's own answer is the right one.
    """

    state_RD: Tensor
    important_R: Tensor
    is_right: bool


def read_questions(
    job: JudgeOptions, rule: Rule, tokenizer: Any, reporter: Reporter
) -> list[Question]:
    """Read prompts with their right answers; a repeated prompt is left out.

    Raises:
        TextError: a row has no answer, or there are fewer than two prompts.
    """
    found: dict[tuple[int, ...], Question] = {}
    for source in job.data:
        prompts = read_prompts(
            source,
            tokenizer,
            field=job.field,
            template=job.template or None,
            reporter=reporter,
        )
        for number, prompt in enumerate(prompts, 1):
            if not prompt.answer:
                raise TextError(
                    f"{source}: prompt {number} has no answer",
                    hint='rows are as {"prompt": "What is 2 + 3?", "answer": "5"}, both strings',
                )
            tokens = encode(prompt.given, tokenizer)
            right = rule.find(prompt.answer) or prompt.answer
            found.setdefault(tuple(tokens), Question(tokens, prompt.ends, right))
    if len(found) < 2:
        raise TextError(
            f"{', '.join(job.data)}: {len(found)} different prompts; at least 2 are needed, one to "
            "train on and one to evaluate on"
        )
    return list(found.values())


@dataclass(slots=True)
class _Walk:
    """A reply that is being changed. `at`: index in it of the next place to compare.

    `preferred`: the draft model's token at every index, None where the reply was changed.
    """

    question: Question
    reply: list[int]
    answer: str | None
    at: int = 0
    preferred: list[int] | None = None
    states: list[Tensor] = field(default_factory=list)
    important: list[bool] = field(default_factory=list)

    def find_next(self) -> bool:
        """Move on to the next place where the models differ; return whether there is one."""
        assert self.preferred is not None
        while self.at < len(self.reply) and self.reply[self.at] == self.preferred[self.at]:
            self.at += 1
        return self.at < len(self.reply)

    def substitute(self) -> list[int]:
        """Return the reply up to this place, with the draft model's token there."""
        assert self.preferred is not None
        return [*self.reply[: self.at], self.preferred[self.at]]


class Labeller:
    """Labels the substitutions of prompts; `runner` decodes the target plainly."""

    def __init__(self, runner: Runner, draft: AttentionTarget, rule: Rule) -> None:
        self.runner, self.draft, self.rule = runner, draft, rule
        self.models = [draft, AttentionTarget(runner.target.model)]

    def __call__(self, questions: Sequence[Question]) -> list[Labelled]:
        """Label the substitutions of each prompt, none where the target gives no answer."""
        replies = self._continue(questions, [[] for _ in questions])
        walks = [
            _Walk(question, reply, self.find_answer(question, reply))
            for question, reply in zip(questions, replies, strict=True)
        ]
        going = [walk for walk in walks if walk.answer is not None]
        while going:
            self._prefer([walk for walk in going if walk.preferred is None])
            going = [walk for walk in going if walk.find_next()]
            changed = [walk.substitute() for walk in going]
            states = self._read_states([w.question.tokens for w in going], changed)
            replies = self._continue([walk.question for walk in going], changed)
            for walk, state_D, reply in zip(going, states, replies, strict=True):
                important = self.find_answer(walk.question, reply) != walk.answer
                walk.states.append(state_D)
                walk.important.append(important)
                walk.at += 1
                if not important:
                    walk.reply, walk.preferred = reply, None
        width = sum(model.width for model in self.models)
        return [
            Labelled(
                torch.stack(walk.states) if walk.states else torch.zeros(0, width),
                torch.tensor(walk.important, dtype=torch.bool),
                walk.answer == walk.question.answer,
            )
            for walk in walks
        ]

    def find_answer(self, question: Question, reply: Sequence[int]) -> str | None:
        """Return the answer in the tokens of a reply."""
        ends = self.runner.end_ids() | question.ends
        kept = [token for token in reply if token not in ends]
        text: Any = self.runner.tokenizer
        return self.rule.find(text.decode(kept, skip_special_tokens=True))

    def _continue(
        self, questions: Sequence[Question], begun: Sequence[list[int]]
    ) -> list[list[int]]:
        """Let the target continue replies to their ends; return them whole."""
        ends = [self.runner.end_ids() | question.ends for question in questions]
        open_ones = [
            index
            for index, (reply, its_ends) in enumerate(zip(begun, ends, strict=True))
            if len(reply) < self.rule.max_new_tokens and not its_ends & set(reply[-1:])
        ]
        replies = [list(reply) for reply in begun]
        results = self.runner.generate(
            [questions[index].tokens + begun[index] for index in open_ones],
            max_new_tokens=[self.rule.max_new_tokens - len(begun[index]) for index in open_ones],
            eos=[questions[index].ends for index in open_ones],
            batch_size=TOGETHER,
        )
        for index, result in zip(open_ones, results, strict=True):
            replies[index] += result.token_ids
        return replies

    @torch.no_grad()
    def _prefer(self, walks: Sequence[_Walk]) -> None:
        """Set the tokens that the draft model prefers at every place of replies."""
        for part in chunk(walks, TOGETHER):
            tokens_BL = _pad([walk.question.tokens + walk.reply for walk in part])
            logits_BLV = read_logits(self.draft.model, tokens_BL.to(self.draft.device))
            best_BL = logits_BLV[..., : self.runner.target.vocab_size].argmax(-1).cpu()
            for walk, best_L in zip(part, best_BL, strict=True):
                start = len(walk.question.tokens) - 1
                walk.preferred = best_L[start : start + len(walk.reply)].tolist()

    def _read_states(
        self, prompts: Sequence[list[int]], replies: Sequence[list[int]]
    ) -> list[Tensor]:
        """Return the states [D] of both models at the last token of each text, one after other."""
        found: list[Tensor] = []
        texts = [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)]
        for part in chunk(texts, TOGETHER):
            last_B = torch.tensor([len(text) - 1 for text in part])
            states = []
            for model in self.models:
                state_BLD = read_features(model, _pad(part), Needs(final=True))["final"]
                states.append(state_BLD[torch.arange(len(part)), last_B].float().cpu())
            found += torch.cat(states, -1).clone()
        return found


def _pad(texts: Sequence[list[int]]) -> Tensor:
    """Return tokens [B, L], padded on the right."""
    return pad([Sample(text, [False] * len(text)) for text in texts])[0]


def as_tensors(labelled: Sequence[Labelled]) -> dict[str, Tensor]:
    """Concatenate the substitutions of prompts into tensors."""
    return {
        "states": torch.cat([each.state_RD for each in labelled]),
        "important": torch.cat([each.important_R for each in labelled]),
        "counts": torch.tensor([len(each.important_R) for each in labelled]),
        "right": torch.tensor([each.is_right for each in labelled]),
    }


def as_labelled(tensors: Mapping[str, Tensor]) -> list[Labelled]:
    """Split the tensors of `as_tensors` into prompts."""
    counts = tensors["counts"].tolist()
    return [
        Labelled(state_RD, important_R, bool(is_right))
        for state_RD, important_R, is_right in zip(
            torch.split(tensors["states"], counts),
            torch.split(tensors["important"], counts),
            tensors["right"],
            strict=True,
        )
    ]
