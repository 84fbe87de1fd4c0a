"""Products of ggml, the library of llama.cpp, on the CPU: a peer of benchmarks, called by ctypes.

`Ggml(folder)` loads libggml-base.so and libggml-cpu.so as the package llama-cpp-python installs
them. The products of a part of a ring are one graph with a node per matrix, as llama.cpp computes a
model, so that threads start once a graph. Matrices lie in the CPU's own buffers, or in a buffer
type that re-lays them when they are loaded ("CPU_REPACK"), which llama.cpp prefers where it has one
for a format.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from ctypes import POINTER, byref, c_bool, c_char_p, c_int, c_int64, c_size_t, c_uint32, c_void_p
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from peers import Instruction, Ring, Setup
from torch import Tensor

# Formats by name: ggml's number of the type, and the instruction of its products.
TYPES: dict[str, tuple[int, Instruction]] = {
    "F16": (1, "float32"),
    "BF16": (30, "bfloat16"),
    "Q4_0": (2, "int8"),
    "Q8_0": (8, "int8"),
    "Q2_K": (10, "int8"),
    "TQ1_0": (34, "int8"),
    "TQ2_0": (35, "int8"),
}
F32 = 0

# Rows that are quantized; a matrix repeats them, as quantizing 45 M weights takes up to a minute.
STRIP = 256


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


class _TypeTraits(ctypes.Structure):
    _fields_ = (
        ("type_name", c_char_p),
        ("block", c_int64),
        ("block_interleave", c_int64),
        ("type_size", c_size_t),
        ("is_quantized", c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, c_void_p, c_void_p, c_int64)),
        ("from_float_ref", c_void_p),
    )


class _PoolParams(ctypes.Structure):
    _fields_ = (
        ("cpumask", c_bool * 512),
        ("n_threads", c_int),
        ("prio", c_int),
        ("poll", c_uint32),
        ("strict_cpu", c_bool),
        ("paused", c_bool),
    )


class _Feature(ctypes.Structure):
    _fields_ = (("name", c_char_p), ("value", c_char_p))


_Log = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)

# Result and arguments of each function, from ggml's headers.
_BASE: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (c_void_p, [_InitParams]),
    "ggml_free": (None, [c_void_p]),
    "ggml_version": (c_char_p, []),
    "ggml_log_set": (None, [_Log, c_void_p]),
    "ggml_tensor_overhead": (c_size_t, []),
    "ggml_graph_overhead_custom": (c_size_t, [c_size_t, c_bool]),
    "ggml_new_tensor_2d": (c_void_p, [c_void_p, c_int, c_int64, c_int64]),
    "ggml_mul_mat": (c_void_p, [c_void_p] * 3),
    "ggml_get_data": (c_void_p, [c_void_p]),
    "ggml_row_size": (c_size_t, [c_int, c_int64]),
    "ggml_new_graph_custom": (c_void_p, [c_void_p, c_size_t, c_bool]),
    "ggml_build_forward_expand": (None, [c_void_p] * 2),
    "ggml_get_type_traits": (POINTER(_TypeTraits), [c_int]),
    "ggml_quantize_chunk": (c_size_t, [c_int, c_void_p, c_void_p, *[c_int64] * 3, c_void_p]),
    "ggml_threadpool_params_default": (_PoolParams, [c_int]),
    "ggml_backend_get_default_buffer_type": (c_void_p, [c_void_p]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, [c_void_p] * 2),
    "ggml_backend_buffer_free": (None, [c_void_p]),
    "ggml_backend_buft_name": (c_char_p, [c_void_p]),
    "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
    "ggml_backend_supports_op": (c_bool, [c_void_p] * 2),
    "ggml_backend_graph_compute": (c_int, [c_void_p] * 2),
    "ggml_backend_reg_dev_get": (c_void_p, [c_void_p, c_size_t]),
    "ggml_backend_reg_get_proc_address": (c_void_p, [c_void_p, c_char_p]),
}
_CPU: dict[str, tuple[Any, list[Any]]] = {
    "ggml_backend_cpu_init": (c_void_p, []),
    "ggml_backend_cpu_reg": (c_void_p, []),
    "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    "ggml_backend_cpu_set_threadpool": (None, [c_void_p, c_void_p]),
    "ggml_threadpool_new": (c_void_p, [POINTER(_PoolParams)]),
    "ggml_threadpool_pause": (None, [c_void_p]),
    "ggml_threadpool_free": (None, [c_void_p]),
}


def find_folder() -> Path | None:
    """Return the folder of an installed llama-cpp-python's libraries; None if there is none."""
    spec = importlib.util.find_spec("llama_cpp")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "lib"


class Ggml:
    """The libraries, a CPU backend and its threads.

    Functions of the libraries are attributes without the prefix "ggml_".
    """

    def __init__(self, folder: Path) -> None:
        base = ctypes.CDLL(str(folder / "libggml-base.so"), mode=ctypes.RTLD_GLOBAL)
        cpu = ctypes.CDLL(str(folder / "libggml-cpu.so"))
        for library, functions in ((base, _BASE), (cpu, _CPU)):
            for name, (result, arguments) in functions.items():
                function = getattr(library, name)
                function.restype, function.argtypes = result, arguments
                setattr(self, name.removeprefix("ggml_"), function)
        # It would tell of every matrix that it re-lays.
        self._log = _Log(lambda level, text, data: None)
        self.log_set(self._log, None)
        self.backend = self.backend_cpu_init()
        self.pool: int | None = None
        self.threads = 0

    def set_threads(self, threads: int) -> None:
        """Compute with a pool of so many threads, kept between passes as llama.cpp keeps it."""
        if threads == self.threads:
            return
        params = self.threadpool_params_default(threads)
        params.paused = True
        pool = self.threadpool_new(byref(params))
        self.backend_cpu_set_n_threads(self.backend, threads)
        self.backend_cpu_set_threadpool(self.backend, pool)
        if self.pool is not None:
            self.threadpool_free(self.pool)
        self.pool, self.threads = pool, threads

    def compute(self, graph: int) -> None:
        """Compute a graph."""
        status = self.backend_graph_compute(self.backend, graph)
        assert status == 0, f"ggml_backend_graph_compute returned {status}"

    def describe(self) -> dict[str, str]:
        """Return the version and the features that the library was compiled with."""
        register = self.backend_cpu_reg()
        address = self.backend_reg_get_proc_address(register, b"ggml_backend_get_features")
        features = ctypes.CFUNCTYPE(POINTER(_Feature), c_void_p)(address)(register)
        found = {"version": self.version().decode()}
        index = 0
        while features[index].name is not None:
            found[features[index].name.decode()] = features[index].value.decode()
            index += 1
        return found

    @cached_property
    def buffer_types(self) -> dict[str, int]:
        """The backend's own buffer type (named ""), and those that re-lay matrices, by name."""
        register = self.backend_cpu_reg()
        address = self.backend_reg_get_proc_address(register, b"ggml_backend_dev_get_extra_bufts")
        extra = ctypes.CFUNCTYPE(POINTER(c_void_p), c_void_p)(address)(
            self.backend_reg_dev_get(register, 0)
        )
        found = {"": self.backend_get_default_buffer_type(self.backend)}
        index = 0
        while extra[index] is not None:
            found[self.backend_buft_name(extra[index]).decode()] = extra[index]
            index += 1
        return found

    def supports(self, kind: str, shape: tuple[int, int], buffer_type: str) -> bool:
        """Whether products with a matrix [n, m] of a format can be computed in a buffer type."""
        with _Tensors(self, 3) as tensors:
            weight = tensors.add(TYPES[kind][0], shape)
            tensors.allocate(self.buffer_types[buffer_type])
            product = self.mul_mat(tensors.context, weight, tensors.add(F32, (1, shape[1])))
            return bool(self.backend_supports_op(self.backend, product))

    def quantize(self, kind: str, weight_nm: Tensor) -> tuple[Tensor, Tensor]:
        """Quantize float32 weights [n, m]; return the stored bytes [n, row] and the values."""
        number, (n, m) = TYPES[kind][0], weight_nm.shape
        stored = torch.zeros(n, self.row_size(number, m), dtype=torch.uint8)
        written = self.quantize_chunk(
            number, weight_nm.data_ptr(), stored.data_ptr(), 0, n, m, None
        )
        assert written == stored.nbytes
        values_nm = torch.empty(n, m)
        to_float = self.get_type_traits(number).contents.to_float
        to_float(stored.data_ptr(), values_nm.data_ptr(), n * m)
        return stored, values_nm


class _Tensors:
    """A context of ggml with its buffer; freed at the end of a `with` block or by `close`."""

    def __init__(self, ggml: Ggml, count: int, *, graphs: int = 0, graph_size: int = 0) -> None:
        self.ggml = ggml
        size = count * ggml.tensor_overhead()
        size += graphs * ggml.graph_overhead_custom(graph_size, False)
        self.context = ggml.init(_InitParams(size, None, True))
        self.buffer: int | None = None

    def add(self, number: int, shape: tuple[int, int]) -> int:
        """Add a tensor [rows, columns]; ggml counts columns first."""
        tensor: int = self.ggml.new_tensor_2d(self.context, number, shape[1], shape[0])
        return tensor

    def allocate(self, buffer_type: int) -> None:
        """Allocate the tensors that have no memory yet."""
        self.buffer = self.ggml.backend_alloc_ctx_tensors_from_buft(self.context, buffer_type)
        assert self.buffer is not None, "ggml could not allocate its tensors"

    def close(self) -> None:
        """Free the tensors and their memory."""
        if self.buffer is not None:
            self.ggml.backend_buffer_free(self.buffer)
        self.ggml.free(self.context)
        self.buffer = self.context = None

    def __enter__(self) -> _Tensors:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class GgmlRing(Ring):
    """A ring of matrices [n, m] of a ggml format in a buffer type."""

    def __init__(self, ggml: Ggml, kind: str, buffer_type: str, setup: Setup) -> None:
        number, instruction = TYPES[kind]
        super().__init__(f"{kind} {buffer_type}".strip(), instruction, setup)
        self.ggml = ggml
        n, m = setup.shape
        self.set_bytes(n * ggml.row_size(number, m))
        strip_sm = torch.randn(STRIP, m, generator=setup.generator)
        stored, self._values_sm = ggml.quantize(kind, strip_sm)
        matrix = stored.repeat(-(-n // STRIP), 1)[:n].contiguous()
        self._weights = _Tensors(ggml, self.count)
        self._tensors = [self._weights.add(number, setup.shape) for _ in range(self.count)]
        self._weights.allocate(ggml.buffer_types[buffer_type])
        for tensor in self._tensors:
            ggml.backend_tensor_set(tensor, matrix.data_ptr(), 0, matrix.nbytes)
        self._pass: _Tensors | None = None

    def set_threads(self, threads: int) -> None:
        self.ggml.set_threads(threads)

    def rest(self) -> None:
        # They would spin for the next graph.
        self.ggml.threadpool_pause(self.ggml.pool)

    def matrix(self) -> Tensor:
        n = self.shape[0]
        return self._values_sm.repeat(-(-n // STRIP), 1)[:n]

    def multiply(self, x_Nm: Tensor, part: int) -> list[Callable[[], Tensor]]:
        ggml, (n, m), rows = self.ggml, self.shape, len(x_Nm)
        slices = self.slices(part)
        # A graph's table of tensors holds products, matrices and x.
        size = 2 * part + 1
        if self._pass is not None:
            self._pass.close()
        tensors = self._pass = _Tensors(ggml, self.count + 1, graphs=len(slices), graph_size=size)
        x = tensors.add(F32, (rows, m))
        products = [ggml.mul_mat(tensors.context, weight, x) for weight in self._tensors]
        tensors.allocate(ggml.buffer_types[""])
        x_Nm = x_Nm.float().contiguous()
        ggml.backend_tensor_set(x, x_Nm.data_ptr(), 0, x_Nm.nbytes)

        def run(graph: int, last_Nn: Tensor) -> Tensor:
            ggml.compute(graph)
            return last_Nn

        parts = []
        for numbers in slices:
            graph = ggml.new_graph_custom(tensors.context, size, False)
            for number in numbers:
                ggml.build_forward_expand(graph, products[number])
            address = ggml.get_data(products[numbers[-1]])
            memory = (ctypes.c_float * (rows * n)).from_address(address)
            last_Nn = torch.frombuffer(memory, dtype=torch.float32).view(rows, n)
            parts.append(partial(run, graph, last_Nn))
        return parts

    def close(self) -> None:
        if self._pass is not None:
            self._pass.close()
        self._weights.close()
