"""Remembers which of several ways is the fastest on this machine."""

import json
import os
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch


def fastest(question: str, candidates: Mapping[str, Callable[[], object]], device: torch.device) -> str:
    """The candidate that takes the least time; measured once, then read from a file, XORL_TUNING or in ~/.cache.

    The file keeps runs alike: candidates may differ in the last bits of their results. Where nothing can be measured,
    that is not on CUDA, the first is as good as any.
    """
    if device.type != "cuda":
        return next(iter(candidates))
    answers = _answers()
    question = f"{question} on {torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    if answers.get(question) not in candidates:
        answers[question] = _measure(candidates)
        _write(answers)
    return answers[question]


def _measure(candidates: Mapping[str, Callable[[], object]]) -> str:
    from triton.testing import do_bench  # not installed everywhere

    times = [(do_bench(run, warmup=5, rep=20, return_mode="median"), name) for name, run in candidates.items()]
    return min(times)[1]  # pyright: ignore[reportArgumentType] - a number, for this return_mode


@cache
def _answers() -> dict[str, str]:
    try:
        return json.loads(_path().read_text())
    except (OSError, ValueError):
        return {}


def _write(answers: Mapping[str, str]) -> None:
    """As far as the disk allows: without it the next process measures again."""
    path = _path()
    temporary = path.with_suffix(f".{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(answers, indent=1))
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)


def _path() -> Path:
    return Path(os.environ.get("XORL_TUNING", "~/.cache/xorl/fused_lora.json")).expanduser()
