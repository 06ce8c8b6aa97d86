"""A token bucket: how long to wait so that a rate is kept on average."""

from __future__ import annotations

# Sending may run ahead by this much of a second's worth: smooth enough for a shaped link, few wake-ups.
_BURST_S = 0.05


class TokenBucket:
    """Debt in bytes that pays itself off at `rate_bytes_s`; 0: unlimited."""

    def __init__(self, rate_bytes_s: int, now_s: float) -> None:
        self._rate_bytes_s = rate_bytes_s
        self._debt_bytes = 0.0
        self._at_s = now_s

    def spend(self, size_bytes: int, now_s: float) -> float:
        """Note that `size_bytes` were sent; gives the seconds to wait before more is sent."""
        if self._rate_bytes_s == 0:
            return 0.0
        paid_off = (now_s - self._at_s) * self._rate_bytes_s
        self._debt_bytes = max(0.0, self._debt_bytes - paid_off) + size_bytes
        self._at_s = now_s
        return max(0.0, self._debt_bytes / self._rate_bytes_s - _BURST_S)
