"""`audit logprobs`: what next-token log-probabilities give away of the model, and of its prompt.

After PILS (Nazir et al., 2025, arXiv:2506.17090): log-probabilities lie in a space as wide as the
hidden state, so that a few more than that determine all others, and those of several generated
tokens tell of the prompt before them. The inverter is far smaller than the paper's, and is trained
here: what it cannot read, a larger one may.

Shapes: R positions, V vocabulary, D width, N prompts, P tokens of a prompt, T tokens watched.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from spectool.checkpoint.dtypes import parse_dtype
from spectool.checkpoint.tensors import all_finite
from spectool.data.states import StateCodec
from spectool.data.windows import Windows, cut
from spectool.errors import TextError, UnsupportedError
from spectool.evaluate.audit.inverter import Guesses, invert
from spectool.evaluate.audit.options import LogprobsOptions
from spectool.evaluate.audit.text import read_ids
from spectool.evaluate.gates import Checked, parse_gates
from spectool.evaluate.intervals import Interval, bootstrap, share
from spectool.evaluate.log_probs import ResidentLogProbs
from spectool.evaluate.results import number_names, read_numbers
from spectool.model.lm_head import read_lm_head
from spectool.model.loading import check_device, load_model, load_tokenizer
from spectool.report import SILENT, Reporter
from spectool.shared_options import LoadOptions

# Tokens of a window whose positions are measured, and prompts that are continued together.
WINDOW, BATCH = 128, 64
# Share of the prompts that the inverter does not learn from, and how many prompts it needs.
HELD_OUT, LEAST_PROMPTS = 0.2, 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Inversion:
    """Shares of the tokens of held-out prompts that an inverter guesses.

    `watched`: the generated tokens whose log-probabilities it sees. `first_only`: with those of the
    first one alone. `control`: it learnt from prompts that do not belong to what it saw. `chance`:
    the most frequent token is guessed everywhere. `exact`: prompts that are guessed as a whole.
    `by_position`: from the first token of the prompt to the last.
    """

    prompts: int
    prompt_tokens: int
    watched: int
    accuracy: Interval
    first_only: Interval
    control: Interval
    chance: Interval
    exact: Interval
    by_position: list[Interval]


@dataclass(frozen=True, slots=True, kw_only=True)
class Logprobs:
    """The result of the audit.

    `rank`: of the log-probabilities' differences, where the largest step between two singular
    values is; `step` is the ratio of the two. `shown` log-probabilities of a position give all
    others with an error of at most `reconstruction_error` (absolute), and a mean KL of
    `reconstruction_kl` nats.
    """

    model: str
    vocabulary: int
    width: int
    rank: int
    step: float
    shown: int
    positions: int
    reconstruction_error: float
    reconstruction_kl: float
    inversion: Inversion
    gates: list[Checked]


def audit_logprobs(
    load: LoadOptions, options: LogprobsOptions, *, reporter: Reporter = SILENT
) -> Logprobs:
    """Measure the rank, the reconstruction from a few log-probabilities, and the inverter.

    Computes in float32 unless the options name a dtype: the roundings of others hide the rank.

    Raises:
        InputError: the checkpoint or the text is unusable, or the vocabulary is no larger than the
            model is wide.
        NotFinite: the model computes NaN or infinite values.
    """
    gates = parse_gates(options.gate, list(number_names(Logprobs)))
    checkpoint, device = load.open(), check_device(load.resolve_device())
    tokenizer = load_tokenizer(checkpoint)
    ids = read_ids(options, tokenizer, reporter)
    model = load_model(
        checkpoint,
        dtype=parse_dtype(load.dtype) or torch.float32,
        device=str(device),
        runtime=load.runtime,
        activations=load.activations,
        reporter=reporter,
    )
    whole = StateCodec(*read_lm_head(model))
    vocabulary, width = whole.weight_VD.shape
    shown = min(width + options.spare, vocabulary)
    if shown <= width:
        raise UnsupportedError(
            f"{checkpoint.name}: its vocabulary of {vocabulary} tokens is no larger than its width "
            f"of {width}: all its log-probabilities are needed"
        )
    generator = torch.Generator().manual_seed(options.seed)
    # Random: the first tokens of a vocabulary are often alike, never trained.
    shown_I = torch.randperm(vocabulary, generator=generator)[:shown].sort().values
    part = StateCodec(whole.weight_VD[shown_I], whole.bias_V[shown_I])
    logp_RV = _read_positions(model, cut(ids, length=WINDOW, bos=None), vocabulary, shown)
    rank, step = measure_rank(logp_RV[:, shown_I] - part.bias_V)
    rebuilt_RV = whole.decode(part.encode(logp_RV[:, shown_I]))
    kl_R = (logp_RV.exp() * (logp_RV - rebuilt_RV)).sum(-1, dtype=torch.float64)
    result = Logprobs(
        model=checkpoint.fingerprint(),
        vocabulary=vocabulary,
        width=width,
        rank=rank,
        step=step,
        shown=shown,
        positions=len(logp_RV),
        reconstruction_error=float((logp_RV - rebuilt_RV).abs().max()),
        reconstruction_kl=float(kl_R.mean()),
        inversion=_invert(model, part, shown_I, ids, options, reporter),
        gates=[],
    )
    numbers = read_numbers(result)
    return replace(result, gates=[gate.check(numbers) for gate in gates])


def measure_rank(rows_RN: Tensor) -> tuple[int, float]:
    """Return the numerical rank of rows less their means, and the step that ends it.

    The rank is the number of singular values before the largest ratio of one to the next.
    """
    centred_RN = rows_RN.double() - rows_RN.double().mean(-1, keepdim=True)
    values = torch.linalg.svdvals(centred_RN)
    # Values that are exactly 0 would make any ratio infinite.
    values = values.clamp(min=float(values[0]) * torch.finfo(torch.float64).eps)
    # One value is lost to the mean: the last is noise, in whatever there is.
    ratios = values[:-2] / values[1:-1]
    rank = int(ratios.argmax())
    return rank + 1, float(ratios[rank])


def _read_positions(
    model: PreTrainedModel, windows: Windows, vocabulary: int, wanted: int
) -> Tensor:
    """Return the log-probabilities [R, V] of as many positions as are wanted."""
    if windows.num_tokens < wanted:
        raise TextError(
            f"the text has {windows.num_tokens} positions; the rank needs {wanted}",
            hint="give a longer text with --text",
        )
    log_probs, parts, found = ResidentLogProbs(model), list[Tensor](), 0
    for batch in windows.batches(vocabulary, batch_size=1):
        parts.append(log_probs(batch)[0].cpu())
        if not all_finite(parts[-1]):
            raise log_probs.not_finite(batch, "cannot be audited")
        found += len(parts[-1])
        if found >= wanted:
            break
    return torch.cat(parts)[:wanted]


def _invert(
    model: PreTrainedModel,
    codec: StateCodec,
    shown_I: Tensor,
    ids: list[int],
    options: LogprobsOptions,
    reporter: Reporter,
) -> Inversion:
    """Let the model continue prompts, and train inverters on what an observer sees of it."""
    length = options.prompt_tokens
    prompts_NP = torch.cat(cut(ids, length=length, bos=None).groups)[: options.prompts]
    # A prompt that occurs twice could be looked up.
    prompts_NP = torch.unique(prompts_NP, dim=0)
    if len(prompts_NP) < LEAST_PROMPTS:
        raise TextError(
            f"the text has {len(prompts_NP)} different prompts of {length} tokens; the inverter "
            f"needs {LEAST_PROMPTS}",
            hint="give a longer text with --text",
        )
    generator = torch.Generator().manual_seed(options.seed)
    prompts_NP = prompts_NP[torch.randperm(len(prompts_NP), generator=generator)]
    states_NTD = _watch(model, codec, shown_I, prompts_NP, options.watched, reporter)
    num_train = len(prompts_NP) - int(HELD_OUT * len(prompts_NP))

    def guess(states_NTD: Tensor, *, shuffled: bool = False) -> Guesses:
        return invert(
            states_NTD.flatten(1), prompts_NP, num_train, steps=options.steps, seed=options.seed,
            shuffled=shuffled, reporter=reporter,
        )  # fmt: skip

    right_NP = guess(states_NTD).right_NP
    first_NP = guess(states_NTD[:, :1]).right_NP
    control = guess(states_NTD, shuffled=True)
    return Inversion(
        prompts=len(right_NP),
        prompt_tokens=length,
        watched=options.watched,
        accuracy=_accuracy(right_NP),
        first_only=_accuracy(first_NP),
        control=_accuracy(control.right_NP),
        chance=_accuracy(control.frequent_NP),
        exact=share(int(right_NP.all(1).sum()), len(right_NP)),
        by_position=[share(int(right_N.sum()), len(right_N)) for right_N in right_NP.T],
    )


def _accuracy(right_NP: Tensor) -> Interval:
    """Return the share of tokens guessed; those of a prompt are resampled as one."""
    return bootstrap(right_NP.double(), lambda means_RP: means_RP.mean(1))


@torch.inference_mode()
def _watch(
    model: PreTrainedModel,
    codec: StateCodec,
    shown_I: Tensor,
    prompts_NP: Tensor,
    watched: int,
    reporter: Reporter,
) -> Tensor:
    """Return the states [N, T, D] recovered from log-probabilities of greedily generated tokens."""
    # What is left out is the checkpoint's own, so too the tokens that end a text: without a least
    # number of new tokens a batch could be over before the last one that is watched.
    greedy = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        max_new_tokens=watched,
        min_new_tokens=watched,
        output_logits=True,
        return_dict_in_generate=True,
        pad_token_id=0,
    )
    found = []
    for start in range(0, len(prompts_NP), BATCH):
        ids_BP = prompts_NP[start : start + BATCH].to(model.device)
        out = model.generate(  # type: ignore[operator]
            input_ids=ids_BP, attention_mask=torch.ones_like(ids_BP), generation_config=greedy
        )
        logp_BTV = torch.stack(out.logits, 1).float().log_softmax(-1)[..., shown_I].cpu()
        found.append(codec.encode(logp_BTV.flatten(0, 1)).view(len(ids_BP), watched, -1))
        reporter.progress(start + len(ids_BP), len(prompts_NP), "prompts continued")
    return torch.cat(found)
