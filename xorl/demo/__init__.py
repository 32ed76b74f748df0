"""Runs the RL demo on this machine, from the servers' start to the plot."""

import logging
import os
import time
from pathlib import Path


def run(model: str | None, steps: int | None, seed: int, output: Path) -> None:
    """Train `model` (SmolLM2-135M-Instruct if None) on short sums, and leave plot and logs in `output`."""
    if model is None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # The client warns that a server may ignore the rank; this one does not.
    logging.getLogger("xorl_client").setLevel(logging.ERROR)
    from transformers import AutoTokenizer

    from xorl.demo.launch import servers
    from xorl.demo.model import smollm2_path
    from xorl.demo.report import Report
    from xorl.demo.rl import Settings, train

    settings = Settings(seed=seed) if steps is None else Settings(seed=seed, steps=steps)
    output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    path = model or str(smollm2_path())
    with Report(Path(path).name, settings.steps, output) as report, servers(path, output) as urls:
        tokenizer = AutoTokenizer.from_pretrained(path)
        for event in train(urls.trainer, urls.sampler, path, tokenizer, settings):
            report.add(event)
        report.finish(time.monotonic() - start)
