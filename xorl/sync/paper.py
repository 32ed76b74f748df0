"""Prints the plan of a sync, its bytes and how long it would take, from a model's config alone."""

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM

from xorl.quantization import Fp8
from xorl.sync.forecast import Backend, Costs, Forecast, forecast
from xorl.sync.formats import Weight
from xorl.sync.produce import Plan

TERMS = {
    "wire": "bytes over the slowest receiver's ingress",
    "load": "receivers put each bucket in place before they take the next one",
    "buckets": "announcement, launch and answer of each bucket",
    "lag": "production that the wire does not hide",
    "fill": "the first bucket's production",
    "drain": "the last bucket's load",
    "pause": "pause, begin, end, version, flush, resume",
}
"""What each field of a `Forecast` says."""


def report(
    model: str, endpoints: int, ranks: int, ingress: float, fp8: Fp8 | None, bucket_bytes: int, backend: Backend
) -> int:
    """Print the plan; returns the exit status, 1 if there is no such model.

    Args:
        model: a folder with a config.json, that file, or a name in the local cache of Hugging Face's hub.
        ranks: tensor-parallel ranks of each endpoint; each takes every byte.
        ingress: bytes a second.
    """
    console = Console()
    try:
        plan = Plan.of(weights_of(model), fp8, bucket_bytes)
    except (OSError, ValueError) as error:
        console.print(f"model {model}: {error}", markup=False)
        return 1
    predicted = forecast(plan.buckets, Costs(ingress), 1 + endpoints * ranks, backend)
    console.print(_plan_table(model, plan))
    console.print(_time_table(predicted, f"{endpoints} endpoints of {ranks} ranks, {ingress / 1e9:g} GB/s, {backend}"))
    return 0


def weights_of(model: str) -> list[Weight]:
    """The weights of a bfloat16 checkpoint, on the meta device.

    Raises:
        OSError, ValueError: its config is not there, or not one that transformers reads.
    """
    config = AutoConfig.from_pretrained(model, local_files_only=True)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return [Weight(name, parameter, torch.bfloat16) for name, parameter in network.named_parameters()]


def _plan_table(model: str, plan: Plan) -> Table:
    items = [item for bucket in plan.buckets for item in bucket.items]
    sizes = [bucket.num_bytes for bucket in plan.buckets]
    parameters = sum(item.values.num_items for item in items)
    table = Table("", "", title=f"sync of {model}", show_header=False)
    table.add_row("weights", f"{len(items):,}, of {parameters / 1e9:,.2f} G parameters")
    table.add_row("form", "bfloat16" if plan.fp8 is None else f"FP8, a scale each {plan.fp8.form}")
    table.add_row("bytes", f"{plan.num_bytes:,}")
    table.add_row("buckets", f"{len(sizes):,}, of {_mib(min(sizes))} to {_mib(max(sizes))}")
    return table


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def _time_table(predicted: Forecast, title: str) -> Table:
    table = Table("term", "s", "what it is", title=title)
    table.columns[1].justify = "right"
    for (field, seconds), what in zip(predicted._asdict().items(), TERMS.values(), strict=True):
        table.add_row(field.removesuffix("_s"), f"{seconds:.3f}", what)
    table.add_section()
    table.add_row("total", f"{predicted.total_s:.3f}", "request to resumed; a prediction")
    return table
