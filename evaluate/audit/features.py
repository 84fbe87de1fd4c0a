"""`audit features`: how much of a text can be read back from stored hidden states, by layer.

The question of intermediate-feature inversion, in its narrow form for text: a linear probe guesses
the token at the state's own position and tokens before it. A stronger attack reads more.

Shapes: R positions, D width, C tokens that occur, L tokens of a window.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from spectool.checkpoint.dtypes import parse_dtype
from spectool.checkpoint.tensors import all_finite
from spectool.data.windows import cut
from spectool.decode.protocol import Needs
from spectool.decode.target.open import open_target
from spectool.errors import TextError
from spectool.evaluate.audit.options import FeaturesOptions
from spectool.evaluate.audit.text import read_ids
from spectool.evaluate.gates import Checked, parse_gates
from spectool.evaluate.intervals import Interval, bootstrap
from spectool.evaluate.results import number_names, read_numbers
from spectool.model.finite import not_finite
from spectool.model.loading import check_device, default_dtype, load_model, load_tokenizer
from spectool.report import SILENT, Reporter
from spectool.shared_options import LoadOptions

WINDOW = 128
# Share of the windows that the probes do not learn from.
HELD_OUT = 0.2
# Part of the mean variance that is added to each direction, so that rare tokens fit no noise.
SHRINKAGE = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Shares of held-out tokens that a probe reads from a layer's states.

    `read` are those of the tokens 0, 1, ... places before the state's own, as the options list
    them; `control` the same by probes that learnt from tokens that do not belong to the states.
    """

    name: str
    read: list[Interval]
    control: list[Interval]


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """The result of the audit. `most` is the largest share that is read at the first of `places`.

    `chance`: of the most frequent token.
    """

    model: str
    positions: int
    held_out: int
    places: list[int]
    most: Interval
    chance: Interval
    layers: list[Layer]
    gates: list[Checked]


def audit_features(
    load: LoadOptions, options: FeaturesOptions, *, reporter: Reporter = SILENT
) -> Features:
    """Read a text through the model, and train a probe on the states of each layer.

    Raises:
        InputError: the checkpoint or the text is unusable.
        NotFinite: a layer's states are NaN or infinite.
    """
    gates = parse_gates(options.gate, list(number_names(Features)))
    checkpoint, device = load.open(), check_device(load.resolve_device())
    tokenizer = load_tokenizer(checkpoint)
    length = min(WINDOW, checkpoint.layout.context or WINDOW)
    windows = cut(read_ids(options, tokenizer, reporter), length=length, bos=None)
    (ids_SL,) = windows.groups
    num_held = int(HELD_OUT * len(ids_SL))
    if num_held < 2 or max(options.places) >= length:
        raise TextError(
            f"the text has {len(ids_SL)} windows of {length} tokens; expected 10 or more, and "
            "places inside a window"
        )
    model = load_model(
        checkpoint,
        dtype=parse_dtype(load.dtype) or default_dtype(checkpoint.layout, device),
        device=str(device),
        runtime=load.runtime,
        activations=load.activations,
        reporter=reporter,
    )
    target = open_target(model)
    needs = Needs(layers=tuple(range(target.num_layers)), final=True)
    parts: dict[str, list[Tensor]] = {}
    for index, ids_L in enumerate(ids_SL, 1):
        with torch.inference_mode(), target.capture_features(needs) as found:
            target.decoder(input_ids=ids_L[None].to(device), use_cache=False)
        for name, state_1LD in found.items():
            if not all_finite(state_1LD):
                raise not_finite(checkpoint.name, "cannot be audited", name)
            parts.setdefault(name, []).append(state_1LD[0].float().cpu())
        reporter.progress(index, len(ids_SL), "windows read")
    generator = torch.Generator().manual_seed(options.seed)
    layers = []
    for name, states in parts.items():
        states_SLD = torch.stack(states)
        pairs = [_probe(states_SLD, ids_SL, place, num_held, generator) for place in options.places]
        read, control = ([pair[side] for pair in pairs] for side in (0, 1))
        layers.append(Layer(name=name, read=read, control=control))
        reporter.progress(len(layers), len(parts), "layers probed")
    held_SL = ids_SL[-num_held:]
    frequent = ids_SL[:-num_held].flatten().bincount().argmax()
    result = Features(
        model=checkpoint.fingerprint(),
        positions=ids_SL.numel(),
        held_out=held_SL.numel(),
        places=list(options.places),
        most=max((layer.read[0] for layer in layers), key=lambda each: each.value),
        chance=_share(held_SL == frequent),
        layers=layers,
        gates=[],
    )
    numbers = read_numbers(result)
    return replace(result, gates=[gate.check(numbers) for gate in gates])


def _probe(
    states_SLD: Tensor, ids_SL: Tensor, place: int, num_held: int, generator: torch.Generator
) -> tuple[Interval, Interval]:
    """Return the share of tokens `place` before a state that a probe reads, and its control."""
    length = ids_SL.shape[1] - place
    seen_SLD, tokens_SL = states_SLD[:, place:], ids_SL[:, :length]
    train_RD, train_R = seen_SLD[:-num_held].flatten(0, 1), tokens_SL[:-num_held].flatten()
    held_SLD, held_SL = seen_SLD[-num_held:], tokens_SL[-num_held:]
    found = []
    for labels_R in (train_R, train_R[torch.randperm(len(train_R), generator=generator)]):
        guessed_R = classify(train_RD, labels_R, held_SLD.flatten(0, 1))
        found.append(_share(guessed_R.view_as(held_SL) == held_SL))
    return found[0], found[1]


def classify(train_RD: Tensor, labels_R: Tensor, held_RD: Tensor) -> Tensor:
    """Return the labels [R] of held-out states by linear discriminant analysis (Fisher, 1936).

    Each label has a mean, all share one covariance, shrunk towards a multiple of the identity. It
    has a closed form: no steps, no seed.
    """
    train_RD, held_RD = train_RD.double(), held_RD.double()
    known_C, numbers_R = torch.unique(labels_R, return_inverse=True)
    counts_C = numbers_R.bincount().double()
    width = train_RD.shape[1]
    means_CD = train_RD.new_zeros(len(known_C), width).index_add(0, numbers_R, train_RD)
    means_CD /= counts_C[:, None]
    within_RD = train_RD - means_CD[numbers_R]
    covariance_DD = within_RD.T @ within_RD / len(train_RD)
    mean_variance = covariance_DD.diagonal().mean()
    covariance_DD += SHRINKAGE * mean_variance * torch.eye(width, dtype=torch.float64)
    weights_DC = torch.linalg.solve(covariance_DD, means_CD.T)
    bias_C = (counts_C / len(train_RD)).log() - (means_CD.T * weights_DC).sum(0) / 2
    guessed_R: Tensor = known_C[(held_RD @ weights_DC + bias_C).argmax(-1)]
    return guessed_R


def _share(right_SL: Tensor) -> Interval:
    """Return the share of tokens that are right; those of a window are resampled as one."""
    return bootstrap(right_SL.double().mean(1, keepdim=True), lambda means_R1: means_R1[:, 0])
