"""An engine on a tiny model, and requests to give it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from builders import config_for
from xorl.engine.engine import Engine


@pytest.fixture
def new_engine(tiny_model: Path, tmp_path: Path) -> Callable[..., Engine]:
    """Makes an engine; settings by name, the tiny model unless `model` says otherwise."""

    def make(**settings: object) -> Engine:
        return Engine(config_for(**{"model": str(tiny_model), "output_dir": str(tmp_path), **settings}))

    return make
