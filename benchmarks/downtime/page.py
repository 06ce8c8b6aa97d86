"""The generated section of docs/explanation/freeze.md."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs/explanation/freeze.md"
BEGIN = "<!-- figures: written by python -m benchmarks.downtime --write-docs -->"
END = "<!-- figures: end -->"


def write(block: str, page: Path = PAGE) -> None:
    """Put `block` between the markers of `page`. Raises: ValueError: it has none."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} has no section between {BEGIN} and {END}")
    page.write_text(f"{before}{BEGIN}\n\n{block}\n\n{END}{after}", encoding="utf-8")
