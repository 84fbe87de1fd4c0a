"""Quantization preprocessing: reshape a model so that packing it again costs less.

The model is packed once; low-rank updates (LoRA, Hu et al. 2021, arXiv:2106.09685, computed by
peft) of the unpacked result learn the next token of a text; merged into it they give the model that
is then packed in earnest: its weights stand where the method can hold them, and its activations are
the targets. Its own perplexity is the ceiling of what packing it can reach.

Source: Zhao et al., PTQ1.61, 2025 (arXiv:2502.13179), "quantization preprocessing". Deviation:
updates of all packed linears; the authors leave the attention's output matrix out.
Shapes: S sequences, B of a step, L tokens.
"""

from __future__ import annotations

import json
import math
import random
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectool.artifact import Content, disk_errors, write_whole
from spectool.checkpoint import Checkpoint, read_tensor, torch_dtype
from spectool.errors import UnsupportedError, UsageError, require
from spectool.headers import read_header
from spectool.loading import load_model
from spectool.machine import available_memory
from spectool.skeleton import Site, Skeleton
from spectool.training import Figures, Recipe, Training, make_optimizer

from .plan import Plan

# A share of the sequences is kept back to measure on.
HELD_OUT = 0.1
LOOKS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Preprocess:
    """`text`: files, as for calibration, of which `samples` sequences are drawn at most. `rank` and
    learning `rate` of the updates; `batch_size` sequences a step."""

    text: Sequence[str]
    samples: int = 20_000
    steps: int = 1000
    rank: int = 64
    rate: float = 1e-4
    batch_size: int = 2


def preprocess(
    asked: Preprocess,
    scratch: Path,
    identity: Mapping[str, Any],
    pack: Callable[[Path], None],
    ids_SL: Tensor,
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    plan: Plan,
    *,
    device: torch.device,
    seed: int,
    overwrite: bool,
    trust_remote_code: bool,
    say: Callable[[str], None],
) -> tuple[Path, dict[str, float]]:
    """The reshaped dense model's directory in `scratch`, and held-out perplexities.

    `pack(place)` packs the original. What is whole in `scratch` is taken from there, if `identity`
    is that of the run that left it.

    Raises:
        UsageError: it is another's, or there is too little text.
        UnsupportedError: the model does not fit.
        MissingExtra: peft is not installed.
    """
    require("peft", extra="lora", reason="--preprocess")
    if len(ids_SL) < 2:
        raise UsageError(
            "--preprocess: the text has fewer than two sequences to learn from",
            hint="more text, or a smaller --seq-len",
        )
    check_memory(plan.num_parameters, device)
    said, record = json.dumps(identity, sort_keys=True), scratch / "run.json"
    if scratch.exists() and not (record.exists() and record.read_text() == said):
        if not (overwrite and record.exists()):
            raise UsageError(
                f"{scratch}: holds something else than an unfinished run of this",
                hint="move it away, or start anew with --overwrite",
            )
        shutil.rmtree(scratch)
    with disk_errors(scratch):
        scratch.mkdir(parents=True, exist_ok=True)
        record.write_text(said)
        first, merged, figures = scratch / "first", scratch / "merged", scratch / "figures.json"
        if not figures.exists():
            if not first.exists():
                pack(first)
            # Experts of a fused tensor are no layers that updates can be added to.
            sites = {
                site.name: site
                for block in plan.sites.values()
                for site in block.values()
                if site.expert is None
            }
            found, weights = train(
                first, asked, ids_SL, list(sites), state=scratch / "state.safetensors",
                device=device, seed=seed, trust_remote_code=trust_remote_code, say=say,
            )  # fmt: skip
            _write(merged, weights, sites, checkpoint, skeleton)
            figures.write_text(json.dumps(found))
        perplexities: dict[str, float] = json.loads(figures.read_text())
    return merged, perplexities


def check_memory(num_parameters: int, device: torch.device) -> None:
    """Raises: UnsupportedError: the whole model does not fit, as it must here."""
    # Weights in float32; updates, their moments and one sequence's activations take less than that.
    wanted, free = 8 * num_parameters, available_memory(device)
    if wanted > free:
        raise UnsupportedError(
            f"preprocessing trains the whole model in float32, which takes about "
            f"{wanted / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free",
            hint="pack without --preprocess",
        )


def _write(
    place: Path,
    weights: Mapping[str, Tensor],
    sites: Mapping[str, Site],
    checkpoint: Checkpoint,
    skeleton: Skeleton,
) -> None:
    """The original checkpoint with these matrices [n, m] in it, by name."""
    place.mkdir(exist_ok=True)
    stored = {
        key: checkpoint.layout.tensors[key]
        for origin in skeleton.origins.values()
        for key, _ in origin.stored
    }
    contents: dict[str, Content] = dict(stored)
    for name, weight_nm in weights.items():
        ((key, _),) = skeleton.origins[sites[name].parameter].stored
        weight = weight_nm.T if sites[name].transposed else weight_nm
        contents[key] = weight.to(torch_dtype(stored[key])).contiguous()
    write_whole(place / "model.safetensors", contents, {})
    (place / "config.json").write_text(json.dumps(checkpoint.layout.config))


def train(
    packed: Path,
    asked: Preprocess,
    ids_SL: Tensor,
    modules: Sequence[str],
    *,
    state: Path,
    device: torch.device,
    seed: int,
    trust_remote_code: bool,
    say: Callable[[str], None],
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Train updates of the packed model's `modules` on these sequences.

    Returns perplexities of held-out sequences, `packed` and `merged`, and the merged matrices
    [n, m] by name.
    """
    peft = require("peft", extra="lora", reason="--preprocess")
    num_held_out = max(1, int(HELD_OUT * len(ids_SL)))
    held_out_SL, taught_SL = ids_SL[:num_held_out], ids_SL[num_held_out:]
    dense = _load(packed, device, trust_remote_code)
    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=asked.rank, lora_alpha=asked.rank / 4, lora_dropout=0.1, target_modules=list(modules)
    )
    with warnings.catch_warnings():
        # It asks for an attribute that transformers is about to rename.
        warnings.simplefilter("ignore", FutureWarning)
        model: Any = peft.get_peft_model(dense, config)
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss(ids_BL: Tensor) -> Tensor:
        ids_BL = ids_BL.to(device)
        logits_BLV = model(input_ids=ids_BL, use_cache=False).logits[:, :-1].float()
        return F.cross_entropy(logits_BLV.flatten(0, 1), ids_BL[:, 1:].flatten())

    def accumulate(step: int) -> Figures:
        model.train()
        chance = random.Random(f"{seed}/{step}")
        rows = [chance.randrange(len(taught_SL)) for _ in range(asked.batch_size)]
        torch.manual_seed(chance.getrandbits(63))
        value = loss(taught_SL[rows])
        torch.autograd.backward(value)
        return {"loss": float(value.detach())}

    @torch.no_grad()
    def evaluate() -> Figures:
        model.eval()
        parts = torch.split(held_out_SL, asked.batch_size)
        total = sum(float(loss(ids_BL)) * len(ids_BL) for ids_BL in parts)
        mean = total / len(held_out_SL)
        return {"score": -mean, "perplexity": math.exp(mean)}

    def watch(step: int, figures: Figures, look: Figures | None) -> None:
        if look is not None:
            say(
                f"preprocessing: {step}/{asked.steps} steps, held-out perplexity "
                f"{look['perplexity']:.3f}"
            )

    training = Training(
        module=model,
        optimizers=[
            make_optimizer("adamw", trained, rate=asked.rate, betas=(0.9, 0.999), weight_decay=0.0)
        ],
        recipe=Recipe(steps=asked.steps, warmup=0.1, every=max(1, math.ceil(asked.steps / LOOKS))),
        accumulate=accumulate,
        evaluate=evaluate,
        watch=watch,
        store=_State(state),
    )
    history = training.run()
    merged: nn.Module = model.merge_and_unload()
    weights = {name: merged.get_parameter(f"{name}.weight").detach().cpu() for name in modules}
    assert history.best is not None
    figures = {"packed": history.looks[0]["perplexity"], "merged": history.best["perplexity"]}
    return figures, weights


def _load(place: Path, device: torch.device, trust_remote_code: bool) -> nn.Module:
    return load_model(
        place,
        dtype=torch.float32,
        device=str(device),
        runtime="dense",
        trust_remote_code=trust_remote_code,
    )


class _State:
    """A training's state in one file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        if not self.file.exists():
            return None
        metadata, entries = read_header(self.file)
        return {entry.name: read_tensor(entry) for entry in entries}, json.loads(
            metadata["spectool"]
        )

    def save(self, tensors: Mapping[str, Tensor], said: dict[str, Any]) -> None:
        write_whole(self.file, {name: t.cpu() for name, t in tensors.items()}, said)
