"""Ranks on this machine's CPU, over gloo."""

from pathlib import Path

import pytest

from rank_group import Pool
from tiny import save_tiny_model


@pytest.fixture(scope="session")
def pool() -> Pool:
    return Pool()


@pytest.fixture(scope="session")
def tied_models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Models whose embeddings are tied, or are not."""
    root = tmp_path_factory.mktemp("tied")
    return {tied: save_tiny_model(root / str(tied), tied=tied) for tied in (False, True)}
