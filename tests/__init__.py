"""Tests. Folders mirror the code; `lab` is the test hosts that demo, end-to-end tests and benchmarks share."""
