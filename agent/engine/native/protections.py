"""The protection that each range of the target's address space has at this moment, kept on the source."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence


class Protections:
    """Ranges that do not overlap, in ascending order, each with its protection."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._prots: list[int] = []

    def paint(self, start: int, end: int, prot: int | None) -> None:
        """Give a range a protection; None: it is not mapped any more."""
        first = bisect_right(self._ends, start)
        last = bisect_left(self._starts, end)
        pieces: list[tuple[int, int, int]] = []
        if first < last and self._starts[first] < start:
            pieces.append((self._starts[first], start, self._prots[first]))
        if prot is not None:
            pieces.append((start, end, prot))
        if first < last and self._ends[last - 1] > end:
            pieces.append((end, self._ends[last - 1], self._prots[last - 1]))
        self._starts[first:last] = [piece[0] for piece in pieces]
        self._ends[first:last] = [piece[1] for piece in pieces]
        self._prots[first:last] = [piece[2] for piece in pieces]

    def pieces(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(start, end, protection) of what is mapped of a range, cut at its borders."""
        for index in range(bisect_right(self._ends, start), bisect_left(self._starts, end)):
            yield max(start, self._starts[index]), min(end, self._ends[index]), self._prots[index]

    def around(self, runs: Sequence[tuple[int, int]], lacking: int) -> list[tuple[int, int, int]]:
        """Whole ranges that lack the bits `lacking` and are touched by one of the ascending `runs` of (start, end)."""
        found: list[tuple[int, int, int]] = []
        if not any(prot & lacking != lacking for prot in self._prots):
            return found
        at = 0
        for start, end, prot in zip(self._starts, self._ends, self._prots, strict=True):
            if prot & lacking == lacking:
                continue
            while at < len(runs) and runs[at][1] <= start:
                at += 1
            if at == len(runs):
                break
            if runs[at][0] < end:
                found.append((start, end, prot))
        return found
