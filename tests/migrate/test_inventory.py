"""hosts.toml: what is wrong is named with file, line and key; edits leave the rest alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrate import inventory
from migrate.inventory_edit import add_host, remove_host, set_host_key
from protocol.errors import UsageError

PATH = Path("/etc/migrate/hosts.toml")
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIJ"

GOOD = f"""
# the cluster
[defaults]
user = "mover"
identity = "keys/id"

[hosts.hostA]
address = "10.77.0.11"   # rack 1
port = 7022
host_key = "{KEY}"

[hosts."host.b"]
address = "10.77.0.12"
known_hosts = "/etc/ssh/known"
user = "root"
"""


def test_defaults_hold_for_every_host_that_says_nothing_else():
    hosts = inventory.parse(GOOD, PATH).hosts
    assert hosts["hostA"].user == "mover"
    assert hosts["host.b"].user == "root"
    assert hosts["hostA"].identity == Path("/etc/migrate/keys/id")


def test_a_host_without_a_port_is_agentless_on_22():
    host = inventory.parse(GOOD, PATH).hosts["host.b"]
    assert host.agentless
    assert host.ssh_port == 22
    assert not inventory.parse(GOOD, PATH).hosts["hostA"].agentless


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("[hosts.a]\naddress = '1.2.3.4'\n", "hosts.toml:1: hosts.a.host_key is missing", id="no key"),
        pytest.param("[hosts.a]\nhost_key = 'ssh-ed25519 A'\n", "hosts.toml:1: hosts.a.address", id="no address"),
        pytest.param(
            "[hosts.a]\naddress = '1'\nhostkey = 'x'\n", "hosts.toml:3: hosts.a.hostkey is not known", id="unknown key"
        ),
        pytest.param(
            f"[hosts.a]\naddress='1'\nhost_key='{KEY}'\nport = 'ssh'\n", "hosts.toml:4: hosts.a.port", id="port: text"
        ),
        pytest.param(
            f"[hosts.a]\naddress='1'\nhost_key='{KEY}'\nport = 70000\n", "not a TCP port", id="port out of range"
        ),
        pytest.param("[hosts.a]\naddress='1'\nhost_key='AAAA'\n", "hosts.toml:3: hosts.a.host_key", id="key's form"),
        pytest.param("[defaults]\nhost_key = 'x y'\n", "hosts.toml:2: defaults.host_key", id="one key for all hosts"),
        pytest.param("[host.a]\naddress = '1'\n", "hosts.toml:1: host is not a part", id="unknown section"),
        pytest.param("hosts = 1\n", "hosts is not a table", id="not a table"),
        pytest.param("[hosts.a\n", "not TOML", id="not TOML"),
        pytest.param(f"[hosts.'a b']\naddress='1'\nhost_key='{KEY}'\n", "is not a host's name", id="name"),
    ],
)
def test_what_is_wrong_is_named(text, said):
    with pytest.raises(UsageError) as caught:
        inventory.parse(text, PATH)
    assert said in caught.value.message


def test_a_host_that_is_not_trusted_says_how_to_trust_it():
    with pytest.raises(UsageError) as caught:
        inventory.parse("[hosts.a]\naddress = '1.2.3.4'\n", PATH)
    assert caught.value.hint == "migrate hosts trust a"


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(UsageError) as caught:
        inventory.load(tmp_path / "none.toml")
    assert "migrate hosts add" in caught.value.hint


def test_the_environment_names_the_inventory(monkeypatch):
    monkeypatch.setenv("MIGRATE_INVENTORY", "/srv/hosts.toml")
    assert inventory.default_path() == Path("/srv/hosts.toml")


def test_a_host_can_be_added_to_a_file_that_is_not_there_yet(tmp_path):
    path = tmp_path / "new" / "hosts.toml"
    made = add_host(path, "hostA", {"address": "10.0.0.1", "port": 7022, "host_key": KEY})
    assert made.hosts["hostA"].port == 7022
    assert inventory.load(path).hosts == made.hosts


def test_an_edit_keeps_comments_and_order(tmp_path):
    path = tmp_path / "hosts.toml"
    path.write_text(GOOD)
    set_host_key(path, "host.b", "ssh-ed25519 BBBB")
    set_host_key(path, "hostA", "ssh-ed25519 CCCC")
    text = path.read_text()
    assert "# the cluster" in text
    assert "# rack 1" in text
    hosts = inventory.load(path).hosts
    assert hosts["host.b"].host_key == "ssh-ed25519 BBBB"
    assert hosts["hostA"].host_key == "ssh-ed25519 CCCC"
    assert text.count("host_key") == 2


def test_a_removed_host_is_gone_and_the_others_stay(tmp_path):
    path = tmp_path / "hosts.toml"
    path.write_text(GOOD)
    remove_host(path, "hostA")
    assert list(inventory.load(path).hosts) == ["host.b"]
    with pytest.raises(UsageError):
        remove_host(path, "hostA")


def test_an_edit_that_would_break_the_file_changes_nothing(tmp_path):
    path = tmp_path / "hosts.toml"
    path.write_text(GOOD)
    with pytest.raises(UsageError):
        add_host(path, "hostC", {"address": "10.0.0.3"})
    assert path.read_text() == GOOD
