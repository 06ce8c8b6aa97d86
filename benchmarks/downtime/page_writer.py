"""Writes one byte to each page of its memory for each line on stdin, and says how many ns that took."""

from __future__ import annotations

import mmap
import sys
import time

import numpy as np


def main() -> None:
    pages = int(sys.argv[1])
    memory = mmap.mmap(-1, pages * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    everything = np.frombuffer(memory, dtype=np.uint8)
    everything[:] = 1
    one_byte_each = everything[:: mmap.PAGESIZE]
    print(everything.ctypes.data, flush=True)
    for number, _ in enumerate(sys.stdin):
        began_ns = time.perf_counter_ns()
        one_byte_each[:] = number % 251
        print(time.perf_counter_ns() - began_ns, flush=True)


if __name__ == "__main__":
    main()
