"""One process, one thread: a line each 100 ms with a number that grows by one, and the monotonic clock in seconds.

Nothing is open but the three standard files.
"""

import itertools
import time

_PERIOD_S = 0.1

for number in itertools.count():
    print(number, f"{time.monotonic():.6f}", flush=True)
    time.sleep(_PERIOD_S)
