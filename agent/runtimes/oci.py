"""runc and crun: the same command line.

Source: runc(8), crun(1).
"""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

from agent.kernel import timens
from agent.runtimes.base import RuntimeContainer
from protocol.errors import MigrateError, UnsupportedError

DEFAULT_ROOTS = {"runc": "/run/runc", "crun": "/run/crun"}
# A runtime answers in tens of milliseconds; a host that swaps may take seconds.
_COMMAND_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OciRuntime:
    """A runtime with the OCI command line."""

    kind: str
    binary: str
    root: str

    def _run(self, *arguments: str) -> str:
        command = [self.binary, "--root", self.root, *arguments]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, errors="replace", timeout=_COMMAND_TIMEOUT_S,
                stdin=subprocess.DEVNULL, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired) as error:
            raise MigrateError(f"{' '.join(command)}: {error}", code="runtime") from error
        if done.returncode:
            raise MigrateError(f"{' '.join(command)} failed: {done.stderr.strip()[-1000:]}", code="runtime")
        return done.stdout

    def version(self) -> str:
        """First line of --version."""
        return self._run("--version").splitlines()[0]

    def containers(self) -> list[RuntimeContainer]:
        """All containers of this root."""
        # Both print null for an empty list.
        return [_container(item) for item in json.loads(self._run("list", "--format", "json")) or []]

    def find(self, name: str) -> RuntimeContainer | None:
        """By list, not by state: state fails alike for 'unknown' and for 'broken'."""
        return next((item for item in self.containers() if item.name == name), None)

    def create(self, name: str, bundle: str, *, log_path: str, monotonic_offset_ns: int | None) -> RuntimeContainer:
        """See Runtime."""
        command = [self.binary, "--root", self.root, "create", "--bundle", bundle, name]
        if monotonic_offset_ns is not None:
            command = timens.run_in_time_namespace(command, monotonic_offset_ns)
        with open(log_path, "ab") as log:  # noqa: PTH123
            before = log.tell()
            try:
                subprocess.run(
                    command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, timeout=_COMMAND_TIMEOUT_S, check=True
                )
            except (OSError, subprocess.SubprocessError) as error:
                with open(log_path, "rb") as again:  # noqa: PTH123
                    again.seek(before)
                    said = again.read(4096).decode(errors="replace").strip()
                raise MigrateError(f"{self.kind} cannot create {name}: {said or error}", code="runtime") from error
        made = self.find(name)
        if made is None or not made.pid:
            raise MigrateError(f"{self.kind} created {name} but does not list it", code="runtime")
        return made

    def start_argv(self, name: str) -> list[str]:
        """See Runtime."""
        return [self.binary, "--root", self.root, "start", name]

    def delete(self, name: str) -> None:
        """See Runtime."""
        if self.find(name) is not None:
            self._run("delete", "--force", name)


def _container(item: dict[str, Any]) -> RuntimeContainer:
    return RuntimeContainer(
        name=item["id"], pid=item.get("pid") or 0, status=item["status"], bundle=item.get("bundle") or ""
    )


def open_runtime(kind: str, root: str = "", binary: str = "") -> OciRuntime:
    """The runtime of this kind on this host. Raises: UnsupportedError: it is not installed."""
    path = shutil.which(binary or kind, path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    if path is None:
        raise UnsupportedError(
            f"{binary or kind} is not installed", code="runtime-missing",
            hint=f"install {kind}, or take it out of agent.toml",
        )  # fmt: skip
    return OciRuntime(kind=kind, binary=path, root=root or DEFAULT_ROOTS[kind])
