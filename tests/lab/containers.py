"""Containers of a test host, made as an operator makes them: a bundle, a named network namespace, runc."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.lab.host import RUNC, Host, LabError, wait_listening
from tests.lab.namespaces import pids_by_namespace
from tests.lab.rootfs import container_rootfs

BUNDLES = Path("/var/lib/containers-lab")
PROGRAMS = Path("/opt/lab")  # in the container: programs of tests/lab and what `files` adds

_CAPABILITIES = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
_QUIET = ["nosuid", "noexec", "nodev"]
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What `runc spec` writes, with a cgroup namespace, and a root that can be written.
_SPEC: dict[str, Any] = {
    "ociVersion": "1.0.2-dev",
    "process": {
        "terminal": False,
        "user": {"uid": 0, "gid": 0},
        "args": [],
        "env": [],
        "cwd": "/",
        "capabilities": dict.fromkeys(["bounding", "effective", "permitted", "ambient"], _CAPABILITIES),
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
        "noNewPrivileges": True,
    },
    "root": {"path": "rootfs", "readonly": False},
    "hostname": "",
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {
            "destination": "/dev",
            "type": "tmpfs",
            "source": "tmpfs",
            "options": ["nosuid", "strictatime", "mode=755", "size=65536k"],
        },
        {
            "destination": "/dev/pts",
            "type": "devpts",
            "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        },
        {
            "destination": "/dev/shm",
            "type": "tmpfs",
            "source": "shm",
            "options": [*_QUIET, "mode=1777", "size=65536k"],
        },
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": _QUIET},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*_QUIET, "ro"]},
        {
            "destination": "/sys/fs/cgroup",
            "type": "cgroup",
            "source": "cgroup",
            "options": [*_QUIET, "relatime", "ro"],
        },
    ],
    "linux": {
        "resources": {"devices": [{"allow": False, "access": "rwm"}]},
        "namespaces": [{"type": kind} for kind in ["pid", "network", "ipc", "uts", "mount", "cgroup"]],
        "maskedPaths": [
            *["/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list"],
            *["/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"],
        ],
        "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A container of a host. Paths are those in the host, but `log`, which is readable from here."""

    name: str
    host: Host
    pid: int  # of its init, as we see it
    pid_in_host: int
    bundle: Path
    log: Path

    @property
    def pids(self) -> list[int]:
        """The processes of the container, as numbered in its own pid namespace, in order."""
        own = pids_by_namespace(self.pid)
        processes = self.host.run([*RUNC, "ps", "--format", "json", self.name]).stdout
        return sorted(pids_by_namespace(self.host.pid_here(p))[len(own) - 1] for p in json.loads(processes))

    def wait_listening(self, port: int, *, timeout_s: float = 10.0) -> None:
        """Wait until a program in the container listens on `port`. Raises: LabError."""
        wait_listening(f"{self.host.name}: {self.name}", self.pid, port, timeout_s=timeout_s)


class ContainerHost(Host):
    """A host with a bridge for containers and runc."""

    bridge: str | None = None
    number = 0

    @property
    def port(self) -> str:
        """The LAN's end of this host's cable."""
        return f"port{self.number}"

    def ip(self, *commands: str) -> None:
        """Run commands of ip(8) in the host's network namespace."""
        self.run(["ip", "-batch", "-"], input="\n".join(commands))

    def make_bundle(
        self,
        name: str,
        *,
        args: Sequence[str],
        env: Mapping[str, str] | None = None,
        memory_limit_bytes: int | None = None,
        seccomp: Mapping[str, Any] | None = None,
        files: Mapping[str, Path | str] | None = None,
        edit: Callable[[dict[str, Any]], None] | None = None,
    ) -> Path:
        """Write rootfs and config.json on the host's disk; returns the bundle's path in the host.

        files: path in the container -> a file to copy, or its text. edit: changes the config before it is written.
        """
        bundle = self._bundle_here(name)
        bundle.mkdir()
        subprocess.run(["cp", "-a", "--reflink=auto", str(container_rootfs()), str(bundle / "rootfs")], check=True)
        programs = {str(PROGRAMS / file): Path(__file__).with_name(file) for file in ["counter.py"]}
        for path, content in {**programs, **(files or {})}.items():
            target = bundle / "rootfs" / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copy(content, target)
            else:
                target.write_text(content)
        config = copy.deepcopy(_SPEC)
        config["hostname"] = name
        config["process"]["args"] = list(args)
        config["process"]["env"] = [f"{k}={v}" for k, v in {"PATH": _PATH, "TERM": "xterm", **(env or {})}.items()]
        for namespace in config["linux"]["namespaces"]:
            if namespace["type"] == "network":
                namespace["path"] = f"/run/netns/{name}"
        if memory_limit_bytes is not None:
            config["linux"]["resources"]["memory"] = {"limit": memory_limit_bytes}
        if seccomp is not None:
            config["linux"]["seccomp"] = dict(seccomp)
        if edit is not None:
            edit(config)
        (bundle / "config.json").write_text(json.dumps(config, indent=4))
        return BUNDLES / name

    def _bundle_here(self, name: str) -> Path:
        return self.persist / str(BUNDLES).lstrip("/") / name

    def attach_network(self, name: str, ip: str, mac: str | None = None) -> None:
        """Make the network namespace `name` with an eth0 of that address (10.77.0.50/24) on the host's bridge."""
        mac = mac or "02:42:" + ":".join(f"{int(part):02x}" for part in ip.split("/", maxsplit=1)[0].split("."))
        host_end = f"v-{name}"[:15]
        self.run(["ip", "netns", "add", name])
        self.ip(
            f"link add {host_end} type veth peer name eth0 address {mac} netns {name}",
            f"link set {host_end} master {self.bridge} up",
        )
        commands = ["link set lo up", "link set eth0 up", f"addr add {ip} dev eth0"]
        self.run(["ip", "-n", name, "-batch", "-"], input="\n".join(commands))

    def add_runc_container(
        self,
        name: str,
        *,
        args: Sequence[str],
        ip: str,
        mac: str | None = None,
        start: bool = True,
        **bundle: Any,
    ) -> Container:
        """Bundle, network, `runc run --detach` (start=False: `runc create`). `bundle`: as of make_bundle."""
        path = self.make_bundle(name, args=args, **bundle)
        self.attach_network(name, ip, mac)
        # The log is opened in the host, so that it is a file of the host's own mounts, as a monitor's would be.
        script = 'log=$1; shift; exec "$@" </dev/null >>"$log" 2>&1'
        verb = ["run", "--detach"] if start else ["create"]
        command = [*RUNC, *verb, "--bundle", str(path), name]
        done = self.run(["sh", "-c", script, "sh", f"{path}.log", *command], check=False)
        if done.returncode != 0:
            raise LabError(f"{self.name}: runc {verb[0]} {name}: {Path(f'{self._bundle_here(name)}.log').read_text()}")
        return self.container(name)

    def container(self, name: str) -> Container:
        """The container `name`, however it came to be here. Raises: LabError: runc does not know it, or not running."""
        state = self.runc_state(name)
        if state is None or not state["pid"]:
            raise LabError(f"{self.name}: container {name} is {state and state['status']}")
        return Container(
            name=name,
            host=self,
            pid=self.pid_here(state["pid"]),
            pid_in_host=state["pid"],
            bundle=Path(state["bundle"]),
            log=Path(f"{self._bundle_here(name)}.log"),
        )

    def runc_state(self, name: str) -> dict[str, Any] | None:
        """What `runc state` says; None: it knows no such container."""
        done = self.run([*RUNC, "state", name], check=False)
        if done.returncode != 0 and "does not exist" in done.stderr:
            return None
        if done.returncode != 0:
            raise LabError(f"{self.name}: runc state {name}: {done.stderr}")
        state: dict[str, Any] = json.loads(done.stdout)
        return state

    def runc_list(self) -> dict[str, str]:
        """Name -> status of every container that runc knows."""
        listed = json.loads(self.run([*RUNC, "list", "--format", "json"]).stdout) or []
        return {entry["id"]: entry["status"] for entry in listed}
