"""The hosts that a coordinator may talk to: hosts.toml, validated as a whole before anything is connected."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import UsageError

USER_PATH = Path("~/.config/migrate/hosts.toml")
SYSTEM_PATH = Path("/etc/migrate/hosts.toml")
ENVIRONMENT = "MIGRATE_INVENTORY"
SSH_PORT = 22

_HOST_KEYS: dict[str, type] = {
    "address": str,
    "port": int,
    "user": str,
    "identity": str,
    "host_key": str,
    "known_hosts": str,
}
_DEFAULT_KEYS = _HOST_KEYS.keys() - {"address", "host_key"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,254}")
_HEADER = re.compile(r"""\s*\[\s*hosts\s*\.\s*(?:"([^"]+)"|'([^']+)'|([A-Za-z0-9_-]+))\s*\]""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """How the agent of one host is reached, and by which key it is known."""

    name: str
    address: str
    port: int | None  # None: agentless, by the host's own sshd
    user: str
    identity: Path | None
    host_key: str  # OpenSSH format; '' if `known_hosts` is used
    known_hosts: Path | None

    @property
    def ssh_port(self) -> int:
        """The TCP port to connect to."""
        return self.port if self.port is not None else SSH_PORT

    @property
    def agentless(self) -> bool:
        """Whether the agent is started over the host's sshd, for this session only."""
        return self.port is None


@dataclass(frozen=True, slots=True)
class Inventory:
    """All hosts, by name, and the file that they come from."""

    path: Path
    hosts: Mapping[str, Host]

    def host(self, name: str) -> Host:
        """The host of that name.

        Raises: UsageError: there is none.
        """
        try:
            return self.hosts[name]
        except KeyError:
            known = ", ".join(sorted(self.hosts)) or "none"
            raise UsageError(
                f"{self.path}: there is no host {name!r}; known: {known}",
                code="unknown-host",
                hint=f"add it: migrate hosts add {name} --address ADDRESS",
            ) from None

    def choose(self, names: tuple[str, ...]) -> list[Host]:
        """The named hosts, or all of them.

        Raises: UsageError: an unknown name, or nothing to choose from.
        """
        chosen = [self.host(name) for name in names] if names else list(self.hosts.values())
        if not chosen:
            raise UsageError(f"{self.path}: no hosts", code="inventory", hint="add one: migrate hosts add")
        return chosen


def default_path() -> Path:
    """The inventory that is used unless one is named: the environment's, the user's, the system's.

    The user's path is given if none of them exists.
    """
    named = os.environ.get(ENVIRONMENT)
    if named:
        return Path(named)
    user = USER_PATH.expanduser()
    return SYSTEM_PATH if SYSTEM_PATH.exists() and not user.exists() else user


def load(path: Path) -> Inventory:
    """Read and validate an inventory.

    Raises: UsageError: it cannot be read, is not TOML, or something in it is wrong: names file, line and key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(
            f"there is no inventory {path}",
            code="inventory",
            hint=f"make it with `migrate hosts add`, or name one by --inventory or {ENVIRONMENT}",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read the inventory {path}: {error}", code="inventory") from error
    return parse(text, path)


def parse(text: str, path: Path) -> Inventory:
    """The inventory in `text`; `path` is for messages and for paths relative to it.

    Raises: UsageError: as `load`.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path}: not TOML: {error}", code="inventory") from error
    lines = text.splitlines()
    for key in document:
        if key not in {"defaults", "hosts"}:
            raise _wrong(
                path, _line_of(lines, "", key), key, "is not a part of an inventory ([defaults], [hosts.NAME])"
            )
    defaults = _table(document.get("defaults", {}), path, lines, "defaults")
    _check_keys(defaults, _DEFAULT_KEYS, path, lines, "defaults")
    tables = _table(document.get("hosts", {}), path, lines, "hosts")
    return Inventory(path, {name: _host(name, table, defaults, path, lines) for name, table in tables.items()})


def reach(path: Path, name: str) -> tuple[str, int]:
    """Address and TCP port of a host whose key need not be known yet.

    Raises: UsageError: the file or that host is of no use.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"cannot read the inventory {path}: {error}", code="inventory") from error
    table = document.get("hosts", {}).get(name)
    if not isinstance(table, dict) or not isinstance(table.get("address"), str):
        raise UsageError(f"{path}: there is no host {name} with an address", code="unknown-host")
    port = table.get("port", document.get("defaults", {}).get("port", SSH_PORT))
    if not isinstance(port, int):
        raise UsageError(f"{path}: hosts.{name}.port is not a number", code="inventory")
    return table["address"], port


def _host(name: str, table: object, defaults: Mapping[str, object], path: Path, lines: list[str]) -> Host:
    section = f"hosts.{name}"
    own = _table(table, path, lines, section)
    line = _line_of(lines, section, "")
    if not _NAME.fullmatch(name):
        raise _wrong(path, line, section, "is not a host's name (letters, digits, and _ . + - within)")
    _check_keys(own, _HOST_KEYS.keys(), path, lines, section)
    address = own.get("address")
    if not isinstance(address, str) or not address:
        raise _wrong(path, line, f"{section}.address", "is missing")
    merged = {**defaults, **own}
    host_key, known_hosts = _text(own, "host_key"), _text(merged, "known_hosts")
    if not host_key and not known_hosts:
        raise _wrong(
            path,
            line,
            f"{section}.host_key",
            "is missing, and so is known_hosts: no host is trusted unseen",
            hint=f"migrate hosts trust {name}",
            code="no-host-key",
        )
    if host_key and len(host_key.split()) < 2:
        raise _wrong(
            path,
            _line_of(lines, section, "host_key"),
            f"{section}.host_key",
            "is not of the form 'ssh-ed25519 AAAA...'",
        )
    port = merged.get("port")
    identity = _text(merged, "identity")
    return Host(
        name=name,
        address=address,
        port=port if isinstance(port, int) else None,
        user=_text(merged, "user") or "root",
        identity=_path(identity, path) if identity else None,
        host_key=host_key,
        known_hosts=_path(known_hosts, path) if known_hosts and not host_key else None,
    )


def _text(table: Mapping[str, object], key: str) -> str:
    return str(table.get(key, ""))


def _path(text: str, inventory: Path) -> Path:
    return inventory.parent / Path(text).expanduser()


def _table(value: object, path: Path, lines: list[str], section: str) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise _wrong(path, _line_of(lines, "", section.rpartition(".")[2]), section, "is not a table")
    return value


def _check_keys(
    table: Mapping[str, object], allowed: AbstractSet[str], path: Path, lines: list[str], section: str
) -> None:
    for key, value in table.items():
        line = _line_of(lines, section, key)
        name = f"{section}.{key}"
        if key not in allowed:
            raise _wrong(path, line, name, f"is not known here; known: {', '.join(sorted(allowed))}")
        wanted = _HOST_KEYS[key]
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise _wrong(path, line, name, f"is not {'a number' if wanted is int else 'text'}")
        if key == "port" and isinstance(value, int) and not 0 < value < 65536:
            raise _wrong(path, line, name, f"is not a TCP port: {value}")


def _line_of(lines: list[str], section: str, key: str) -> int:
    """Line number of `key` in `section` ('' : at the top; key '' : the section's header); 0: not found.

    tomllib keeps no positions; this finds the usual forms, which are all that an error message needs.
    """
    current = ""
    for number, line in enumerate(lines, 1):
        header = section_of(line)
        if header is not None:
            current = header
            if (header == section and not key) or (not section and header.split(".")[0] == key):
                return number
        elif key and current == section and re.match(rf"""\s*["']?{re.escape(key)}["']?\s*=""", line):
            return number
    return 0


def section_of(line: str) -> str | None:
    """The section that a line of TOML opens ('defaults', 'hosts.hostA'); None: it opens none."""
    named = _HEADER.match(line)
    if named:
        return f"hosts.{named[1] or named[2] or named[3]}"
    plain = re.match(r"\s*\[\s*([^\[\]]+?)\s*\]", line)
    return plain[1] if plain else None


def _wrong(path: Path, line: int, key: str, what: str, *, hint: str = "", code: str = "inventory") -> UsageError:
    where = f"{path}:{line}" if line else str(path)
    return UsageError(f"{where}: {key} {what}", code=code, hint=hint)
