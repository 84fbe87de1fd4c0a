"""Acceptance of a drafter predicted from a stored target's log-probabilities, without the target.

A file of `eval --save-reference` holds a text and the target's probabilities after each of its
tokens. The drafter drafts along the text as if the target were writing it. What the target would
have done off the text is not in the file, so three figures are told apart:

`along_text`: tokens per forward if each step commits the drafted tokens that the text has, and the
text's next one. Where the target wrote the text (greedily, or sampled as asked) it is what `bench`
counts on it.

Greedy, `tokens_per_forward`: the target's likeliest token after each token of the text is known, so
a step is followed until an accepted token is not the text's; there it counts as unfinished
(censored). The mean accepted length is 1 plus the sum over depths of the share that gets there, by
Kaplan and Meier's product-limit estimate (1958). A text that the target wrote greedily has no such
steps, and the figure is that of `along_text`.

Sampling, `tokens_per_forward`: of a text that was drawn from the target's distribution p, with a
drafter that draws from q, the next drafted token is accepted with sum(min(p, q)), and given that
the text has token x there, with min(1, q(x) / p(x)) (Leviathan et al. 2023). So the expected number
of steps along the text is summed exactly, without a draw. Deterministic drafts are accepted where
the text has them; the probability to accept a next one is p of the tokens drafted.

Shapes: L tokens of a window, V vocabulary, W windows, D depths.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional

from spectool import methods
from spectool.checkpoint.tensors import open_checkpoint
from spectool.data.stored_log_probs import LOWEST, StoredLogProbs
from spectool.data.windows import Batch
from spectool.decode import tree
from spectool.decode.drafters.draft_model import DraftModelDrafter
from spectool.decode.options import SamplingParams
from spectool.decode.protocol import Drafter, Outcome, PrefilledPrompt
from spectool.decode.request import Request
from spectool.decode.sampling import Draws
from spectool.decode.spec import DraftSpec, open_drafter, parse_spec
from spectool.decode.tree import Draft
from spectool.errors import UnsupportedError, UsageError
from spectool.evaluate.intervals import Interval, bootstrap
from spectool.evaluate.log_probs import ResidentLogProbs
from spectool.model.loading import hash_vocabulary, load_tokenizer

TOKENS_PER_FORWARD = (
    "tokens per forward: predicted new tokens by passes of the model, a prefill for each window "
    "included; intervals resample the windows"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Prediction of a drafter's acceptance by the stored target.

    `acceptance`: of the steps that draft, the share whose first token is accepted, or its expected
    value when sampling. `acceptance_by_depth`: as `bench` counts it, greedy only. `is_exact`: the
    text is the target's greedy text, and the drafter learns nothing from rejected nodes, so greedy
    decoding counts the same, from an empty drafter on. `note`: what makes figures approximate.
    """

    drafter: str
    tokens_per_forward: Interval
    acceptance: Interval
    along_text: Interval
    acceptance_by_depth: list[float]
    is_exact: bool
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The predictions of a run, on so many `tokens` after the windows' prompts.

    `greedy_share`: of these tokens, those that the target prefers.
    """

    windows: int
    tokens: int
    prompt_tokens: int
    greedy_share: float
    definitions: dict[str, str]
    predictions: list[Prediction]


@dataclass(slots=True)
class _Window:
    """A window's tokens, and the target's log-probabilities [L - 1, V] after all but the last."""

    tokens: list[int]
    logp_LV: Tensor
    best: list[int]


@dataclass(slots=True)
class _Counts:
    """Counts of a drafter on one window, by depth where they are lists.

    `risked` are steps known to have got to the depth before, `failed` those that ended there.
    `chance` sums the probabilities that the first drafted token is accepted, over `drafts` steps.
    """

    tokens: int = 0
    forwards: float = 0.0
    chance: float = 0.0
    drafts: float = 0.0
    risked: list[int] = field(default_factory=list)
    failed: list[int] = field(default_factory=list)
    offered: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)

    def count(self, draft: Draft, accepted: int, censored: bool) -> None:
        """Count a greedy step that accepted so many tokens, or at least so many if censored."""
        deepest = max(draft.depths)
        for depth in range(accepted + (not censored)):
            _raise(self.risked, depth)
        if not censored:
            _raise(self.failed, accepted)
        for depth in range(deepest if not censored else min(deepest, accepted)):
            _raise(self.offered, depth)
        for depth in range(accepted):
            _raise(self.accepted, depth)


def _raise(counts: list[int], index: int) -> None:
    counts += [0] * (index + 1 - len(counts))
    counts[index] += 1


def replay(
    path: Path,
    drafts: Sequence[str],
    *,
    sampling: SamplingParams | None = None,
    prompt_tokens: int = 32,
) -> Replay:
    """Predict the acceptance of drafters along the text of a reference file.

    Each window is a request of its own, whose first `prompt_tokens` tokens are its prompt.

    Raises:
        CheckpointError: `path` is no reference file.
        UnsupportedError: a drafter reads what the file does not hold.
        UsageError: a specification is wrong, sampling that the file cannot tell, or windows that
            are no longer than the prompt.
    """
    stored, sampling = StoredLogProbs(path), sampling or SamplingParams()
    _check_sampling(stored, sampling)
    shortest = min(ids_SL.shape[1] for ids_SL in stored.windows.groups)
    if shortest < prompt_tokens + 2:
        raise UsageError(
            f"--prompt-tokens {prompt_tokens}: leaves nothing of a window of {shortest} tokens"
        )
    opened = [(text, _open(text, stored, path, sampling)) for text in drafts]
    counts: list[list[_Counts]] = [[] for _ in opened]
    num_best = num_tokens = num_windows = 0
    for window in _read_windows(stored):
        num_windows += 1
        written = window.tokens[prompt_tokens:]
        num_tokens += len(written)
        num_best += sum(map(int.__eq__, window.best[prompt_tokens - 1 :], written))
        for (_, drafter), done in zip(opened, counts, strict=True):
            follow = _follow_draws if _draws(drafter, sampling) else _follow
            done.append(follow(drafter, window, num_windows - 1, prompt_tokens, sampling))
    greedy_share = num_best / num_tokens
    return Replay(
        windows=num_windows,
        tokens=num_tokens,
        prompt_tokens=prompt_tokens,
        greedy_share=greedy_share,
        definitions={"tokens_per_forward": TOKENS_PER_FORWARD},
        predictions=[
            _predict(text, drafter, done, sampling, greedy_share == 1)
            for (text, drafter), done in zip(opened, counts, strict=True)
        ],
    )


def _check_sampling(stored: StoredLogProbs, sampling: SamplingParams) -> None:
    """Raise UsageError if the file does not tell the distribution of this sampling."""
    if sampling.repetition_penalty != 1 or sampling.no_repeat_ngram_size:
        raise UsageError("--replay knows no penalties: they depend on texts off the stored one")
    kept = stored.record.top_k
    if sampling.greedy or stored.is_complete or 0 < sampling.top_k <= kept:
        return
    raise UsageError(
        f"the file keeps the {kept} likeliest tokens, too few for this sampling",
        hint=f"--top-k {kept} or fewer, or a file of eval --save-reference with --save-top-k 0",
    )


def _open(text: str, stored: StoredLogProbs, path: Path, sampling: SamplingParams) -> Drafter:
    """Open a drafter for the stored target.

    Raises:
        UnsupportedError: it reads what the file does not hold.
        UsageError: its specification is wrong, or asks for tuning.
    """
    spec = parse_spec(text)
    if spec.tune:
        raise UsageError(f"--replay {text}: trees cannot be tuned where no pass is run")
    for part in spec.parts:
        if getattr(part.config, "acceptance", None) or getattr(part.config, "judge", None):
            raise _unsupported(text, "heads of a pair of models are checked against the target")
        if part.path is not None and methods.METHODS[part.name].trainable:
            raise _unsupported(text, f"{part.name} heads read hidden states of the model")
    drafter = _open_spec(spec, stored, path)
    for each in drafter.parts:
        needs = each.needs
        if each.uses_target or needs.layers or needs.final or needs.inject or needs.probs:
            raise _unsupported(text, f"{each.name} reads states of the model, or runs it")
    if isinstance(drafter, DraftModelDrafter) and not sampling.greedy:
        config = drafter.config
        if config.tree != "chain" or config.exits:
            raise _unsupported(text, "when sampling, chains of a fixed depth alone can be replayed")
    return drafter


def _unsupported(text: str, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"--replay {text}: {why}, which a file of log-probabilities does not hold",
        hint="measure it with bench MODEL --prompts FILE --draft",
    )


def _open_spec(spec: DraftSpec, stored: StoredLogProbs, path: Path) -> Drafter:
    """Open the drafter of a specification for a target of which only the vocabulary is known."""
    size = stored.record.vocabulary
    # What drafters without states of the target ask of it.
    absent: Any = SimpleNamespace(
        name=str(path), vocab_size=size, num_tokens=size, forward="auto", notes=[],
        dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    drafter = open_drafter(spec, target=absent, target_tokenizer=None)
    if isinstance(drafter, DraftModelDrafter):
        checkpoint = open_checkpoint(drafter.draft_model.model.config._name_or_path)
        if hash_vocabulary(load_tokenizer(checkpoint)) != stored.record.tokenizer:
            raise UnsupportedError(f"--replay {spec.text}: its tokenizer is not that of {path}")
    return drafter


def _draws(drafter: Drafter, sampling: SamplingParams) -> bool:
    """Return whether a drafter draws its tokens from a distribution of its own."""
    return "iid" in drafter.kinds(sampling)


def _read_windows(stored: StoredLogProbs) -> Iterator[_Window]:
    """Yield the windows of a file; tokens that it does not keep have the lowest log-probability."""
    size = stored.record.vocabulary
    for group, ids_SL in enumerate(stored.windows.groups):
        for row, tokens_L in enumerate(ids_SL):
            kept = stored.read("logp", group, slice(row, row + 1))
            if stored.is_complete:
                logp_LV = kept
            else:
                top = stored.read("top", group, slice(row, row + 1)).long()
                logp_LV = kept.new_full((len(kept), size), LOWEST).scatter_(1, top, kept)
            yield _Window(tokens_L.tolist(), logp_LV, logp_LV.argmax(-1).tolist())


def _follow(
    drafter: Drafter, window: _Window, index: int, prompt_tokens: int, sampling: SamplingParams
) -> _Counts:
    """Let a drafter of deterministic tokens draft along a window, as the engine would ask it."""
    tokens, counts = window.tokens, _Counts()
    request = Request(
        index=index,
        tokens=tokens[:prompt_tokens],
        draws=Draws(0, index),
        sampling=SamplingParams(),
        max_new_tokens=len(tokens) - prompt_tokens,
        context=len(tokens),
    )
    probs_LV = None if sampling.greedy else sampling.probs(window.logp_LV[None])[0]
    request.count([0], 0, 1)
    counts.count(tree.root(tokens[prompt_tokens - 1]), 0, censored=False)
    request.extend([tokens[prompt_tokens]])
    num_top = drafter.needs.top
    prompt = PrefilledPrompt(
        request=request,
        logits_V=window.logp_LV[prompt_tokens - 1],
        top=lambda: _top(window, range(prompt_tokens), num_top),
    )
    # Drafters that read the target's cache are refused when they are opened.
    drafter.add([prompt], cast("Any", None))
    while request.finish_reason is None:
        root, budget = len(request.tokens) - 1, request.num_left - 1
        draft = tree.root(tokens[root])
        if budget:
            (draft,) = drafter.propose([request], [budget])
        path = _walk(draft, tokens[root + 1 :])
        accepted, censored = _accept(draft, path, window, root)
        counts.count(draft, accepted, censored)
        if len(draft) > 1:
            counts.drafts += 1
            first = {t for t, above in zip(draft.tokens, draft.parents, strict=True) if above == 0}
            if probs_LV is None:
                counts.chance += window.best[root] in first
            else:
                counts.chance += float(probs_LV[root, list(first)].sum())
        new = tokens[root + 1 : root + 1 + len(path)]
        request.extend(new)
        request.count(draft.depths, len(path) - 1, len(new))
        top = [list[int]() for _ in draft.tokens]
        if num_top:
            for depth, node in enumerate(path):
                (top[node],) = _top(window, range(root + depth, root + depth + 1), num_top)
        outcome = Outcome(request=request, draft=draft, path=path, next_token=new[-1], top=top)
        drafter.observe([outcome])
    drafter.remove(request)
    counts.tokens, counts.forwards = len(request.new_tokens), request.forwards
    return counts


def _top(window: _Window, rows: range, count: int) -> list[list[int]]:
    """Return the `count` likeliest tokens after each of some tokens of a window."""
    logp_RV = window.logp_LV[rows.start : rows.stop]
    found: list[list[int]] = logp_RV.topk(min(count, logp_RV.shape[-1])).indices.tolist()
    return found


def _walk(draft: Draft, following: Sequence[int]) -> list[int]:
    """Return the nodes of a draft that the text follows, the root first."""
    path = [0]
    for node in range(1, len(draft)):
        # Parents come first, so the next node of the path comes after the last.
        above, depth = draft.parents[node], draft.depths[node]
        if above == path[-1] and draft.tokens[node] == following[depth - 1]:
            path.append(node)
    return path


def _accept(draft: Draft, path: list[int], window: _Window, root: int) -> tuple[int, bool]:
    """Return how many tokens a greedy target accepts, and whether it may be more (censored).

    It may where the path of its own tokens leaves the text.
    """
    for depth, node in enumerate(path):
        wanted = window.best[root + depth]
        if depth + 1 < len(path) and draft.tokens[path[depth + 1]] == wanted:
            continue
        # The next token of the text is not drafted, or not the one that the target prefers.
        children = zip(draft.tokens, draft.parents, strict=True)
        is_drafted = any(above == node and token == wanted for token, above in children)
        return (depth + 1, True) if is_drafted else (depth, False)
    raise AssertionError("the last node of the path always returns")


def _follow_draws(
    drafter: Drafter, window: _Window, index: int, prompt_tokens: int, sampling: SamplingParams
) -> _Counts:
    """Sum the expected steps of a chain of drawn tokens along a window."""
    assert isinstance(drafter, DraftModelDrafter)
    tokens, depth = window.tokens, drafter.config.depth
    ids_1L = torch.tensor([tokens])
    model = ResidentLogProbs(drafter.draft_model.model)
    logq_1LV = model(Batch(0, slice(0, 1), ids_1L, len(tokens) - 1))
    # Models of one family pad their lm_heads to different multiples.
    padding = window.logp_LV.shape[-1] - logq_1LV.shape[-1]
    q_LV = sampling.probs(functional.pad(logq_1LV, (0, padding), value=-torch.inf))[0]
    p_LV = sampling.probs(window.logp_LV[None])[0]
    chance = torch.minimum(p_LV, q_LV).sum(-1).tolist()
    next_L1 = ids_1L[0, 1:, None]
    p_L, q_L = p_LV.gather(1, next_L1)[:, 0].double(), q_LV.gather(1, next_L1)[:, 0].double()
    # A token that p excludes cannot be the target's; the text then ends the chain there.
    taken = torch.where(p_L > 0, (q_L / p_L.clamp(min=1e-300)).clamp(max=1), 0.0).tolist()
    last = len(tokens) - 1
    steps = expect_steps(taken, depth=depth, start=prompt_tokens, last=last)
    # The last token that a step may draft has one more to come after it.
    drafting = range(prompt_tokens, last - 1)
    return _Counts(
        tokens=last + 1 - prompt_tokens,
        forwards=1 + sum(steps[prompt_tokens:last]),
        chance=sum(steps[root] * chance[root] for root in drafting),
        drafts=sum(steps[root] for root in drafting),
    )


def expect_steps(taken: Sequence[float], *, depth: int, start: int, last: int) -> list[float]:
    """Return the expected number of steps whose root is the token at each index up to `last`.

    The first step's root is at `start`; a step drafts up to `depth` tokens and commits the accepted
    ones and one more. `taken[t]`: the probability that the token after index t is accepted, given
    that the text has it.
    """
    expected = [0.0] * (last + 1)
    expected[start] = 1.0
    for root in range(start, last):
        reached = expected[root]
        most = min(depth, last - root - 1)
        for accepted in range(most):
            stays = reached * taken[root + accepted]
            expected[root + accepted + 1] += reached - stays
            reached = stays
        expected[root + most + 1] += reached
    return expected


def _predict(
    text: str,
    drafter: Drafter,
    counts: Sequence[_Counts],
    sampling: SamplingParams,
    all_greedy: bool,
) -> Prediction:
    """Compute a drafter's figures from its counts on all windows."""
    along = _ratio([(each.tokens, each.forwards) for each in counts])
    offered, accepted = _add([c.offered for c in counts]), _add([c.accepted for c in counts])
    accepted += [0] * (len(offered) - len(accepted))
    learns = drafter.needs.top > 0
    note = None
    if learns:
        note = "it learns from rejected nodes too, after which the file has no log-probabilities"
    return Prediction(
        drafter=text,
        tokens_per_forward=_product_limit(counts) if sampling.greedy else along,
        acceptance=_ratio([(each.chance, each.drafts) for each in counts]),
        along_text=along,
        acceptance_by_depth=[
            taken / given for taken, given in zip(accepted, offered, strict=True)
        ] if sampling.greedy else [],
        is_exact=sampling.greedy and all_greedy and not learns,
        note=note,
    )  # fmt: skip


def _ratio(rows: Sequence[tuple[float, float]]) -> Interval:
    """Return the ratio of two sums over windows; 0 where nothing was counted."""
    used = torch.tensor([row for row in rows if row[1]], dtype=torch.float64)
    if not len(used):
        return Interval(0.0, 0.0, 0.0)
    return bootstrap(used, lambda m: m[:, 0] / m[:, 1])


def _product_limit(counts: Sequence[_Counts]) -> Interval:
    """Return 1 plus the sum over depths of the share of steps that get there (Kaplan, Meier).

    A depth that no step is known to have got to, in a resample either, counts as not reached.
    """
    deepest = max(len(each.risked) for each in counts)
    table = torch.zeros(len(counts), 2, deepest, dtype=torch.float64)
    for row, each in zip(table, counts, strict=True):
        row[0, : len(each.risked)] = torch.tensor(each.risked, dtype=torch.float64)
        row[1, : len(each.failed)] = torch.tensor(each.failed, dtype=torch.float64)

    def estimate(means_RK: Tensor) -> Tensor:
        risked_RD, failed_RD = means_RK.view(len(means_RK), 2, deepest).unbind(1)
        # Means over resampled windows: 0 or at least a part of one step.
        passed_RD = torch.where(risked_RD > 0, 1 - failed_RD / risked_RD.clamp(min=1e-12), 0.0)
        return 1 + passed_RD.cumprod(-1).sum(-1)

    return bootstrap(table.flatten(1), estimate)


def _add(counts: Sequence[Sequence[int]]) -> list[int]:
    """Add lists of counts by depth, of any lengths."""
    longest = max(map(len, counts), default=0)
    return [sum(each[depth] for each in counts if depth < len(each)) for depth in range(longest)]
