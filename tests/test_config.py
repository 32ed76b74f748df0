"""Flags, environment and YAML give the same settings; a wrong one is refused by name."""

from pathlib import Path

import pytest

from xorl.config import ConfigError, load, settings


def test_flags_win_over_environment_over_yaml(tmp_path: Path) -> None:
    file = tmp_path / "xorl.yaml"
    file.write_text("base: {model: from-yaml, full: true}\nhttp: {port: 1001, retrieve_hold_s: 7}\n")
    environ = {"XORL_MODEL": "from-environment", "XORL_PORT": "1002"}
    config = load({"port": 1003}, file, environ)
    assert (config.base.model, config.base.full) == ("from-environment", True)
    assert (config.http.port, config.http.retrieve_hold_s) == (1003, 7)


@pytest.mark.parametrize(
    ("flags", "environ", "named"),
    [
        ({"model": "m", "port": 0}, {}, r"http.port \(--port\)"),
        ({"model": "m"}, {"XORL_DEVICE": "tpu"}, r"base.device \(XORL_DEVICE\)"),
        ({}, {}, "model is not set"),
        ({"model": "m", "host": "0.0.0.0"}, {}, "api_key"),
    ],
)
def test_a_wrong_setting_is_named(flags: dict[str, object], environ: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        load(flags, environ=environ)


def test_an_unknown_yaml_setting_is_named(tmp_path: Path) -> None:
    file = tmp_path / "xorl.yaml"
    file.write_text("http: {prot: 1}\n")
    with pytest.raises(ConfigError, match=r"http\.prot: there is no such setting"):
        load({"model": "m"}, file, {})


def test_an_empty_yaml_section_is_as_good_as_none(tmp_path: Path) -> None:
    file = tmp_path / "xorl.yaml"
    file.write_text("base: {model: m}\nhttp:\n")
    assert load({}, file, {}).http.port == 5555
    file.write_text("1: {model: m}\n")
    with pytest.raises(ConfigError, match="expected sections"):
        load({}, file, {})


def test_an_open_door_needs_a_key_or_a_flag() -> None:
    load({"model": "m", "host": "0.0.0.0", "api_key": "k"}, environ={})
    load({"model": "m", "host": "0.0.0.0", "allow_remote_without_key": True}, environ={})


def test_names_are_unique_and_the_readme_lists_them_all() -> None:
    names = [name for _, name, _ in settings()]
    assert len(names) == len(set(names))
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert [name for name in names if f"`{name}`" not in readme] == []
