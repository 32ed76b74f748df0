"""Real servers on a tiny model, for the published clients to drive."""

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from processes import running


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture(scope="session")
def trainer(tiny_model: Path, logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of `xorl serve` with LoRA."""
    output = str(tmp_path_factory.mktemp("output"))
    with running(logs / "serve.log", "serve", "--model", str(tiny_model), "--output-dir", output) as url:
        yield url


@pytest.fixture(scope="session")
def full_trainer(tiny_model: Path, logs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of `xorl serve --full`."""
    output = str(tmp_path_factory.mktemp("full-output"))
    arguments = ("serve", "--full", "--model", str(tiny_model), "--output-dir", output)
    with running(logs / "full.log", *arguments) as url:
        yield url


@pytest.fixture(scope="session")
def sampler(tiny_model: Path, logs: Path) -> Iterator[str]:
    """URL of `xorl sampler`."""
    with running(logs / "sampler.log", "sampler", "--model", str(tiny_model)) as url:
        yield url


@pytest.fixture
def fresh_sampler(tiny_model: Path, logs: Path) -> Iterator[str]:
    """URL of a `xorl sampler` whose own weights a test may change."""
    with running(logs / "fresh-sampler.log", "sampler", "--model", str(tiny_model)) as url:
        yield url


@pytest.fixture(scope="session")
def _numbers() -> Iterator[int]:
    return itertools.count()


@pytest.fixture
def model_id(_numbers: Iterator[int]) -> str:
    """A model id that no other test uses."""
    return f"run{next(_numbers)}"
