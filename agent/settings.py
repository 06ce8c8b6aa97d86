"""agent.toml: read, checked, typed. A wrong key or value names the file and the place."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from protocol.errors import UsageError

DEFAULT_PATH = Path("/etc/migrate/agent.toml")
# One migration uses one port for its lifetime; a host seldom takes in more than a few at a time.
MAX_DATA_PORTS = 1000


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class RuntimeSettings(_Section, frozen=True, kw_only=True):
    """One OCI runtime and where it keeps its state."""

    kind: Literal["runc", "crun"]
    root: str = ""
    binary: str = ""


class NetworkSettings(_Section, frozen=True, kw_only=True):
    """Where the host end of a container's veth goes."""

    bridge: str = ""


class Settings(_Section, frozen=True, kw_only=True):
    """The agent's configuration; every field has a default that suits a single host."""

    listen: str = "0.0.0.0:7022"
    host_key: str = "/etc/migrate/host_ed25519"
    authorized_keys: str = "/etc/migrate/authorized_keys"
    state_dir: str = "/var/lib/migrate"
    data_ports: Annotated[str, msgspec.Meta(pattern=r"^[0-9]{1,5}(-[0-9]{1,5})?\Z")] = "7100-7199"
    runtimes: list[RuntimeSettings] = msgspec.field(default_factory=lambda: [RuntimeSettings(kind="runc")])
    network: NetworkSettings = NetworkSettings()
    name: str = ""  # what this host calls itself; '' : its host name

    @property
    def listen_address(self) -> tuple[str, int]:
        """Host and port of `listen`. Raises: UsageError."""
        host, colon, port = self.listen.rpartition(":")
        # Five digits at most: int() takes time by the square of the length, and isdigit() other scripts' digits.
        if not colon or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 1 << 16:
            raise UsageError(f"listen = {self.listen!r} is not ADDRESS:PORT")
        return host.strip("[]"), int(port)

    @property
    def data_port_list(self) -> list[int]:
        """The ports of `data_ports`, in order. Raises: UsageError."""
        first, _, last = self.data_ports.partition("-")
        low, high = int(first), int(last or first)
        if not 0 < low <= high < 1 << 16 or high - low >= MAX_DATA_PORTS:
            raise UsageError(f"data_ports = {self.data_ports!r} is not a range of at most {MAX_DATA_PORTS} ports")
        return list(range(low, high + 1))


def load(path: Path | None) -> Settings:
    """Settings of `path`; None: of the default path if it is there, else the defaults.

    Raises: UsageError: unreadable, not TOML, an unknown key or a value of the wrong kind.
    """
    if path is None:
        if not DEFAULT_PATH.exists():
            return Settings()
        path = DEFAULT_PATH
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        settings = msgspec.convert(table, Settings)
        _ = settings.listen_address, settings.data_port_list
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise UsageError(f"{path}: {error}") from error
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}") from error
    return settings
