"""What do our kernels compile to for GPUs that are not here? `python -m bench.aot [--json FILE]`

Registers, stack (spills), shared memory and the width of loads and stores, for the forms that run in production.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from xorl_kernels.fp8_quantize import kernel

TARGETS = (90, 100)
POINTERS = {
    "codes_ptr": "*fp8e4nv",
    "scales_ptr": "*fp32",
    "out_ptr": "*bf16",
    "amax_ptr": "*i32",
    "flags_ptr": "*i32",
    "piece_of_program_ptr": "*i32",
    "table_ptr": "*i64",
}


@dataclass(frozen=True)
class Case:
    """A kernel with the constants of one use of it."""

    name: str
    function: Any  # of triton.jit
    constants: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Compiled:
    """What came out of one case for one target."""

    name: str
    target: str
    aligned: bool
    registers: int
    stack: int
    shared: int
    wide_loads: int  # of 16 bytes or more, from global memory
    narrow_loads: int  # of 2 bytes or fewer
    wide_stores: int
    narrow_stores: int
    products: str  # tensor-core instruction


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write one line a kernel here")
    chosen = parser.parse_args(arguments)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default of Triton 3.9, which warns that it will change
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 leaves nothing to compile; unset it")
    compiled = [build(case, capability) for capability in TARGETS for case in cases()]
    Console(width=130).print(_table(compiled))
    if chosen.json is not None:
        chosen.json.write_text("".join(json.dumps(asdict(result)) + "\n" for result in compiled))


def cases() -> Iterator[Case]:
    """The kinds of launches that syncs of Qwen3 and Llama models make, and what unaligned weights fall back to."""
    bfloat16, float32 = torch.bfloat16, torch.float32
    kinds = [
        (kernel.Kind("block", bfloat16, None, True, False), 0),
        (kernel.Kind("block", float32, None, True, False), 0),
        (kernel.Kind("block", bfloat16, None, True, True), 0),
        (kernel.Kind("block", bfloat16, float32, True, False), 16),
        (kernel.Kind("block", bfloat16, float32, True, False), 64),
        (kernel.Kind("block", bfloat16, float32, True, False), 128),
        (kernel.Kind("channel", bfloat16, None, True, False), 0),
        (kernel.Kind("channel", bfloat16, float32, True, False), 16),
        (kernel.Kind("tensor", bfloat16, None, True, False), 0),
        (kernel.Kind("bfloat16", bfloat16, None, True, False), 0),
        (kernel.Kind("bfloat16", bfloat16, float32, True, False), 16),
        (kernel.Kind("block", bfloat16, None, False, False), 0),
    ]
    for kind, lora_rank in kinds:
        constants = kernel.constants(kind, lora_rank)
        for function in kernel.functions(kind):
            wanted = {name: value for name, value in constants.items() if name in function.arg_names}
            yield Case(_name(function, kind, lora_rank), function, wanted, kernel.compile_options(kind))


def _name(function: Any, kind: kernel.Kind, lora_rank: int) -> str:
    words = [function.__name__.lstrip("_"), str(kind.dtype).removeprefix("torch.")]
    words += [kind.kernel] * (kind.kernel in ("channel", "tensor")) + [f"rank {lora_rank}"] * (lora_rank > 0)
    return ", ".join([*words, *["power of two"] * kind.power_of_two, *["unaligned"] * (not kind.aligned)])


def build(case: Case, capability: int) -> Compiled:
    """Compile as a launch would: pointers are multiples of 16, as all of PyTorch's are."""
    names = case.function.arg_names
    source = ASTSource(
        case.function,
        {name: POINTERS.get(name, "constexpr") for name in names},
        constexprs=case.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in names if name in POINTERS},
    )
    target = GPUTarget("cuda", capability, 32)
    built: Any = triton.compile(source, target=target, options=case.options)
    ptx = built.asm["ptx"]
    usage = _resource_usage(built.asm["cubin"])
    products = re.search(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", ptx)
    return Compiled(
        case.name,
        f"sm_{capability}",
        case.constants["ALIGNED"],
        usage["REG"],
        usage["STACK"],
        built.metadata.shared,
        _accesses(ptx, "ld", _is_wide),
        _accesses(ptx, "ld", _is_narrow),
        _accesses(ptx, "st", _is_wide),
        _accesses(ptx, "st", _is_narrow),
        products.group() if products else "",
    )


def _is_wide(num_bytes: int) -> bool:
    return num_bytes >= 16


def _is_narrow(num_bytes: int) -> bool:
    return num_bytes <= 2


def _accesses(ptx: str, kind: str, test: Any) -> int:
    """How many loads or stores of global memory have a size that passes."""
    found = re.findall(rf"\b{kind}\.global[.\w:]*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
    return sum(test(int(count or 1) * int(bits) // 8) for count, bits in found)


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and the like, as the tool that comes with Triton reads them from the binary."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        output = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", output.stdout)}


def _table(compiled: Sequence[Compiled]) -> Table:
    table = Table(title="kernels, compiled ahead of time", caption=f"triton {triton.__version__}")
    table.add_column("kernel", no_wrap=True)
    table.add_column("target", no_wrap=True)
    for column in ("registers", "stack", "shared", "loads 16 B / ≤2 B", "stores 16 B / ≤2 B"):
        table.add_column(column, justify="right")
    table.add_column("products", no_wrap=True)
    for result in compiled:
        loads, stores = f"{result.wide_loads} / {result.narrow_loads}", f"{result.wide_stores} / {result.narrow_stores}"
        numbers = map(str, (result.registers, result.stack, result.shared))
        table.add_row(result.name, result.target, *numbers, loads, stores, result.products)
    return table


if __name__ == "__main__":
    main()
