"""agent.toml: what is wrong is named by file and key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agent import settings
from agent.settings import Settings
from protocol.errors import UsageError

FULL = """
listen = "[::1]:7023"
host_key = "/k"
authorized_keys = "/a"
state_dir = "/s"
data_ports = "7100-7102"
name = "hostA"
[[runtimes]]
kind = "runc"
root = "/run/r"
[[runtimes]]
kind = "crun"
binary = "/opt/crun"
[network]
bridge = "cbr0"
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    return tmp_path / "agent.toml"


def test_every_key_is_read(config: Path):
    config.write_text(FULL)
    read = settings.load(config)
    assert read.listen_address == ("::1", 7023)
    assert read.data_port_list == [7100, 7101, 7102]
    assert [(r.kind, r.root, r.binary) for r in read.runtimes] == [("runc", "/run/r", ""), ("crun", "", "/opt/crun")]
    assert (read.network.bridge, read.name, read.state_dir) == ("cbr0", "hostA", "/s")


def test_an_empty_file_means_the_defaults(config: Path):
    config.write_text("")
    assert settings.load(config) == Settings()
    assert Settings().listen_address == ("0.0.0.0", 7022)
    assert len(Settings().data_port_list) == 100


def test_without_a_file_the_defaults_hold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(settings, "DEFAULT_PATH", tmp_path / "none.toml")
    assert settings.load(None) == Settings()


def test_the_default_path_is_read_when_it_is_there(monkeypatch: pytest.MonkeyPatch, config: Path):
    config.write_text('name = "me"')
    monkeypatch.setattr(settings, "DEFAULT_PATH", config)
    assert settings.load(None).name == "me"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("lisen = '0.0.0.0:1'", "lisen"),
        ("listen = 7022", "$.listen"),
        ("listen = '7022'", "listen"),
        ("listen = 'host:0'", "listen"),
        ("listen = 'host:70000'", "listen"),
        ("listen = 'host:²'", "listen"),
        (f"listen = 'host:{'1' * 5000}'", "listen"),
        ("data_ports = 'x'", "$.data_ports"),
        ("data_ports = 7100", "$.data_ports"),
        ("data_ports = '7200-7100'", "data_ports"),
        ("data_ports = '0-5'", "data_ports"),
        ("data_ports = '1-2000'", "data_ports"),
        ("data_ports = '65000-65536'", "data_ports"),
        (f"data_ports = '{'1' * 5000}'", "$.data_ports"),
        ("[[runtimes]]\nkind = 'docker'", "$.runtimes[0].kind"),
        ("[[runtimes]]\nroot = '/x'", "$.runtimes[0]"),
        ("runtimes = 'runc'", "$.runtimes"),
        ("[network]\nbrige = 'x'", "brige"),
        ("[network]\nbridge = 1", "$.network.bridge"),
        ("state_dir = ['/x']", "$.state_dir"),
    ],
)
def test_a_wrong_value_is_named_by_file_and_key(config: Path, text: str, key: str):
    config.write_text(text)
    with pytest.raises(UsageError) as caught:
        settings.load(config)
    assert str(config) in str(caught.value)
    assert key in str(caught.value)


def test_what_is_not_toml_is_named_with_its_line(config: Path):
    config.write_text("a = 1\nb ==")
    with pytest.raises(UsageError, match=r"is not TOML: .*line 2"):
        settings.load(config)


def test_what_is_not_utf8_is_not_toml(config: Path):
    config.write_bytes(b'name = "\xff"')
    with pytest.raises(UsageError, match="is not TOML"):
        settings.load(config)


def test_a_file_that_was_asked_for_must_be_there(config: Path):
    with pytest.raises(UsageError, match=re.escape(f"cannot read {config}: No such file")):
        settings.load(config)
