"""Our constants against the compiler's headers. One that these headers are too old for must be on the list of those."""

from __future__ import annotations

import dataclasses
import subprocess
from pathlib import Path

from agent.arch import current, x86_64
from agent.arch.x86_64 import Registers
from agent.kernel import openat2, pagemap, pidfd, process, ptrace, userfaultfd
from agent.kernel.namespaces import Namespace
from agent.kernel.unistd import SYS
from tests.kernel.programs import compile_c

HEADERS = """
#include <stdio.h>
#include <stddef.h>
#include <sys/syscall.h>
#include <linux/ptrace.h>
#include <linux/sched.h>
#include <linux/prctl.h>
#include <linux/kcmp.h>
#include <linux/openat2.h>
#include <linux/userfaultfd.h>
#include <linux/audit.h>
#include <linux/elf.h>
#include <linux/fs.h>
#include <sys/user.h>
"""
NEWER_THAN_DEBIAN_12 = {
    "SYS_map_shadow_stack", "SYS_mseal", "UFFD_FEATURE_WP_UNPOPULATED", "UFFD_FEATURE_WP_ASYNC", "PAGEMAP_SCAN",
    "PM_SCAN_WP_MATCHING", "PM_SCAN_CHECK_WPASYNC", "PIDFD_THREAD", *(f"PAGE_IS_{c.name}" for c in pagemap.Category if c),
}  # fmt: skip


def ours() -> dict[str, int]:
    names = {f"SYS_{field.name}": getattr(SYS, field.name) for field in dataclasses.fields(SYS)}
    names |= {
        f"PTRACE_{request.name}": int(request)
        for request in ptrace.Request
        if request.name not in {"CONT", "DETACH", "SYSCALL"}
    }
    names |= {f"PTRACE_O_{option.name}": int(option) for option in ptrace.Option if option}
    names |= {f"PTRACE_EVENT_{event.name}": int(event) for event in ptrace.Event if event}
    names |= {f"PR_{option.name}": int(option) for option in process.Prctl}
    names |= {f"KCMP_{kind.name}": int(kind) for kind in process.Kcmp}
    names |= {
        f"CLONE_NEW{'NS' if kind is Namespace.MOUNT else kind.name}": int(kind) for kind in Namespace
    }  # fmt: skip
    names |= {name: getattr(openat2, name) for name in dir(openat2) if name.startswith("RESOLVE_")}
    names |= {name: getattr(userfaultfd, name) for name in dir(userfaultfd) if name.startswith("UFFD")}
    names |= {f"PAGE_IS_{category.name}": int(category) for category in pagemap.Category if category}
    names |= {name: getattr(pagemap, name) for name in dir(pagemap) if name.startswith(("PM_SCAN", "PAGEMAP_"))}
    names |= {"NT_PRSTATUS": current().general_note, "NT_X86_XSTATE": x86_64.X86_64.extended_note}
    names |= {"AUDIT_ARCH_X86_64": x86_64.X86_64.audit, "PR_SET_MM_MAP": process.PR_SET_MM_MAP}
    names["PIDFD_THREAD"] = pidfd.PIDFD_THREAD
    return names


def test_every_constant_is_the_headers(tmp_path: Path) -> None:
    names = ours()
    # Some are enum members, which #ifdef does not see.
    enums = {name for name in names if name.startswith("KCMP_")}
    lines = "".join(
        f'printf("{name} %llu\\n", (unsigned long long) (unsigned) {name});\n'
        if name in enums
        else f'#ifdef {name}\nprintf("{name} %llu\\n", (unsigned long long) (unsigned) {name});\n#endif\n'
        for name in names
    )
    program = compile_c(f"{HEADERS} int main(void) {{\n{lines} return 0; }}", tmp_path / "constants")
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    theirs = {name: int(value) for name, value in (line.split() for line in output.splitlines())}
    assert {name: names[name] & 0xFFFFFFFF for name in theirs} == theirs
    assert set(names) - set(theirs) <= NEWER_THAN_DEBIAN_12


def test_registers_lie_where_sys_user_h_has_them(tmp_path: Path) -> None:
    fields = [field[0] for field in Registers._fields_]
    lines = "".join(f'printf("%zu ", offsetof(struct user_regs_struct, {name}));' for name in fields)
    program = compile_c(f"{HEADERS} int main(void) {{ {lines} return 0; }}", tmp_path / "registers")
    output = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    assert [getattr(Registers, name).offset for name in fields] == [int(word) for word in output.split()]
