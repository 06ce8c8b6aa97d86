"""Counts, and says what its clock shows: both must go on, the clock without a jump."""

import time

started = time.monotonic()
before = started
count = 0
while True:
    count += 1
    now = time.monotonic()
    if now < before:
        print(f"BACKWARDS {before} {now}", flush=True)
    before = now
    if count % 20 == 0:
        print(f"count {count} monotonic {now:.6f} elapsed {now - started:.3f}", flush=True)
    time.sleep(0.01)
