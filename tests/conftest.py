"""Fixtures that all tests share: tiny models, made on the spot."""

import os
from pathlib import Path

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # triton reads it on import

import pytest

from tiny import save_tiny_model

torch.set_num_threads(1)  # the models are too small for more to help


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model of each architecture: folder by name."""
    root = tmp_path_factory.mktemp("models")
    return {arch: save_tiny_model(root / f"tiny-{arch}", arch) for arch in ("llama", "qwen2", "qwen3")}


@pytest.fixture(scope="session")
def tiny_model(tiny_models: dict[str, Path]) -> Path:
    return tiny_models["qwen3"]
