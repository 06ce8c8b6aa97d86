"""The numbers that stand under their header's name are those of the compiler's headers."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING

import pytest

from agent.network import capture, frames, links, namespaces, netlink, problems

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType

HEADERS = (
    *(f"linux/{name}.h" for name in ("netlink", "rtnetlink", "if", "if_link", "if_addr", "neighbour", "veth")),
    *(f"linux/{name}.h" for name in ("net_namespace", "if_packet", "if_ether", "filter", "fib_rules", "magic")),
    *(f"linux/netfilter/{name}.h" for name in ("nfnetlink", "nf_tables")),
    "linux/netfilter_ipv4/ip_tables.h",
    "sched.h",
    "sys/mount.h",
)
OWN_NAMES = {  # what has another name here, or is not in any header
    (problems, "_SO_GET_INFO"): "IPT_SO_GET_INFO",
    (problems, "_TCA_KIND"): "TCA_KIND",
    (problems, "_FRA_PRIORITY"): "FRA_PRIORITY",
    (problems, "_NFT_MSG_GETTABLE"): "(NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETTABLE)",
    (problems, "_NFTA_TABLE_NAME"): "NFTA_TABLE_NAME",
    (capture, "_LOAD_WORD"): "(BPF_LD | BPF_W | BPF_ABS)",
    (capture, "_LOAD_HALF"): "(BPF_LD | BPF_H | BPF_ABS)",
    (capture, "_LOAD_BYTE"): "(BPF_LD | BPF_B | BPF_ABS)",
    (capture, "_JUMP_EQUAL"): "(BPF_JMP | BPF_JEQ | BPF_K)",
    (capture, "_RETURN"): "(BPF_RET | BPF_K)",
    (namespaces, "_NSFS_MAGIC"): "NSFS_MAGIC",
}
PREFIXES = (
    "AF_", "CLONE_", "ETH_P_", "IFA_", "IFF_", "IFLA_", "IF_OPER_", "IN6_ADDR_", "MNT_", "MS_",
    "NDA_", "NETLINK_", "NETNSA_", "NLA_", "NLMSG", "NLM_", "NTF_", "NUD_", "PACKET_", "RTA_",
    "RTM_", "RTNH_", "RTN_", "RTPROT_", "RT_", "SOL_", "SO_", "UMOUNT_", "VETH_",
)  # fmt: skip


def named_as_in_headers(module: ModuleType) -> dict[str, int]:
    return {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, int) and name.startswith(PREFIXES) and name.isupper()
    }


def test_every_constant_is_the_headers(tmp_path: Path) -> None:
    ours = {
        name: value
        for module in (capture, frames, links, namespaces, netlink)
        for name, value in named_as_in_headers(module).items()
    }
    ours["(NLA_TYPE_MASK & 0xffff)"] = ours.pop("NLA_TYPE_MASK")
    ours |= {c_name: vars(module)[name] for (module, name), c_name in OWN_NAMES.items()}
    assert len(ours) > 100
    includes = "".join(f"#include <{header}>\n" for header in HEADERS)
    # Newer than some distributions' headers, or only the kernel's.
    missing = "#ifndef PACKET_IGNORE_OUTGOING\n#define PACKET_IGNORE_OUTGOING 23\n#endif\n#define SOL_NETLINK 270\n"
    checks = "".join(f'printf("%s %lld\\n", "{name}", (long long)({name}));\n' for name in sorted(ours))
    program = tmp_path / "constants.c"
    program.write_text(
        "#define _GNU_SOURCE\n#include <stdio.h>\n#include <sys/socket.h>\n"
        f"{includes}{missing}int main(void) {{ {checks} return 0; }}\n"
    )
    built = subprocess.run(["gcc", "-w", "-o", tmp_path / "constants", program], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    printed = subprocess.run([tmp_path / "constants"], capture_output=True, text=True, check=True).stdout
    theirs = {
        name: int(value)
        for name, _, value in (line.rpartition(" ") for line in printed.splitlines())
        for value in [value]
    }
    assert {name: theirs[name] for name in ours} == ours


@pytest.mark.parametrize("module", [links, netlink])
def test_the_constants_are_found_by_their_prefix(module: ModuleType) -> None:
    assert len(named_as_in_headers(module)) > 15
