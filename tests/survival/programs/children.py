"""Has a child."""

import os
import time

if os.fork() == 0:
    time.sleep(1000)
print("ready", flush=True)
time.sleep(1000)
