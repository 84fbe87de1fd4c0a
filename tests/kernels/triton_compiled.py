"""Compile the Triton kernels for processors that need not be here; run by the test beside it."""

from __future__ import annotations

from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from spectool.kernels import triton_kernels as kernels

PLAIN = {
    "BITS": 4,
    "CENTER": 8,
    "GROUP": 128,
    "TURN": 4,
    "SHIFT": 1,
    "LEVELS": 0,
    "BY_COLUMN": False,
    "PAIRED": False,
    "PARTS": 1,
    "SPLIT": False,
    "DOT": kernels.BFLOAT16,
}
CODEBOOK = {"CENTER": 0, "SHIFT": 0, "LEVELS": 16, "SPLIT": True}
FORMS: dict[str, dict[str, Any]] = {
    "4 bits": {},
    "4 bits, float32": {"DOT": kernels.FLOAT32},
    "3 bits in odd groups": {"BITS": 3, "CENTER": 4, "GROUP": 20, "TURN": 0, "SPLIT": True},
    "a codebook": CODEBOOK,
    "a codebook for each input": {**CODEBOOK, "BY_COLUMN": True},
    "pairs": {**CODEBOOK, "LEVELS": 32, "PAIRED": True},
    "signs": {"BITS": 1, "CENTER": 0, "GROUP": 8192, "TURN": 8, "SHIFT": 2, "PARTS": 2},
}
COUNTS = dict.fromkeys(("N", "n", "k", "groups", "blocks", "blocks_per_split", "count"), "i32")


def compile(kernel: Any, types: dict[str, str], constants: dict[str, Any], processor: int) -> str:
    names = {**types, **COUNTS, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        kernel,
        {name: names[name] for name in kernel.arg_names},
        {(kernel.arg_names.index(name),): value for name, value in constants.items()},
    )
    target = GPUTarget("cuda", processor, 32)
    compiled = triton.compile(source, target=target, options={"enable_fp_fusion": True})
    assert compiled.asm["cubin"]
    text: str = compiled.asm["ptx"]
    return text


for processor, product in ((80, "mma.sync"), (90, "wgmma.mma_async")):
    for form, changes in FORMS.items():
        constants = {**PLAIN, **changes}
        is_half = constants["DOT"] == kernels.BFLOAT16
        types = {
            "x": "*bf16" if is_half else "*fp32",
            "codes": "*u8",
            "scale": "*fp16",
            "shift": "*fp32",
            "levels": "*fp32",
            "table": "*i32",
            "out": "*fp32",
        }
        text = compile(kernels.multiply_segment, types, constants, processor)
        assert (product in text) == is_half, f"{form}: {product} for {processor}"
    types = {"partials": "*fp32", "bias": "*bf16", "out": "*bf16"}
    compile(kernels.sum_partials, types, {"BIAS": True, "ROUND": True}, processor)
