"""Memory of one process copied into another through two real stream processes: rate and latency.

python -m benchmarks.link.throughput [MIB] [MODE...]
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from pathlib import Path

from agent.engine import base
from protocol.framing import FrameKind
from tests.agent.transfer.rig import ADDRESS, Pair, Victim


def main() -> None:
    size = int(sys.argv[1]) << 20 if len(sys.argv) > 1 else 512 << 20
    modes = sys.argv[2:] or ["none"]
    for mode in modes:
        with Victim.start(size, "random") as giver, Victim.start(size) as taker, Pair.start() as pair:
            pair.join(compress=mode)
            pair.open(giver, taker)
            for number, state in enumerate(("fresh", "populated"), 1):
                cpu = [_cpu_s(side.process.pid) for side in (pair.source, pair.target)]
                done = pair.copy(size, number=number)
                used = [_cpu_s(s.process.pid) - c for s, c in zip((pair.source, pair.target), cpu, strict=True)]
                rate = size / done.ms / 1e3
                print(
                    f"{mode:5} {state:9} {rate:6.0f} MB/s  {done.ms:7.1f} ms  "
                    f"cpu source {used[0]:.2f} target {used[1]:.2f} s"
                    f"  wire {done.wire_bytes / size:.3f}"
                )
            _latency(pair)
            _freeze(pair)


def _latency(pair: Pair) -> None:
    for name, payload in (("8 B", b"x" * 8), ("8 KiB", os.urandom(8192)), ("64 KiB", os.urandom(65536))):
        there, both = [], []
        for _ in range(300):
            start_s = time.perf_counter()
            pair.source.engine.send_frame(FrameKind.SECTION, payload)
            pair.target.engine.receive(5)
            there.append(time.perf_counter() - start_s)
            pair.target.engine.send(base.SectionApplied())
        for _ in range(300):
            start_s = time.perf_counter()
            pair.source.service.send_frame(FrameKind.AGENT, payload)
            frame = pair.target.service.receive(5)
            pair.target.service.send_frame(FrameKind.AGENT, frame.payload)
            pair.source.service.receive(5)
            both.append(time.perf_counter() - start_s)
            time.sleep(0.001)
        for text, values in (("engine to engine", there), ("service and back", both)):
            values.sort()
            print(
                f"  {text}, {name}: median {statistics.median(values) * 1e3:.3f} p95 {values[285] * 1e3:.3f} "
                f"max {values[-1] * 1e3:.3f} ms"
            )


def _freeze(pair: Pair) -> None:
    """A layout, 200 scattered pages of the freeze, and the last section, as an engine sends them."""
    starts = [ADDRESS + index * 5 * 4096 for index in range(200)]
    times = []
    for _ in range(100):
        start_s = time.perf_counter()
        pair.source.engine.send_frame(FrameKind.SECTION, b"x" * 20_000)
        pair.source.engine.send(
            base.ReadRuns(task=1, starts=starts, sizes=[4096] * len(starts), anonymous=True, final=True)
        )
        pair.source.engine.send_frame(FrameKind.SECTION, b"x" * 50_000)
        for _ in range(2):
            pair.target.engine.receive(5)
            pair.target.engine.send(base.SectionApplied())
        times.append(time.perf_counter() - start_s)
        time.sleep(0.005)
    times.sort()
    print(f"  section, 200 pages, section: median {times[50] * 1e3:.3f} p95 {times[95] * 1e3:.3f} ms")


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
