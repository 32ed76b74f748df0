"""An engine on a tiny model, and requests to give it."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import config_for
from xorl.engine.engine import Engine


@pytest.fixture
def new_engine(tiny_model: Path, tmp_path: Path) -> Callable[..., Engine]:
    """Makes an engine; settings by name, the tiny model unless `model` says otherwise."""

    numbers = itertools.count()

    def make(**settings: object) -> Engine:
        config = config_for(**{"model": str(tiny_model), "output_dir": str(tmp_path), **settings})
        return Engine(config, tmp_path / f"evicted-{next(numbers)}")

    return make
