"""System call numbers (asm/unistd.h) of the C interface that this Python was built for.

Only calls that every supported architecture has: where x86-64 has an old and a new form (dup2, dup3), the new one.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from dataclasses import dataclass

from protocol.errors import UnsupportedError


@dataclass(frozen=True, slots=True, kw_only=True)
class SyscallNumbers:
    """One number a field, named as the kernel names the call; from pidfd_send_signal on the same everywhere."""

    read: int
    write: int
    close: int
    fstat: int
    lseek: int
    mmap: int
    mprotect: int
    munmap: int
    brk: int
    rt_sigaction: int
    rt_sigprocmask: int
    rt_sigpending: int
    rt_sigtimedwait: int
    rt_sigqueueinfo: int
    rt_tgsigqueueinfo: int
    rt_sigreturn: int
    ioctl: int
    mremap: int
    mincore: int
    madvise: int
    mlock: int
    munlock: int
    dup: int
    dup3: int
    nanosleep: int
    clock_nanosleep: int
    restart_syscall: int
    getitimer: int
    setitimer: int
    timer_create: int
    timer_settime: int
    timer_gettime: int
    timer_getoverrun: int
    timer_delete: int
    getpid: int
    getppid: int
    gettid: int
    socket: int
    socketpair: int
    sendmsg: int
    recvmsg: int
    recvfrom: int
    clone: int
    execve: int
    exit: int
    exit_group: int
    wait4: int
    kill: int
    tkill: int
    tgkill: int
    fcntl: int
    chdir: int
    fchdir: int
    umask: int
    chroot: int
    setuid: int
    setgid: int
    setreuid: int
    setresuid: int
    getresuid: int
    setresgid: int
    getresgid: int
    setfsuid: int
    setfsgid: int
    setgroups: int
    getgroups: int
    setpgid: int
    getpgid: int
    setsid: int
    getsid: int
    capget: int
    capset: int
    sigaltstack: int
    personality: int
    setpriority: int
    sched_setattr: int
    sched_getattr: int
    sched_setaffinity: int
    sched_yield: int
    ioprio_set: int
    ioprio_get: int
    prctl: int
    getrlimit: int
    setrlimit: int
    prlimit64: int
    ptrace: int
    futex: int
    io_setup: int
    io_destroy: int
    io_getevents: int
    set_tid_address: int
    set_robust_list: int
    get_robust_list: int
    semtimedop: int
    epoll_create1: int
    epoll_ctl: int
    epoll_pwait: int
    eventfd2: int
    signalfd4: int
    timerfd_create: int
    timerfd_settime: int
    timerfd_gettime: int
    inotify_init1: int
    inotify_add_watch: int
    openat: int
    pipe2: int
    ppoll: int
    pselect6: int
    unshare: int
    setns: int
    process_vm_readv: int
    process_vm_writev: int
    kcmp: int
    seccomp: int
    getrandom: int
    memfd_create: int
    membarrier: int
    mlock2: int
    userfaultfd: int
    rseq: int
    pkey_mprotect: int
    pkey_alloc: int
    pkey_free: int
    pidfd_send_signal: int = 424
    io_uring_setup: int = 425
    pidfd_open: int = 434
    clone3: int = 435
    close_range: int = 436
    openat2: int = 437
    pidfd_getfd: int = 438
    process_madvise: int = 440
    epoll_pwait2: int = 441
    set_mempolicy_home_node: int = 450
    map_shadow_stack: int = 453
    mseal: int = 462

    def name_of(self, number: int) -> str:
        """The call's name; 'syscall N' for one that is not in the table."""
        return _names(self).get(number, f"syscall {number}")


@functools.cache
def _names(numbers: SyscallNumbers) -> dict[int, str]:
    return {getattr(numbers, field.name): field.name for field in dataclasses.fields(numbers)}


X86_64 = SyscallNumbers(
    read=0, write=1, close=3, fstat=5, lseek=8, mmap=9, mprotect=10, munmap=11, brk=12, rt_sigaction=13,
    rt_sigprocmask=14, rt_sigreturn=15, ioctl=16, mremap=25, mincore=27, madvise=28, dup=32, nanosleep=35,
    getitimer=36, setitimer=38, getpid=39, socket=41, recvfrom=45, sendmsg=46, recvmsg=47, socketpair=53, clone=56,
    execve=59, exit=60, wait4=61, kill=62, fcntl=72, chdir=80, fchdir=81, umask=95, getrlimit=97, ptrace=101,
    setuid=105, setgid=106, setpgid=109, getppid=110, setsid=112, setreuid=113, getgroups=115, setgroups=116,
    setresuid=117, getresuid=118, setresgid=119, getresgid=120, getpgid=121, setfsuid=122, setfsgid=123, getsid=124,
    capget=125, capset=126, rt_sigpending=127, rt_sigtimedwait=128, rt_sigqueueinfo=129, sigaltstack=131,
    personality=135, setpriority=141, mlock=149, munlock=150, prctl=157, setrlimit=160, chroot=161, gettid=186,
    tkill=200, futex=202, sched_setaffinity=203, sched_yield=24, io_setup=206, io_destroy=207, io_getevents=208,
    set_tid_address=218, restart_syscall=219, semtimedop=220, timer_create=222, timer_settime=223, timer_gettime=224,
    timer_getoverrun=225, timer_delete=226, clock_nanosleep=230, exit_group=231, epoll_ctl=233, tgkill=234,
    ioprio_set=251, ioprio_get=252, inotify_add_watch=254, openat=257, pselect6=270, ppoll=271, unshare=272,
    set_robust_list=273, get_robust_list=274, epoll_pwait=281, timerfd_create=283, timerfd_settime=286,
    timerfd_gettime=287, signalfd4=289, eventfd2=290, epoll_create1=291, dup3=292, pipe2=293, inotify_init1=294,
    rt_tgsigqueueinfo=297, prlimit64=302, setns=308, process_vm_readv=310, process_vm_writev=311, kcmp=312,
    sched_setattr=314, sched_getattr=315, seccomp=317, getrandom=318, memfd_create=319, userfaultfd=323,
    membarrier=324, mlock2=325, pkey_mprotect=329, pkey_alloc=330, pkey_free=331, rseq=334,
)  # fmt: skip

# asm-generic/unistd.h
AARCH64 = SyscallNumbers(
    read=63, write=64, close=57, fstat=80, lseek=62, mmap=222, mprotect=226, munmap=215, brk=214, rt_sigaction=134,
    rt_sigprocmask=135, rt_sigreturn=139, ioctl=29, mremap=216, mincore=232, madvise=233, dup=23, nanosleep=101,
    getitimer=102, setitimer=103, getpid=172, socket=198, recvfrom=207, sendmsg=211, recvmsg=212, socketpair=199,
    clone=220, execve=221, exit=93, wait4=260, kill=129, fcntl=25, chdir=49, fchdir=50, umask=166, getrlimit=163,
    ptrace=117, setuid=146, setgid=144, setpgid=154, getppid=173, setsid=157, setreuid=145, getgroups=158,
    setgroups=159, setresuid=147, getresuid=148, setresgid=149, getresgid=150, getpgid=155, setfsuid=151,
    setfsgid=152, getsid=156, capget=90, capset=91, rt_sigpending=136, rt_sigtimedwait=137, rt_sigqueueinfo=138,
    sigaltstack=132, personality=92, setpriority=140, mlock=228, munlock=229, prctl=167, setrlimit=164, chroot=51,
    gettid=178, tkill=130, futex=98, sched_setaffinity=122, sched_yield=124, io_setup=0, io_destroy=1,
    io_getevents=4, set_tid_address=96, restart_syscall=128, semtimedop=192, timer_create=107, timer_settime=110,
    timer_gettime=108, timer_getoverrun=109, timer_delete=111, clock_nanosleep=115, exit_group=94, epoll_ctl=21,
    tgkill=131, ioprio_set=30, ioprio_get=31, inotify_add_watch=27, openat=56, pselect6=72, ppoll=73, unshare=97,
    set_robust_list=99, get_robust_list=100, epoll_pwait=22, timerfd_create=85, timerfd_settime=86,
    timerfd_gettime=87, signalfd4=74, eventfd2=19, epoll_create1=20, dup3=24, pipe2=59, inotify_init1=26,
    rt_tgsigqueueinfo=240, prlimit64=261, setns=268, process_vm_readv=270, process_vm_writev=271, kcmp=272,
    sched_setattr=274, sched_getattr=275, seccomp=277, getrandom=278, memfd_create=279, userfaultfd=282,
    membarrier=283, mlock2=284, pkey_mprotect=288, pkey_alloc=289, pkey_free=290, rseq=293,
)  # fmt: skip


def _of_this_build() -> SyscallNumbers:
    triplet = str(getattr(sys.implementation, "_multiarch", ""))
    for prefix, numbers in (("x86_64", X86_64), ("aarch64", AARCH64)):
        if triplet.startswith(prefix):
            return numbers
    raise UnsupportedError(f"this Python was built for {triplet or 'an unknown machine'}; x86_64 and aarch64 are known")


SYS = _of_this_build()
