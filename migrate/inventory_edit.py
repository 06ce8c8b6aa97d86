"""Changes to hosts.toml that leave the rest of the file, comments too, as it is."""

from __future__ import annotations

import contextlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

from migrate.inventory import Inventory, parse, section_of
from protocol.errors import UsageError


def add_host(path: Path, name: str, values: Mapping[str, str | int]) -> Inventory:
    """Append a host. Raises: UsageError: it is there already, or would not be valid."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    if _section(text.splitlines(), name) is not None:
        raise UsageError(f"{path}: there is a host {name} already", code="host-exists")
    lines = [f"[hosts.{_key(name)}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    separator = "" if not text else "\n" if text.endswith("\n") else "\n\n"
    return _write(path, text + separator + "\n".join(lines) + "\n")


def remove_host(path: Path, name: str) -> Inventory:
    """Take a host out. Raises: UsageError: there is none."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    first, end = _found(path, lines, name)
    kept = lines[:first] + lines[end:]
    return _write(path, "\n".join(kept).strip("\n") + "\n")


def set_host_key(path: Path, name: str, host_key: str) -> Inventory:
    """Give a host that is in the file a host key. Raises: UsageError: there is none of that name."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    first, end = _found(path, lines, name)
    entry = f"host_key = {json.dumps(host_key)}"
    for number in range(first + 1, end):
        if re.match(r"\s*host_key\s*=", lines[number]):
            lines[number] = entry
            break
    else:
        last = max(number for number in range(first, end) if lines[number].strip())
        lines.insert(last + 1, entry)
    return _write(path, "\n".join(lines) + "\n")


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def _found(path: Path, lines: list[str], name: str) -> tuple[int, int]:
    found = _section(lines, name)
    if found is None:
        raise UsageError(f"{path}: there is no host {name}", code="unknown-host")
    return found


def _section(lines: list[str], name: str) -> tuple[int, int] | None:
    """First line and end (exclusive) of a host's section."""
    first: int | None = None
    for number, line in enumerate(lines):
        header = section_of(line)
        if first is not None and header is not None:
            return first, number
        if header == f"hosts.{name}":
            first = number
    return (first, len(lines)) if first is not None else None


def _write(path: Path, text: str) -> Inventory:
    """Replace the file in one step, if what would be in it is valid."""
    inventory = parse(text, path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o644
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                os.fchmod(file.fileno(), mode)
            Path(temporary).replace(path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):  # replaced already
                Path(temporary).unlink()
            raise
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    return inventory
