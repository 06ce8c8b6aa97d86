"""Options of sockets: read as what differs from a fresh one of the same namespace, set as they were read."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from functools import cache

import msgspec

from agent.kernel.syscalls import failure, get_errno, libc
from protocol.errors import KernelError

# asm-generic/socket.h
SO_REUSEADDR = 2
SO_PEEK_OFF = 42
SO_GET_FILTER = 26
SO_PROTOCOL = 38
SO_BUF_LOCK = 72
SO_SNDBUFFORCE = 32
SO_RCVBUFFORCE = 33
SO_BINDTODEVICE = 25
_SO = socket.SOL_SOCKET
_SOCKET_OPTIONS = {
    SO_REUSEADDR: 4,
    5: 4,  # SO_DONTROUTE
    6: 4,  # SO_BROADCAST
    9: 4,  # SO_KEEPALIVE
    10: 4,  # SO_OOBINLINE
    11: 4,  # SO_NO_CHECK
    12: 4,  # SO_PRIORITY
    13: 8,  # SO_LINGER
    15: 4,  # SO_REUSEPORT
    18: 4,  # SO_RCVLOWAT
    20: 16,  # SO_RCVTIMEO
    21: 16,  # SO_SNDTIMEO
    SO_BINDTODEVICE: 16,
    29: 4,  # SO_TIMESTAMP
    34: 4,  # SO_PASSSEC
    35: 4,  # SO_TIMESTAMPNS
    36: 4,  # SO_MARK
    37: 4,  # SO_TIMESTAMPING
    40: 4,  # SO_RXQ_OVFL
    41: 4,  # SO_WIFI_STATUS
    44: 4,  # SO_LOCK_FILTER
    46: 4,  # SO_BUSY_POLL
    60: 4,  # SO_ZEROCOPY
}
_UNIX_OPTIONS = {
    16: 4,  # SO_PASSCRED
    76: 4,  # SO_PASSPIDFD
    SO_PEEK_OFF: 4,
}
# linux/in.h
_IP_OPTIONS = {
    1: 4,  # IP_TOS
    2: 4,  # IP_TTL
    6: 4,  # IP_RECVOPTS
    7: 4,  # IP_RETOPTS
    8: 4,  # IP_PKTINFO
    10: 4,  # IP_MTU_DISCOVER
    11: 4,  # IP_RECVERR
    12: 4,  # IP_RECVTTL
    13: 4,  # IP_RECVTOS
    15: 4,  # IP_FREEBIND
    19: 4,  # IP_TRANSPARENT
    20: 4,  # IP_RECVORIGDSTADDR
    21: 4,  # IP_MINTTL
    24: 4,  # IP_BIND_ADDRESS_NO_PORT
}
# On TCP these are left over from the connection's making, and cannot be set.
_IP_MULTICAST = {
    32: 4,  # IP_MULTICAST_IF
    33: 4,  # IP_MULTICAST_TTL
    34: 4,  # IP_MULTICAST_LOOP
    49: 4,  # IP_MULTICAST_ALL
}
# linux/in6.h
_IPV6_OPTIONS = {
    16: 4,  # IPV6_UNICAST_HOPS
    23: 4,  # IPV6_MTU_DISCOVER
    25: 4,  # IPV6_RECVERR
    26: 4,  # IPV6_V6ONLY
    33: 4,  # IPV6_FLOWINFO_SEND
    49: 4,  # IPV6_RECVPKTINFO
    51: 4,  # IPV6_RECVHOPLIMIT
    62: 4,  # IPV6_DONTFRAG
    66: 4,  # IPV6_RECVTCLASS
    67: 4,  # IPV6_TCLASS
    72: 4,  # IPV6_ADDR_PREFERENCES
    73: 4,  # IPV6_MINHOPCOUNT
    75: 4,  # IPV6_TRANSPARENT
    78: 4,  # IPV6_FREEBIND
}
_IPV6_MULTICAST = {
    17: 4,  # IPV6_MULTICAST_IF
    18: 4,  # IPV6_MULTICAST_HOPS
    19: 4,  # IPV6_MULTICAST_LOOP
    29: 4,  # IPV6_MULTICAST_ALL
}
# linux/tcp.h
TCP_NODELAY = 1
TCP_CORK = 3
_TCP_OPTIONS = {
    TCP_NODELAY: 4,
    TCP_CORK: 4,
    4: 4,  # TCP_KEEPIDLE
    5: 4,  # TCP_KEEPINTVL
    6: 4,  # TCP_KEEPCNT
    7: 4,  # TCP_SYNCNT
    8: 4,  # TCP_LINGER2
    9: 4,  # TCP_DEFER_ACCEPT
    13: 16,  # TCP_CONGESTION
    16: 4,  # TCP_THIN_LINEAR_TIMEOUTS
    17: 4,  # TCP_THIN_DUPACK
    18: 4,  # TCP_USER_TIMEOUT
    23: 4,  # TCP_FASTOPEN
    25: 4,  # TCP_NOTSENT_LOWAT
    27: 4,  # TCP_SAVE_SYN
    30: 4,  # TCP_FASTOPEN_CONNECT
    34: 4,  # TCP_FASTOPEN_NO_COOKIE
    36: 4,  # TCP_INQ
}
# linux/udp.h
_UDP_OPTIONS = {
    1: 4,  # UDP_CORK
    101: 4,  # UDP_NO_CHECK6_TX
    102: 4,  # UDP_NO_CHECK6_RX
    103: 4,  # UDP_SEGMENT
    104: 4,  # UDP_GRO
}
# Set last: it holds back what is sent after it.
_LATE = {(socket.IPPROTO_TCP, TCP_CORK), (socket.IPPROTO_UDP, 1)}


class Option(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True):
    """One option as getsockopt gave it."""

    level: int
    name: int
    value: bytes


class Address(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True):
    """An internet address as getsockname gives it; flow and scope are IPv6's."""

    host: str
    port: int
    flow: int = 0
    scope: int = 0

    @classmethod
    def of(cls, name: tuple[str, int] | tuple[str, int, int, int]) -> Address:
        """From what Python's socket calls give."""
        flow, scope = (name[2], name[3]) if len(name) == 4 else (0, 0)
        return cls(host=name[0], port=name[1], flow=flow, scope=scope)

    def for_call(self, family: int) -> tuple[str, int] | tuple[str, int, int, int]:
        """For Python's socket calls."""
        return (self.host, self.port) if family == socket.AF_INET else (self.host, self.port, self.flow, self.scope)

    @property
    def plain_host(self) -> str:
        """Without the prefix of an IPv4 address on an IPv6 socket: the address on the wire."""
        return self.host.removeprefix("::ffff:") if "." in self.host else self.host


class Buffers(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, array_like=True):
    """Sizes as getsockopt gives them (twice what was asked for), and which of them the program fixed."""

    send_bytes: int
    receive_bytes: int
    lock: int


def _names(family: int, protocol: int) -> dict[tuple[int, int], int]:
    names = {(_SO, name): size for name, size in _SOCKET_OPTIONS.items()}
    if family == socket.AF_UNIX:
        return names | {(_SO, name): size for name, size in _UNIX_OPTIONS.items()}
    is_tcp = protocol == socket.IPPROTO_TCP
    v4 = _IP_OPTIONS if is_tcp else _IP_OPTIONS | _IP_MULTICAST
    v6 = _IPV6_OPTIONS if is_tcp else _IPV6_OPTIONS | _IPV6_MULTICAST
    names |= {(socket.IPPROTO_IP, name): size for name, size in v4.items()}
    if family == socket.AF_INET6:
        names |= {(socket.IPPROTO_IPV6, name): size for name, size in v6.items()}
    own = {socket.IPPROTO_TCP: _TCP_OPTIONS, socket.IPPROTO_UDP: _UDP_OPTIONS}.get(protocol, {})
    return names | {(protocol, name): size for name, size in own.items()}


@cache
def _known_names(family: int, protocol: int) -> tuple[tuple[int, int, int], ...]:
    return tuple((level, name, size) for (level, name), size in _names(family, protocol).items())


class Template:
    """What a fresh socket of this network namespace has, by family and protocol; made where it is first asked for."""

    def __init__(self) -> None:
        self._fresh: dict[tuple[int, int], dict[tuple[int, int], bytes]] = {}

    def prepare(self) -> None:
        """Make all of them now, inside the namespace."""
        for family in (socket.AF_INET, socket.AF_INET6):
            for kind, protocol in (
                (socket.SOCK_STREAM, socket.IPPROTO_TCP),
                (socket.SOCK_DGRAM, socket.IPPROTO_UDP),
            ):
                try:
                    fresh = socket.socket(family, kind | socket.SOCK_CLOEXEC, protocol)
                except OSError:
                    continue  # a host without IPv6 has no socket of it to compare with either
                with fresh:
                    self._fresh[family, protocol] = dict(_read_all(fresh, family, protocol))
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as fresh:
            self._fresh[socket.AF_UNIX, 0] = dict(_read_all(fresh, socket.AF_UNIX, 0))

    def differing(self, sock: socket.socket, family: int, protocol: int) -> list[Option]:
        """The options of `sock` that a fresh socket would not have."""
        fresh = self._fresh[family, protocol]
        return [
            Option(level=level, name=name, value=value)
            for (level, name), value in _read_all(sock, family, protocol)
            if fresh.get((level, name)) != value
        ]


def _read_all(sock: socket.socket, family: int, protocol: int) -> list[tuple[tuple[int, int], bytes]]:
    found = []
    getsockopt = sock.getsockopt
    for level, name, size in _known_names(family, protocol):
        try:
            found.append(((level, name), getsockopt(level, name, size)))
        except OSError:
            continue  # this kernel or this kind of socket does not have it
    return found


def read_buffers(sock: socket.socket) -> Buffers:
    """Source: socket(7); SO_BUF_LOCK is Linux 5.15."""
    return Buffers(
        send_bytes=sock.getsockopt(_SO, socket.SO_SNDBUF),
        receive_bytes=sock.getsockopt(_SO, socket.SO_RCVBUF),
        lock=sock.getsockopt(_SO, SO_BUF_LOCK),
    )


def set_buffers(sock: socket.socket, buffers: Buffers, *, at_least_send: int = 0, at_least_receive: int = 0) -> None:
    """Sizes and locks; never smaller than what has to be put in (the kernel counts its own overhead as well)."""
    _set(sock, _SO, SO_SNDBUFFORCE, max(buffers.send_bytes // 2, at_least_send * 2))
    _set(sock, _SO, SO_RCVBUFFORCE, max(buffers.receive_bytes // 2, at_least_receive * 2))
    _set(sock, _SO, SO_BUF_LOCK, buffers.lock)


def set_options(sock: socket.socket, options: list[Option], *, but_reuse: bool = False) -> None:
    """Before bind: some cannot be set after. Raises: KernelError: which option, and why not."""
    for option in options:
        if but_reuse and (option.level, option.name) == (_SO, SO_REUSEADDR):
            continue
        if (option.level, option.name) not in _LATE:
            _set(sock, option.level, option.name, option.value)
    for option in options:
        if (option.level, option.name) in _LATE:
            _set(sock, option.level, option.name, option.value)


def set_reuse(sock: socket.socket, options: list[Option]) -> None:
    """SO_REUSEADDR alone."""
    wanted = [option.value for option in options if (option.level, option.name) == (_SO, SO_REUSEADDR)]
    sock.setsockopt(_SO, SO_REUSEADDR, wanted[0] if wanted else 0)


def _set(sock: socket.socket, level: int, name: int, value: int | bytes) -> None:
    try:
        sock.setsockopt(level, name, value)
    except OSError as error:
        shown = value.hex() if isinstance(value, bytes) else value
        raise KernelError(
            f"setsockopt({level}, {name}, {shown})", error.errno or 0, error.strerror or os.strerror(error.errno or 0)
        ) from error


def has_filter(sock: socket.socket) -> bool:
    """Whether a BPF filter is attached. Raises: KernelError.

    Source: SO_GET_FILTER asked with room for nothing gives the length in instructions; EACCES for an eBPF program.
    """
    length = ctypes.c_uint32(0)
    if libc.getsockopt(sock.fileno(), _SO, SO_GET_FILTER, None, ctypes.byref(length)) < 0:
        if get_errno() == errno.EACCES:
            return True
        raise failure("getsockopt(SO_GET_FILTER)", get_errno())
    return length.value > 0


# Options that programs turn on and off while they work: read again in the freeze.
_VOLATILE = (
    (socket.IPPROTO_TCP, TCP_NODELAY, 4),
    (socket.IPPROTO_TCP, TCP_CORK, 4),
    (_SO, socket.SO_KEEPALIVE, 4),
    (_SO, socket.SO_LINGER, 8),
)


def refresh_volatile(sock: socket.socket, options: list[Option]) -> list[Option]:
    """The options as they are now, as far as programs change them in passing."""
    before = {(option.level, option.name): option.value for option in options}
    changed = [
        Option(level=level, name=name, value=value)
        for level, name, size in _VOLATILE
        if (value := sock.getsockopt(level, name, size)) != before.get((level, name), b"\0" * size)
    ]
    if not changed:
        return options
    names = {(option.level, option.name) for option in changed}
    return [option for option in options if (option.level, option.name) not in names] + changed


def bind(sock: socket.socket, local: Address) -> None:
    """Raises: KernelError: with the address."""
    try:
        sock.bind(local.for_call(sock.family))
    except OSError as error:
        raise KernelError(
            f"bind({local.host}, port {local.port})",
            error.errno or 0,
            error.strerror or "",
            hint="is the address up in the container's network namespace?",
        ) from error
