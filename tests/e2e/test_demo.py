"""The examples that users copy run from end to end, on a model too small to learn much."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from processes import running
from tiny import save_tiny_model
from xorl.demo.report import Report
from xorl.demo.rl import Settings, StepReport, train


class Servers(NamedTuple):
    model: str
    trainer: str
    sampler: str


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    """Both servers on a tiny model that reads characters."""
    root = tmp_path_factory.mktemp("demo")
    model = str(save_tiny_model(root / "model", "llama", tied=True))
    characters = ["<pad>", "<s>", "</s>", "\n", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({text: i for i, text in enumerate(characters)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(model)
    arguments = ("serve", "--model", model, "--output-dir", str(root / "output"))
    with (
        running(root / "serve.log", *arguments) as trainer,
        running(root / "sampler.log", "sampler", "--model", model) as sampler,
    ):
        yield Servers(model, trainer, sampler)


def test_the_rl_loop(servers: Servers, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(servers.model)
    settings = Settings(steps=3, num_problems=4, group_size=4, rank=2)
    with Report("tiny", settings.steps, tmp_path) as report:
        events = list(train(servers.trainer, servers.sampler, servers.model, tokenizer, settings))
        for event in events:
            report.add(event)
        report.finish(1.0)
    before, *steps, after = events
    assert isinstance(before, float)
    assert isinstance(after, float)
    assert [step.step for step in steps if isinstance(step, StepReport)] == [1, 2, 3]
    assert (tmp_path / "rewards.png").stat().st_size > 1000
    assert "held-out accuracy" in capsys.readouterr().out


def test_supervised_fine_tuning_with_tinker(servers: Servers) -> None:
    host, port = servers.sampler.removeprefix("http://").split(":")
    httpx.post(f"{servers.trainer}/add_inference_endpoint", json={"host": host, "port": int(port)}).raise_for_status()
    command = ["-m", "xorl.demo.sft_tinker", "--base-url", servers.trainer, "--model", servers.model, "--steps", "4"]
    result = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120, check=True)
    losses = [float(line.split()[-1]) for line in result.stdout.splitlines() if line.startswith("step")]
    assert losses[-1] < losses[0]
    assert "saved as tinker://" in result.stdout
    assert "Q: What do you train with?" in result.stdout
