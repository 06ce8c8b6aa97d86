"""Taking back what a migration did outside its engine: by plain names only, without the engine, any number of times.

Each effect is written to the journal before it is made (`Journal.undo_ahead`), in a form that a freshly started
agent can carry out. A kind is one row of a table.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from agent.engine.native import files as engine_files
from agent.journal import Journal, Undo
from agent.kernel.freezer import Freezer
from agent.network import build, cut
from agent.runtimes.oci import open_runtime
from protocol.errors import MigrateError, TaskGoneError
from protocol.messages import Interface
from protocol.states import Side

_log = logging.getLogger(__name__)


def thaw(paths: list[str]) -> Undo:
    """The container's freezer cgroup may be FROZEN by us."""
    return Undo("thaw", {"paths": paths})


def repair_off(pids: list[int]) -> Undo:
    """TCP sockets of these processes may be in repair mode."""
    return Undo("repair-off", {"pids": pids})


def uncut(interface: Interface) -> Undo:
    """The container's bridge port may be off the bridge and a catcher in its place."""
    return Undo(
        "uncut",
        {"host_name": interface.host_name, "bridge": interface.bridge, "catcher": cut.catcher_name(interface)},
    )


def delete_container(kind: str, root: str, name: str) -> Undo:
    """The runtime may have the container that we made."""
    return Undo("delete-container", {"kind": kind, "root": root, "name": name})


def remove_network(namespace_path: str, host_names: list[str]) -> Undo:
    """Namespace and veths may be there that we made."""
    return Undo("remove-network", {"namespace_path": namespace_path, "host_names": host_names})


def restore_config(bundle: str, config: str | None) -> Undo:
    """config.json of the bundle may be the one that starts the interception."""
    return Undo("restore-config", {"bundle": bundle, "config": config})


def _thaw(arguments: Mapping[str, Any]) -> None:
    try:
        Freezer.at(arguments["paths"]).thaw()
    except TaskGoneError:
        _log.info("the cgroup %s is gone", arguments["paths"])


def _repair_off(arguments: Mapping[str, Any]) -> None:
    for pid in arguments["pids"]:
        try:
            engine_files.leave_repair_everywhere(pid)
        except TaskGoneError:
            _log.info("process %s is gone", pid)


def _uncut(arguments: Mapping[str, Any]) -> None:
    cut.undo_cut(**arguments)


def _delete_container(arguments: Mapping[str, Any]) -> None:
    open_runtime(arguments["kind"], arguments["root"]).delete(arguments["name"])


def _remove_network(arguments: Mapping[str, Any]) -> None:
    build.remove_network(arguments["namespace_path"], *arguments["host_names"])


def write_config(bundle: str, config: str | None) -> None:
    """Put config.json in place at once and whole; None: remove it."""
    path = Path(bundle, "config.json")
    if config is None:
        path.unlink(missing_ok=True)
        return
    new = path.with_suffix(".json.new")
    try:
        with new.open("w", encoding="utf-8") as file:
            file.write(config)
            file.flush()
            os.fsync(file.fileno())
        new.replace(path)
    except OSError as error:
        new.unlink(missing_ok=True)
        raise MigrateError(
            f"cannot write {path}: {error.strerror}",
            code="bundle",
            hint=f"is the bundle {bundle} there, with free space?",
        ) from error  # fmt: skip


def read_config(bundle: str) -> str | None:
    """config.json as it stands; None: there is none. Raises: MigrateError."""
    path = Path(bundle, "config.json")
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise MigrateError(f"cannot read {path}: {error}", code="bundle") from error


def _restore_config(arguments: Mapping[str, Any]) -> None:
    write_config(arguments["bundle"], arguments["config"])


_KINDS: dict[str, Callable[[Mapping[str, Any]], None]] = {
    "thaw": _thaw,
    "repair-off": _repair_off,
    "uncut": _uncut,
    "delete-container": _delete_container,
    "remove-network": _remove_network,
    "restore-config": _restore_config,
}


def run_pending(journal_dir: Path, migration: str, side: Side) -> list[str]:
    """Take back everything that is written down, newest first; go on after a failure.

    Runs in a thread of its own, so with a journal of its own. Gives what could not be taken back, in words; those
    entries stay in the journal.
    """
    journal = Journal(journal_dir)
    failures = []
    try:
        for item in journal.pending_undo(migration, side):
            kind = _KINDS.get(item.kind)
            if kind is None:
                failures.append(f"{item.kind}: this version of the agent does not know it")
                continue
            try:
                kind(item.arguments)
                # A full disk forgets nothing: it is done once more at the next start, which changes nothing.
                journal.forget_undo(item.number)
            except (MigrateError, OSError) as error:
                _log.warning("undo %s %s failed: %s", item.kind, item.arguments, error)
                failures.append(f"{item.kind}: {error}")
    finally:
        journal.close()
    return failures
