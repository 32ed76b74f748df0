"""Reports what this machine has, what is missing and what to do about it."""

import importlib.metadata
import platform
import shutil
from collections.abc import Iterator
from typing import Literal, NamedTuple

import psutil
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

GIB = 2**30
ADAPTER_HEADROOM = 1.2
"""Adapters, activations of a small batch and the allocator, beside the weights."""

BYTES_FULL_TRAINING = 16
"""float32 weight, gradient and two AdamW moments, a parameter."""


class Finding(NamedTuple):
    """One line of the report."""

    what: str
    status: Literal["ok", "missing", "note"]
    found: str
    advice: str = ""


def report(model: str | None) -> int:
    """Print the findings; returns the exit status, 1 when something that `xorl serve` needs is missing."""
    findings = [*_software(), *_hardware(), *(_model(model) if model else ())]
    table = Table("", "found", "what to do", title="xorl doctor")
    marks = {"ok": "[green]ok[/]", "missing": "[red]missing[/]", "note": "[yellow]note[/]"}
    for finding in findings:
        table.add_row(f"{marks[finding.status]} {finding.what}", finding.found, finding.advice)
    Console().print(table)
    return int(any(finding.status == "missing" for finding in findings))


def _software() -> Iterator[Finding]:
    yield Finding("python", "ok", platform.python_version())
    cuda = torch.version.cuda
    yield Finding("torch", "ok", f"{torch.__version__}" + (f", CUDA {cuda}" if cuda else ", CPU only"))
    for package in ("transformers", "peft", "triton", "flash-attn", "sglang"):
        yield _package(package)
    yield _extension()
    backends = [name for name in ("nccl", "gloo") if dist.is_backend_available(name)]
    yield Finding("process groups", "ok" if backends else "missing", ", ".join(backends) or "none", "")


def _package(package: str) -> Finding:
    optional = {
        "triton": "pip install xorl[cuda], for the kernels on a GPU",
        "flash-attn": "optional: faster attention on a GPU",
        "sglang": "optional: inference servers may run elsewhere; `xorl sampler` needs none",
    }
    try:
        return Finding(package, "ok", importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        advice = optional.get(package, f"pip install {package}")
        return Finding(package, "note" if package in optional else "missing", "not installed", advice)


def _extension() -> Finding:
    try:
        from xorl import _C
    except ImportError as error:
        advice = "pip install --no-build-isolation . with a C++ compiler; the Python path serves meanwhile"
        return Finding("extension xorl._C", "note", str(error), advice)
    return Finding("extension xorl._C", "ok", str(_C.__file__))


def _hardware() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    yield Finding("CPU", "ok", f"{cores} cores, {memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free")
    yield Finding("disk", "ok", f"{shutil.disk_usage('.').free / GIB:.1f} GiB free here")
    if not torch.cuda.is_available():
        advice = (
            "install an NVIDIA driver and a CUDA build of torch" if torch.version.cuda is None else "check the driver"
        )
        yield Finding("GPU", "note", "none: everything runs on the CPU", advice)
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        major, minor = torch.cuda.get_device_capability(index)
        found = (
            f"{torch.cuda.get_device_name(index)}, sm_{major}{minor}, {free / GIB:.1f} of {total / GIB:.1f} GiB free"
        )
        yield Finding(f"GPU {index}", "ok", found)


def _model(model: str) -> Iterator[Finding]:
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError) as error:
        yield Finding(
            f"model {model}", "missing", str(error).splitlines()[0], "give a local folder or a name on the hub"
        )
        return
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(config).num_parameters()
    on_gpu = torch.cuda.is_available()
    free = torch.cuda.mem_get_info()[0] if on_gpu else psutil.virtual_memory().available
    yield Finding(f"model {model}", "ok", f"{config.model_type}, {parameters / 1e6:.0f} M parameters")
    lora_bytes = parameters * (2 if on_gpu else 4) * ADAPTER_HEADROOM
    for what, need in (("LoRA training", lora_bytes), ("full training", parameters * BYTES_FULL_TRAINING)):
        fits = need < free
        found = f"needs about {need / GIB:.1f} GiB and activations, {free / GIB:.1f} GiB free"
        yield Finding(what, "ok" if fits else "note", found, "" if fits else "use a smaller model or a larger machine")
