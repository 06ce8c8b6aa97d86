"""One test host: run programs in it, its disk, its agent, its containers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.lab.cgroups import CgroupTree
from tests.lab.namespaces import pids_by_namespace, spawn

PROJECT = Path(__file__).parents[2]
BIN = Path(sys.prefix) / "bin"
AGENT_PORT = 7022
BRIDGE = "cbr0"
RUNC = ("runc", "--root", "/run/runc")
ENTER = ("--mount", "--uts", "--ipc", "--net", "--cgroup", "--time", "--root", "--wd")

_AGENT_TOML = """\
listen = "0.0.0.0:{port}"
host_key = "/etc/migrate/host_ed25519"
authorized_keys = "/etc/migrate/authorized_keys"
state_dir = "/var/lib/migrate"
data_ports = "7100-7199"
[[runtimes]]
kind = "runc"
root = "/run/runc"
[network]
bridge = "{bridge}"
"""


class LabError(Exception):
    """A test host did not do what the test needs; the text says which and why."""


class Host:
    """A host of the lab. `pid` is its pid 1 as this process sees it, 0 while the power is off."""

    def __init__(self, *, name: str, address: str, directory: Path, cgroups: CgroupTree, offset_s: int) -> None:
        self.name = name
        self.address = address
        self.monotonic_offset_s = offset_s
        self.directory = directory
        self.persist = directory / "persist"
        self.stage = directory / "stage"
        self.cgroups = cgroups
        self.env: dict[str, str] = {}
        self.pid = 0
        self.boots = 0
        self._processes: list[subprocess.Popen[Any]] = []
        self._agent: subprocess.Popen[Any] | None = None
        for path in [self.persist, self.stage]:
            path.mkdir(parents=True)

    # Programs

    @property
    def root(self) -> Path:
        """The host's / , for reading and writing its files from here while it runs."""
        return Path(f"/proc/{self._running_pid()}/root")

    def _running_pid(self) -> int:
        if not self.pid:
            raise LabError(f"{self.name} is powered off")
        return self.pid

    def popen(self, args: Sequence[str | Path], **popen: Any) -> subprocess.Popen[Any]:
        """Start `args` in all namespaces of the host. The Popen is the program itself: signals reach it."""
        path = f"{BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        environment = {"PATH": path, "HOME": "/root", "LANG": "C.UTF-8", **self.env, **(popen.pop("env", None) or {})}
        popen.setdefault("stdin", subprocess.DEVNULL)
        process = spawn(
            [str(a) for a in args],
            inside=self._running_pid(),
            enter=ENTER,
            cgroups=self.cgroups.joinable(),
            env=environment,
            **popen,
        )
        self._processes = [p for p in self._processes if p.poll() is None]
        self._processes.append(process)
        return process

    def run(
        self,
        args: Sequence[str | Path],
        *,
        check: bool = True,
        input: str | None = None,  # noqa: A002 -- as subprocess.run
        timeout_s: float = 30.0,
        **popen: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Run `args` to its end in all namespaces of the host.

        Raises: LabError: not zero, with all that it said; subprocess.TimeoutExpired: it was killed.
        """
        for stream in ["stdout", "stderr"]:
            popen.setdefault(stream, subprocess.PIPE)
        stdin = subprocess.DEVNULL if input is None else subprocess.PIPE
        with self.popen(args, stdin=stdin, text=True, **popen) as process:
            try:
                out, err = process.communicate(input, timeout=timeout_s)
            except BaseException:
                process.kill()
                raise
        if check and process.returncode != 0:
            raise LabError(
                f"{self.name}: {' '.join(map(str, args))} ended with {process.returncode}\n{out or ''}{err or ''}"
            )
        return subprocess.CompletedProcess(list(map(str, args)), process.returncode, out, err)

    def reap(self) -> None:
        """Wait for all that was started here; the host's pid namespace does not end before."""
        for process in self._processes:
            process.wait()
        self._processes.clear()
        self._agent = None

    def pid_here(self, pid_in_host: int) -> int:
        """The number of a process of this host as we see it. Raises: LabError: no such process."""
        level = len(pids_by_namespace(self._running_pid())) - 1
        for pid in self.cgroups.pids():
            try:
                numbers = pids_by_namespace(pid)
            except (FileNotFoundError, ProcessLookupError):
                continue
            if len(numbers) > level and numbers[level] == pid_in_host:
                return pid
        raise LabError(f"{self.name} has no process {pid_in_host}")

    def limit_memory(self, size_bytes: int | None) -> None:
        """Limit all that runs on the host together; None: no limit. Raises: LabError: no memory controller here."""
        for directory in self.cgroups.directories:
            for name, unlimited in [("memory.limit_in_bytes", "-1"), ("memory.max", "max")]:
                if (directory / name).exists():
                    (directory / name).write_text(unlimited if size_bytes is None else str(size_bytes))
                    return
        raise LabError("this machine has no memory controller")

    def wait_listening(
        self, port: int, *, timeout_s: float = 10.0, process: subprocess.Popen[Any] | None = None
    ) -> None:
        """Wait until a TCP socket of the host listens on `port`. Raises: LabError: too late, or `process` ended."""
        wait_listening(f"{self.name}", self._running_pid(), port, timeout_s=timeout_s, process=process)

    # The agent

    @property
    def agent_log(self) -> Path:
        return self.directory / "agent.log"

    @property
    def host_key(self) -> str:
        """The public key that the agent and sshd of this host show, as in known_hosts."""
        return " ".join((self.persist / "etc/migrate/host_ed25519.pub").read_text().split()[:2])

    def install_agent(self, authorized_keys: Sequence[str]) -> None:
        """Write /etc/migrate: agent.toml, the host key, who may log in."""
        etc = self.persist / "etc/migrate"
        (etc / "agent.toml").write_text(_AGENT_TOML.format(port=AGENT_PORT, bridge=BRIDGE))
        (etc / "authorized_keys").write_text("".join(f"{key}\n" for key in authorized_keys))
        if not (etc / "host_ed25519").exists():
            make_key(etc / "host_ed25519", self.name)

    def start_agent(self, *, env: dict[str, str] | None = None) -> subprocess.Popen[Any]:
        """Start `migrate-agent serve`; returns when it accepts connections. Raises: LabError with its log."""
        with self.agent_log.open("ab") as log:
            self._agent = self.popen(
                [BIN / "migrate-agent", "serve", "--config", "/etc/migrate/agent.toml"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=env,
            )
        try:
            self.wait_listening(AGENT_PORT, process=self._agent)
        except LabError as error:
            raise LabError(f"{error}\n{self.agent_log.read_text(errors='replace')[-4000:]}") from None
        return self._agent

    def stop_agent(self, *, timeout_s: float = 10.0) -> int:
        """SIGTERM, and wait. Returns its exit status."""
        return self._end_agent(signal.SIGTERM, timeout_s)

    def kill_agent(self, sig: int = signal.SIGKILL, *, timeout_s: float = 10.0) -> int:
        return self._end_agent(sig, timeout_s)

    def _end_agent(self, sig: int, timeout_s: float) -> int:
        if self._agent is None:
            raise LabError(f"{self.name}: no agent was started")
        self._agent.send_signal(sig)
        status = self._agent.wait(timeout_s)
        self._agent = None
        return status

    @property
    def agent_pid(self) -> int:
        """Of the running agent, as we see it."""
        if self._agent is None or self._agent.poll() is not None:
            raise LabError(f"{self.name}: no agent runs")
        return self._agent.pid

    def start_sshd(self, authorized_keys: Sequence[str]) -> subprocess.Popen[Any]:
        """A stock sshd on port 22 with the agent's host key, for the agentless way."""
        etc = self.root / "etc/ssh"
        shutil.copy(self.persist / "etc/migrate/host_ed25519", etc / "lab_host_key")
        (etc / "lab_authorized_keys").write_text("".join(f"{key}\n" for key in authorized_keys))
        for file in ["lab_host_key", "lab_authorized_keys"]:
            (etc / file).chmod(0o600)
        (self.root / "run/sshd").mkdir(exist_ok=True)
        options = {
            "HostKey": "/etc/ssh/lab_host_key",
            "AuthorizedKeysFile": "/etc/ssh/lab_authorized_keys",
            "StrictModes": "no",
            "UsePAM": "no",
            "SetEnv": f"PATH={BIN}:/usr/sbin:/usr/bin:/sbin:/bin",
        }
        (etc / "lab_sshd_config").write_text("".join(f"{key} {value}\n" for key, value in options.items()))
        log = self.directory / "sshd.log"
        with log.open("ab") as output:
            process = self.popen(
                ["/usr/sbin/sshd", "-D", "-e", "-f", "/etc/ssh/lab_sshd_config"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.wait_listening(22, process=process)
        return process


def wait_listening(
    who: str, pid: int, port: int, *, timeout_s: float, process: subprocess.Popen[Any] | None = None
) -> None:
    """Wait until somebody in the network namespace of `pid` listens on `port`.

    Nothing is connected for it. Source: proc(5), /proc/PID/net/tcp: state 0A.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        for table in ["tcp", "tcp6"]:
            for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if fields[1].endswith(f":{port:04X}") and fields[3] == "0A":
                    return
        if process is not None and process.poll() is not None:
            raise LabError(f"{who}: the program that should listen on {port} ended: {process.returncode}")
        if time.monotonic() > deadline:
            raise LabError(f"{who}: nobody listens on port {port} after {timeout_s} s")
        time.sleep(0.005)


def make_key(path: Path, comment: str) -> str:
    """Make an ed25519 key pair at `path` and `path`.pub; returns the public line."""
    subprocess.run(
        ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", comment, "-f", str(path)], check=True, env=os.environ
    )
    return Path(f"{path}.pub").read_text().strip()
