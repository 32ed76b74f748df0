"""The command line: xorl serve | sampler | demo | doctor | sync-plan."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import click
from pydantic.fields import FieldInfo

from xorl.config import ConfigError, load, settings


@click.group()
def main() -> None:
    """Train language models with reinforcement learning, over HTTP."""


def _setting_options(command: Callable[..., None]) -> Callable[..., None]:
    """A flag for every setting, so that flags, environment and YAML cannot drift apart."""
    for section, name, field in reversed(list(settings())):
        command = _option(section, name, field)(command)
    return command


def _option(section: str, name: str, field: FieldInfo) -> Callable[[Callable[..., None]], Callable[..., None]]:
    flag = f"--{name.replace('_', '-')}"
    default = "required" if field.is_required() else f"default {field.default}"
    text = f"[{section}] {field.description} ({default})"
    if field.annotation is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, default=None, help=text)
    choices = [str(choice) for choice in get_args(field.annotation)]
    return click.option(flag, name, default=None, help=text, metavar="|".join(choices) or name.upper())


@main.command()
@click.option("--config", type=click.Path(path_type=Path, exists=True), help="a YAML file of settings")
@_setting_options
def serve(config: Path | None, **flags: Any) -> None:
    """Serve a base model for training. Every flag is also an XORL_* variable and a setting of the YAML file.

    Under torchrun the first rank serves, and the others compute with it.
    """
    if int(os.environ.get("RANK", "0")) > 0:
        from xorl.engine.follower import main as follow

        return follow()
    try:
        settings_tree = load(flags, config)
    except ConfigError as error:
        sys.exit(f"xorl serve: {error}")
    if "RANK" in os.environ and settings_tree.engine.gpus > 1:
        sys.exit("xorl serve: gpus: leave it out under torchrun, which has started the ranks already")
    from xorl.server.app import serve  # imports FastAPI, which `xorl --help` can do without

    serve(settings_tree)


@main.command()
@click.option("--model", required=True, help="Hugging Face name or local folder")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", default=30000, show_default=True)
@click.option("--device", default="auto", type=click.Choice(["auto", "cpu", "cuda"]), show_default=True)
@click.option("--dtype", default="auto", type=click.Choice(["auto", "float32", "bfloat16"]), show_default=True)
def sampler(model: str, host: str, port: int, device: str, dtype: str) -> None:
    """Serve a model for inference with SGLang's protocol, on a machine without SGLang."""
    from xorl.sampler.app import serve

    serve(model, host, port, device, dtype)


@main.command()
@click.option("--model", help="Hugging Face name or local folder; SmolLM2-135M-Instruct without it")
@click.option("--steps", type=int, default=None, help="training steps")
@click.option("--seed", default=0, show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path("demo-output"), show_default=True)
def demo(model: str | None, steps: int | None, seed: int, output: Path) -> None:
    """Train a model by reinforcement learning on this machine, from rollout to plot."""
    from xorl.demo import run

    run(model=model, steps=steps, seed=seed, output=output)


@main.command()
@click.option("--model", default=None, help="also tell what this model needs")
def doctor(model: str | None) -> None:
    """Say what this machine has, and what to do about what is missing."""
    from xorl.doctor import report

    sys.exit(report(model))


@main.command()
@click.option("--model", required=True, help="Hugging Face name, local folder, or a config.json; no weights are read")
@click.option("--endpoints", default=1, show_default=True, type=click.IntRange(1), help="inference servers")
@click.option("--ranks", default=1, show_default=True, type=click.IntRange(1), help="tensor-parallel ranks of each")
@click.option("--bandwidth", required=True, type=click.FloatRange(0, min_open=True), help="GB/s that a rank receives")
@click.option("--format", "form", default="bf16", type=click.Choice(["bf16", "fp8"]), show_default=True)
@click.option("--bucket-mib", default=1024, show_default=True, type=click.IntRange(1), help="bytes of a broadcast")
@click.option("--backend", default="nccl", type=click.Choice(["nccl", "gloo"]), show_default=True)
def sync_plan(
    model: str,
    endpoints: int,
    ranks: int,
    bandwidth: float,
    form: str,
    bucket_mib: int,
    backend: Literal["nccl", "gloo"],
) -> None:
    """Say what a weight sync would send and how long it would take, without a GPU and without weights."""
    from xorl.quantization import Fp8
    from xorl.sync.paper import report

    fp8 = Fp8() if form == "fp8" else None
    sys.exit(report(model, endpoints, ranks, bandwidth * 1e9, fp8, bucket_mib * 2**20, backend))


if __name__ == "__main__":
    main()
