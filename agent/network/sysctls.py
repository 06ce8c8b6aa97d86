"""The net.* settings of a namespace: read, compared with a fresh namespace, written.

Keys are paths below /proc/sys/net with slashes ('ipv4/ip_forward'), or below conf and neigh of one device
('ipv4/conf/rp_filter', 'ipv6/neigh/gc_stale_time'). /proc/sys/net shows the namespace of the reading thread.
IPv4's conf settings and a few of TCP are inherited from the host when a namespace is made, and hosts differ; so these
always travel. Of the rest only what differs from a fresh namespace does.
Source: Documentation/networking/ip-sysctl.rst; sysctl(2) per network namespace.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from agent.network.namespaces import in_fresh_namespace
from protocol.errors import KernelError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

ROOT = Path("/proc/sys/net")
_FAMILIES = ("ipv4", "ipv6")
_TREES = ("core", "ipv4", "ipv6", "unix", "mptcp")
_INHERITED = frozenset({"ipv4/tcp_rmem", "ipv4/tcp_wmem", "ipv4/tcp_congestion_control", "ipv4/ip_forward"})
# Read-only, a command, a second name of another setting in other units, or made anew by the kernel.
_SKIPPED = frozenset({
    "mtu", "flush", "base_reachable_time", "retrans_time", "stable_secret", "tcp_ehash_entries", "udp_hash_entries",
    "tcp_available_congestion_control", "available_schedulers", "force_forwarding", "mc_forwarding",
})  # fmt: skip
_KEY = re.compile(r"(core|ipv4|ipv6|unix|mptcp)(/[A-Za-z0-9_-]+){1,3}")
_DEVICE_KEY = re.compile(r"(ipv4|ipv6)/(conf|neigh)/[A-Za-z0-9_-]+")
_VALUE = re.compile(r"[\x20-\x7e\t]{0,256}")


def read_namespace() -> dict[str, str]:
    """All settings of the calling thread's namespace that are not of one device; conf/all and conf/default are in."""
    found: dict[str, str] = {}
    for tree in _TREES:
        found.update(_read_directory(ROOT / tree, recurse=lambda name: name not in {"conf", "neigh"}))
    for family in _FAMILIES:
        for which in ("all", "default"):
            found.update(_read_directory(ROOT / family / "conf" / which))
    return found


def read_device(name: str) -> dict[str, str]:
    """The settings of one device of the calling thread's namespace."""
    found: dict[str, str] = {}
    for family in _FAMILIES:
        for kind in ("conf", "neigh"):
            prefix = f"{family}/{kind}/{name}/"
            values = _read_directory(ROOT / family / kind / name)
            found.update({f"{family}/{kind}/{key.removeprefix(prefix)}": value for key, value in values.items()})
    return found


def read_fresh() -> dict[str, str]:
    """What `read_namespace` gives in a namespace that was just made on this host, and what new devices get there."""
    return in_fresh_namespace(_read_fresh)


def _read_fresh() -> dict[str, str]:
    found = read_namespace()
    # neigh/default exists on the host only; every new device, lo too, starts with its values.
    for key, value in read_device("lo").items():
        family, kind, setting = key.split("/")
        found.setdefault(f"{family}/{kind}/default/{setting}", value)
    return found


def differing_namespace(values: Mapping[str, str], fresh: Mapping[str, str]) -> dict[str, str]:
    return {
        key: value
        for key, value in sorted(values.items())
        if key in _INHERITED or key.startswith("ipv4/conf/") or fresh.get(key) != value
    }


def differing_device(values: Mapping[str, str], fresh: Mapping[str, str]) -> dict[str, str]:
    """`fresh` as `read_fresh` gives it: a new device takes the values of default."""
    found = {}
    for key, value in sorted(values.items()):
        family, kind, name = key.split("/")
        if (family, kind) == ("ipv4", "conf") or fresh.get(f"{family}/{kind}/default/{name}") != value:
            found[key] = value
    return found


def write_namespace(values: Mapping[str, str]) -> None:
    """Write what differs into the calling thread's namespace; settings that set others come first.

    Raises: UnsupportedError: a key or value of a peer that is none. KernelError: the kernel refuses a value.
    """
    for key in sorted(values, key=_write_order):
        if not _KEY.fullmatch(key):
            raise _bad(key, values[key])
        _write(key, values[key])


def write_device(name: str, values: Mapping[str, str]) -> None:
    """Write what differs for one device. Raises: as `write_namespace`."""
    for key in sorted(values):
        if not _DEVICE_KEY.fullmatch(key):
            raise _bad(key, values[key])
        family, kind, setting = key.split("/")
        _write(f"{family}/{kind}/{name}/{setting}", values[key])


def _write_order(key: str) -> tuple[int, str]:
    if key == "ipv4/ip_forward":
        return 0, key
    return (1 if "/conf/all/" in key else 2), key


def _write(key: str, value: str) -> None:
    if not _VALUE.fullmatch(value):
        raise _bad(key, value)
    path = ROOT / key
    try:
        if _normal(path.read_text()) != value:
            path.write_text(value)
    except OSError as error:
        raise KernelError(
            f"write net/{key} = {value!r}",
            error.errno or 0,
            error.strerror or "",
            hint="the target's kernel lacks this setting: set it to its default in the container, or use another host",
        ) from error


def _bad(key: str, value: str) -> UnsupportedError:
    return UnsupportedError(f"not a network setting: {key!r} = {value!r}", code="network-setting")


def _read_directory(directory: Path, recurse: Callable[[str], bool] = lambda _: False) -> dict[str, str]:
    return {key: value for key, value in _walk(directory, recurse) if _VALUE.fullmatch(value)}


def _walk(directory: Path, recurse: Callable[[str], bool]) -> Iterator[tuple[str, str]]:
    if not directory.is_dir():
        return
    for entry in sorted(directory.iterdir()):
        if entry.is_dir():
            if recurse(entry.name):
                yield from _walk(entry, recurse)
        elif entry.name not in _SKIPPED and entry.stat().st_mode & 0o222:
            try:
                value = _normal(entry.read_text())
            except OSError:
                continue  # Write-only, or not set yet (EIO): there is nothing to carry.
            yield str(entry.relative_to(ROOT)), value


def _normal(value: str) -> str:
    return value.rstrip("\n")
