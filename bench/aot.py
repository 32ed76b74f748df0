"""What do our kernels compile to for GPUs that are not here? `python -m bench.aot [--json FILE]`

Registers, stack (spills), shared memory, the width of loads and stores and the instruction of products, for the forms
that run in production.
"""

import argparse
import importlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNELS = ("fp8_quantize", "logprobs", "fused_lora")
TARGETS = (80, 90, 100)
NUM_THREADS = 2  # the compiler works without the GIL


class Case(NamedTuple):
    """A kernel with the types and constants of one use of it, as a kernel module's `production` yields them."""

    name: str
    function: Any  # of triton.jit
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Compiled:
    """What came out of one case for one target."""

    module: str
    name: str
    target: str
    registers: int
    stack: int
    shared: int
    wide_loads: int  # of 16 bytes or more, from global memory
    narrow_loads: int  # of 2 bytes or fewer
    wide_stores: int
    narrow_stores: int
    multiplies: bool  # whether the source has a product
    products: str  # tensor-core instruction


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write one line a kernel here")
    chosen = parser.parse_args(arguments)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default of Triton 3.9, which warns that it will change
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("TRITON_INTERPRET=1 leaves nothing to compile; unset it")
    forms = [(module, case) for module in KERNELS for case in cases(module)]
    jobs = [(module, case, target) for module, case in forms for target in TARGETS if runs_on(case, target)]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        compiled = list(pool.map(build, *zip(*jobs, strict=True)))
    Console(width=140).print(_table(compiled))
    if chosen.json is not None:
        chosen.json.write_text("".join(json.dumps(asdict(result)) + "\n" for result in compiled))


def cases(module: str) -> Iterator[Case]:
    """The launches that a kernel module says training and sync make."""
    kernel = importlib.import_module(f"xorl_kernels.{module}.kernel")
    return (Case(*form) for form in kernel.production())


def runs_on(case: Case, capability: int) -> bool:
    """Before sm_89 there is no e4m3; a name such as "128x256, from sm_90 on" says that its tiles want that much."""
    least = re.search(r"from sm_(\d+) on", case.name)
    return capability >= max(89 if "*fp8e4nv" in case.types.values() else 0, int(least[1]) if least else 0)


def build(module: str, case: Case, capability: int) -> Compiled:
    """Compile as a launch would: pointers, sizes and strides are multiples of 16, as PyTorch's mostly are."""
    names = case.function.arg_names
    hints = "*" if "unaligned" in case.name else ("*", "i")
    hinted = [name for name, type in case.types.items() if type.startswith(hints)]
    source = ASTSource(
        case.function,
        {name: case.types.get(name, "constexpr") for name in names},
        constexprs={name: value for name, value in case.constants.items() if name in names},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in hinted},
    )
    built: Any = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=case.options)
    ptx = built.asm["ptx"]
    usage = _resource_usage(built.asm["cubin"])
    products = re.search(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", ptx)
    return Compiled(
        module,
        case.name,
        f"sm_{capability}",
        usage["REG"],
        usage["STACK"],
        built.metadata.shared,
        _accesses(ptx, "ld", _is_wide) + _copies_to_shared(ptx),
        _accesses(ptx, "ld", _is_narrow),
        _accesses(ptx, "st", _is_wide) + ptx.count("global.shared::cta.bulk_group"),
        _accesses(ptx, "st", _is_narrow),
        "tt.dot" in built.asm["ttir"],
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


def _copies_to_shared(ptx: str) -> int:
    """How many copies past the registers move 16 bytes or more: cp.async, or a whole tile."""
    pieces = re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?, (?:0x10|16)\b", ptx)
    return len(pieces) + len(re.findall(r"\bcp\.async\.bulk[\w.]*\.shared::\w+\.global", ptx))


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
    table.add_column("module", no_wrap=True)
    table.add_column("kernel", no_wrap=True)
    table.add_column("target", no_wrap=True)
    for column in ("registers", "stack", "shared", "loads 16 B / ≤2 B", "stores 16 B / ≤2 B"):
        table.add_column(column, justify="right")
    table.add_column("products", no_wrap=True)
    for result in compiled:
        loads, stores = f"{result.wide_loads} / {result.narrow_loads}", f"{result.wide_stores} / {result.narrow_stores}"
        numbers = map(str, (result.registers, result.stack, result.shared))
        table.add_row(result.module, result.name, result.target, *numbers, loads, stores, result.products)
    return table


if __name__ == "__main__":
    main()
