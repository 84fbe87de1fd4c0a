"""lm-evaluation-harness's interface over our engine: its tasks ask, `Answers` answers.

Imports lm_eval, the extra `tasks`. Encoding, truncation and prefix follow the harness's own model
for transformers (`hf`, version 0.4.13), so that scores are its scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from spectool.decode.options import SamplingOptions
from spectool.errors import UsageError
from spectool.evaluate.tasks.answers import Answers, Question

# New tokens of a text where a task gives no number, as in the harness's own model.
MAX_NEW_TOKENS = 256
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty", "no_repeat_ngram_size")


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A checkpoint as the harness sees it. `template`: arguments of the chat template."""

    def __init__(self, answers: Answers, template: dict[str, Any] | None = None) -> None:
        super().__init__()
        assert answers.runner.tokenizer is not None
        self.answers, self.template = answers, template or {}
        self.tokenizer: Any = answers.runner.tokenizer

    @property
    def eot_token_id(self) -> int | None:
        """Return the id of the tokenizer's end of text, None if it has none."""
        end: int | None = self.tokenizer.eos_token_id
        return end

    @property
    def prefix_token_id(self) -> int:
        """Return the id of the token that a text without a context follows.

        Raises:
            UsageError: the tokenizer has neither a start nor an end token.
        """
        for token in (self.tokenizer.bos_token_id, self.eot_token_id):
            if token is not None:
                return int(token)
        raise UsageError(f"{self.tokenizer_name}: tasks need a start or an end token")

    @property
    def max_length(self) -> int:
        """Return the number of tokens of the model's context."""
        return self.answers.runner.target.context

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Encode a text; one that begins with the start token gets no second one."""
        if add_special_tokens is None:
            start = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = not (start and string.startswith(start))
        encoded = self.tokenizer(string, add_special_tokens=add_special_tokens, verbose=False)
        ids: list[int] = encoded["input_ids"]
        return ids

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        """Return the log-likelihood of each continuation, and whether it is the greedy one."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = self.answers.score([(context, end) for _, context, end in requests])
        return [(each.value, each.greedy) for each in found]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        """Return the log-likelihood of each text, a long one in windows that follow each other."""
        owners: list[int] = []
        pairs: list[tuple[list[int], list[int]]] = []
        for index, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for window in windows:
                owners.append(index)
                pairs.append(make_disjoint_window(window))
        sums = [0.0] * len(requests)
        for owner, found in zip(owners, self.answers.score(pairs), strict=True):
            sums[owner] += found.value
        return sums

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = True) -> list[str]:
        """Return each context's continuation, up to the first of its stop strings.

        Raises:
            UsageError: a task asks for an option of generation that there is not.
        """
        end = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        questions: list[Question] = []
        stops: list[list[str]] = []
        for request in requests:
            context, given = request.args[0], normalize_gen_kwargs(request.args[1], MAX_NEW_TOKENS)
            stops.append(handle_stop_sequences(given.pop("until", None), eos=end))
            most = int(given.pop("max_gen_toks"))
            room = self.max_length - most
            if room < 1:
                raise UsageError(
                    f"task {request.task_name} wants {most} new tokens; the model's context is "
                    f"{self.max_length}"
                )
            questions.append(
                Question(
                    tokens=self.tok_encode(context)[-room:],
                    max_new_tokens=most,
                    stop=[stop for stop in stops[-1] if stop and stop != end],
                    eos=() if self.eot_token_id is None else (self.eot_token_id,),
                    sampling=_read_sampling(request.task_name, given),
                )
            )
        return [
            postprocess_generated_text(
                self.tokenizer.decode(tokens, skip_special_tokens=True), stop, None
            )
            for tokens, stop in zip(self.answers.write(questions), stops, strict=True)
        ]

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation; its last turn stays open unless an answer is to begin."""
        rendered: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            **self.template,
        )
        return rendered

    @property
    def tokenizer_name(self) -> str:
        """Return the name under which the harness would keep rendered requests."""
        name: str = self.tokenizer.name_or_path
        return name.replace("/", "__")


def _read_sampling(task: str | None, given: dict[str, Any]) -> SamplingOptions:
    """Return the options of sampling among those of generation.

    Raises:
        UsageError: there is another option.
    """
    sampled = given.pop("do_sample", None)
    temperature = float(given.pop("temperature", 1.0 if sampled else 0.0))
    found = SamplingOptions(temperature=temperature if sampled is not False else 0.0)
    for name, value in given.items():
        if name not in _SAMPLING:
            raise UsageError(f"task {task} asks for {name}={value} in generation, which is unknown")
        if value is not None:
            found[name] = value  # type: ignore[literal-required]
    return found
