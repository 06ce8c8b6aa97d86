"""A peer, a source and a target in network namespaces of their own; the last two have one address."""

from __future__ import annotations

import os
import subprocess

ADDRESS = "10.99.0.2"
PEER = "10.99.0.1"
ADDRESS6 = "fd99::2"
PEER6 = "fd99::1"
MAC = "02:00:00:00:99:02"


class Lan:
    """`peer` is the bridge's namespace; the source is attached, the target is not until `move_address`."""

    def __init__(self, name: str) -> None:
        self.names = {role: f"{name}-{role}" for role in ("peer", "source", "target")}
        script = []
        for full in self.names.values():
            script += [f"ip netns add {full}", f"ip -n {full} link set lo up"]
        peer = self.names["peer"]
        script += [
            f"ip -n {peer} link add br0 type bridge forward_delay 0",
            f"ip -n {peer} addr add {PEER}/24 dev br0",
            f"ip -n {peer} addr add {PEER6}/64 dev br0 nodad",
            f"ip -n {peer} link set br0 up",
        ]
        for role in ("source", "target"):
            full = self.names[role]
            script += [
                f"ip -n {peer} link add p-{role} type veth peer name eth0 netns {full}",
                f"ip -n {full} link set eth0 address {MAC}",
                f"ip netns exec {full} sysctl -qw net.ipv6.conf.eth0.accept_dad=0",
                f"ip -n {full} addr add {ADDRESS}/24 dev eth0",
                f"ip -n {full} addr add {ADDRESS6}/64 dev eth0 nodad",
                f"ip -n {full} link set eth0 up",
                f"ip -n {peer} link set p-{role} up",
            ]
        script += [f"ip -n {peer} link set p-source master br0"]
        try:
            _run(script)
        except BaseException:
            self.close()
            raise

    def path(self, role: str) -> str:
        return f"/run/netns/{self.names[role]}"

    def cut(self) -> None:
        _run([f"ip -n {self.names['peer']} link set p-source nomaster"])

    def uncut(self) -> None:
        _run([f"ip -n {self.names['peer']} link set p-source master br0"])

    def move_address(self) -> None:
        _run([f"ip -n {self.names['peer']} link set p-target master br0"])

    def close(self) -> None:
        for full in self.names.values():
            subprocess.run(["ip", "netns", "del", full], stderr=subprocess.DEVNULL, check=False)


def _run(script: list[str]) -> None:
    subprocess.run(["sh", "-e", "-c", "\n".join(script)], check=True, env=os.environ)
