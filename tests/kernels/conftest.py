"""Runs Triton kernels on the CPU as a GPU would."""

import inspect
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture(scope="session")
def device() -> Iterator[torch.device]:
    """Where kernels are tested: compiled on CUDA; elsewhere, or under TRITON_INTERPRET=1, interpreted on the CPU."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") != "1":
        if not torch.cuda.is_available():
            pytest.skip("neither a CUDA device nor TRITON_INTERPRET=1")
        yield torch.device("cuda")
        return
    with pytest.MonkeyPatch.context() as patch:
        cure_interpreter(patch)
        yield torch.device("cpu")


def cure_interpreter(patch: pytest.MonkeyPatch) -> None:
    """Give the interpreter PyTorch's casts, and products of bfloat16 by value.

    Its own casts truncate to bfloat16 and mis-round to e4m3; its dot takes the bits of bfloat16 for integers.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    dtypes = {
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.bfloat16: torch.bfloat16,
        tl.float16: torch.float16,
        tl.float32: torch.float32,
    }
    their_convert, their_dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot
    assert _arguments(their_convert) == ["input", "input_dtype", "output_dtype", "rounding_mode"]
    assert _arguments(their_dot) == ["self", "a", "b", "d", "input_precision", "max_num_imprecise_acc"]

    def convert(input: np.ndarray, input_dtype: Any, output_dtype: Any, rounding_mode: Any) -> np.ndarray:
        nearest = rounding_mode in (None, interpreter._ir.ROUNDING_MODE.RTNE)
        if not (nearest and input_dtype in dtypes and output_dtype in dtypes):
            return their_convert(input, input_dtype, output_dtype, rounding_mode)
        bits = torch.from_numpy(np.ascontiguousarray(input).reshape(-1).view(f"u{input.itemsize}"))
        values = bits.view(dtypes[input_dtype]).float()
        if output_dtype == tl.float8e4nv:
            values = values.clamp(-448, 448)  # saturates, as the hardware does, and keeps NaN
        cast = values.to(dtypes[output_dtype]).view(getattr(torch, f"uint{output_dtype.primitive_bitwidth}"))
        return cast.numpy().reshape(input.shape)

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        return their_dot(self, widened(a), widened(b), d, input_precision, max_num_imprecise_acc)

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        data = convert(handle.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return interpreter.TensorHandle(data, tl.float32)

    patch.setattr(interpreter, "_convert_float", convert)
    patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)


def _arguments(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)
