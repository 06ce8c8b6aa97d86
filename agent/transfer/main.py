"""The stream process of one side of one migration: `python -m agent.transfer.main`."""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import logging
import os
import resource
import socket
import sys
from collections.abc import Sequence
from typing import Any

import structlog

from agent.transfer.receiver import TargetStream
from agent.transfer.sender import SourceStream
from agent.transfer.stream import Stream
from protocol.errors import MigrateError
from protocol.states import Side

_PR_SET_DUMPABLE = 4  # linux/prctl.h
# malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="migrate-stream")
    parser.add_argument("--side", choices=[side.value for side in Side], required=True)
    parser.add_argument("--service-fd", type=int, required=True)
    parser.add_argument("--engine-fd", type=int, required=True)
    options = parser.parse_args(arguments)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    logging.basicConfig(level=logging.ERROR, stream=sys.stderr)
    _harden()
    _tune()
    return asyncio.run(_run(Side(options.side), options.service_fd, options.engine_fd))


def _harden() -> None:
    """Pages and keys of a container pass through this process: nothing of it goes to a core file or a debugger."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_DUMPABLE, 0)")
    os.umask(0o077)


def _tune() -> None:
    # Buffers of 128 KiB to 1 MiB come and go with every packet: by default each is mapped, faulted in and unmapped.
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
    libc.mallopt(_M_TRIM_THRESHOLD, 256 << 20)
    # A full collection walks every object of the libraries, some 10 ms: take them out, and collect seldom.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 1000)


async def _run(side: Side, service_fd: int, engine_fd: int) -> int:
    service, engine = socket.socket(fileno=service_fd), socket.socket(fileno=engine_fd)
    stream: Stream = SourceStream(service, engine) if side is Side.SOURCE else TargetStream(service, engine)

    def unexpected(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # A bug in a callback: the log has the trace, service and engine are told.
        loop.default_exception_handler(context)
        stream.fail(MigrateError(f"the stream process: {context.get('exception') or context['message']}"))

    asyncio.get_running_loop().set_exception_handler(unexpected)
    await stream.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
