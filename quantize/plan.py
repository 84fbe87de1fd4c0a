"""What a quantization will do, take and make, known from headers before anything is read.

A plan needs the architecture and the shapes, not the weights, so it can be had for a hub id
without fetching it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spectool.errors import UnsupportedError, UsageError
from spectool.headers import DTYPE_BITS
from spectool.options import Config
from spectool.skeleton import Site, Skeleton, matches

from .calibration import Quantizer

# What the interpreter with torch and transformers loaded holds, hashing threads included (measured:
# 0.34 GB, 0.39 GB after the source was hashed).
BASE_BYTES = 450_000_000

# The allocator keeps much of what was freed (measured: 1.3 times what is alive at once).
RETAINED = 1.5

# At most this share of the blocks' weights may stay dense without being asked for.
DENSE_LIMIT = 0.10


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Sites to pack by block, names left dense with the reason, and the sizes that follow.

    Bytes: `packed_bytes` of all fields, `file_bytes` of the weight files without headers,
    `host_bytes` and `device_bytes` resident at most, `buffer_bytes` of one of the `num_buffers`
    activation buffers: a stream each, and for methods with a fit a target each.
    """

    sites: Mapping[str, Mapping[str, Site]]
    skipped: Mapping[str, str]
    num_weights: int
    num_parameters: int
    packed_bytes: int
    file_bytes: int
    buffer_bytes: int
    num_buffers: int
    host_bytes: int
    device_bytes: int

    @property
    def bits_linears(self) -> float:
        return 8 * self.packed_bytes / self.num_weights

    @property
    def bits_file(self) -> float:
        return 8 * self.file_bytes / self.num_parameters


def make_plan(
    skeleton: Skeleton,
    method: type[Quantizer],
    config: Config,
    *,
    skip: Sequence[str] = (),
    allow_dense: bool = False,
    calibration_tokens: int = 0,
    sequence_tokens: int = 0,
    batch_tokens: int = 0,
    on_device: bool = False,
) -> Plan:
    """The plan for one method. `calibration_tokens` is 0 where no activations are needed;
    `sequence_tokens` are those of one sequence, `batch_tokens` of those run together.

    Raises:
        UsageError: a `skip` pattern that matches nothing.
        UnsupportedError: nothing to pack, or more than a tenth of the blocks' weights left dense.
    """
    sites: dict[str, dict[str, Site]] = {}
    skipped: dict[str, str] = {}
    unused = set(skip)
    inside, packed = 0, 0
    for block in skeleton.blocks:
        found = skeleton.sites(block)
        hit = {
            site.parameter: pattern
            for site in found
            for pattern in skip
            if matches(site.name, pattern)
        }
        unused -= set(hit.values())
        # Experts of one fused tensor stay together: the tensor is either packed or not.
        sites[block] = {site.name: site for site in found if site.parameter not in hit}
        skipped.update(
            (site.name, f"--skip {hit[site.parameter]}") for site in found if site.parameter in hit
        )
        taken = {site.parameter for site in found}
        for name, parameter in skeleton.model.get_submodule(block).named_parameters(prefix=block):
            inside += parameter.numel() if parameter.ndim >= 2 else 0
            if parameter.ndim >= 2 and name not in taken:
                skipped[name] = "not a linear layer"
        packed += sum(site.num_weights for site in sites[block].values())
    if unused:
        raise UsageError(f"--skip {sorted(unused)[0]}: matches no linear layer of the model")
    if not packed:
        raise UnsupportedError(f"{skeleton.config.model_type}: nothing in it can be packed")
    if inside - packed > DENSE_LIMIT * inside and not allow_dense:
        named = ", ".join(list(skipped)[:3])
        raise UnsupportedError(
            f"{(inside - packed) / inside:.0%} of the blocks' weights would stay dense "
            f"({named}, …); at most {DENSE_LIMIT:.0%} may",
            hint="--allow-dense accepts that",
        )
    return _sized(
        skeleton,
        method,
        config,
        sites,
        skipped,
        calibration_tokens,
        sequence_tokens,
        batch_tokens or sequence_tokens,
        on_device=on_device,
    )


def _sized(
    skeleton: Skeleton,
    method: type[Quantizer],
    config: Config,
    sites: Mapping[str, Mapping[str, Site]],
    skipped: Mapping[str, str],
    calibration_tokens: int,
    sequence_tokens: int,
    batch_tokens: int,
    *,
    on_device: bool,
) -> Plan:
    field_bytes = {
        shape: sum(
            dtype.itemsize * math.prod(size)
            for dtype, size in method.layout(shape, config).values()
        )
        for shape in {site.shape for block in sites.values() for site in block.values()}
    }
    # A checkpoint may hold tensors that the architecture does not know; they stay behind.
    stored = {
        key: skeleton.layout.tensors[key]
        for origin in skeleton.origins.values()
        for key, _ in origin.stored
    }
    source_bytes = sum(entry.num_bytes for entry in stored.values())
    parameters = {site.parameter for block in sites.values() for site in block.values()}
    replaced = {key for name in parameters for key, _ in skeleton.origins[name].stored}
    replaced_bytes = sum(stored[key].num_bytes for key in replaced)
    element_bytes = max(DTYPE_BITS[stored[key].dtype] for key in replaced) // 8
    num_weights = sum(site.num_weights for block in sites.values() for site in block.values())
    packed_bytes = sum(field_bytes[s.shape] for block in sites.values() for s in block.values())
    file_bytes = source_bytes - replaced_bytes + packed_bytes
    block_weights = max(
        sum(p.numel() for p in skeleton.model.get_submodule(block).parameters())
        for block in skeleton.blocks
    )
    largest = max(site.num_weights for block in sites.values() for site in block.values())
    width = getattr(skeleton.config.get_text_config(), "hidden_size", 0)
    buffer_bytes = calibration_tokens * width * 4
    # Data-free: a block as stored, its codes, and one matrix unpacked beside itself in float32.
    # Calibrated: the block in float32 as well, what its packed twin unpacks while it runs, and two
    # buffers of activations. With a fit: the constants of every matrix in float32 too, what one
    # sequence leaves for the backward pass, and two buffers of targets.
    working = block_weights * (element_bytes + 1) + 12 * largest
    passing = 0
    if calibration_tokens:
        working += 8 * block_weights
        # Around a product of a whole batch, in float32 (measured: 4.1 times input and output).
        passing = 12 * batch_tokens * max(sum(s.shape) for b in sites.values() for s in b.values())
    fits = hasattr(method, "fit")
    if fits:
        fitting: Any = method
        working += fitting.fit_bytes(config) * block_weights
        saved = max(saved_bytes(skeleton, s.values(), sequence_tokens) for s in sites.values())
        passing = max(passing, saved)
    if "hessian" in method.statistics:
        # Of every matrix, and four more of the largest in double precision while it is inverted.
        squares = [s.shape[1] ** 2 for block in sites.values() for s in block.values()]
        passing += 4 * sum(squares) // len(sites) + 32 * max(squares)
    working += passing
    working = int(RETAINED * working)
    num_buffers = 4 if fits else 2
    return Plan(
        sites=sites,
        skipped=skipped,
        num_weights=num_weights,
        num_parameters=sum(entry.num_elements for entry in stored.values()),
        packed_bytes=packed_bytes,
        file_bytes=file_bytes,
        buffer_bytes=buffer_bytes,
        num_buffers=num_buffers,
        host_bytes=BASE_BYTES + working + num_buffers * buffer_bytes,
        device_bytes=working + BASE_BYTES if on_device else 0,
    )


def saved_bytes(skeleton: Skeleton, sites: Iterable[Site], tokens: int) -> int:
    """What the forward pass of a block over one sequence keeps for its gradients.

    Around each product about two tensors of its input's and of its output's size (measured with
    Llama: 1.9), and a third while gradients flow; scores and probabilities where attention writes
    them out.
    """
    text: Any = skeleton.config.get_text_config()
    rows = 0
    for site in sites:
        share = 1.0
        if site.expert is not None:
            total = skeleton.model.get_parameter(site.parameter).shape[0]
            share = min(1.0, getattr(text, "num_experts_per_tok", total) / total)
        rows += int(share * sum(site.shape))
    heads = getattr(text, "num_attention_heads", 0)
    return 4 * tokens * 3 * (rows + heads * tokens)
