"""Types of command-line options: durations and rates, in the forms that people write."""

from __future__ import annotations

import click

from migrate.request import parse_duration, parse_rate


class Duration(click.ParamType[float]):
    """'300ms' -> 0.3."""

    name = "duration"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Seconds."""
        if isinstance(value, (int, float)):
            return float(value)
        try:
            return parse_duration(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


class Rate(click.ParamType[int]):
    """'50M' -> 50_000_000."""

    name = "rate"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes per second."""
        if isinstance(value, int):
            return value
        try:
            return parse_rate(str(value))
        except ValueError as error:
            self.fail(str(error), param, ctx)


DURATION = Duration()
RATE = Rate()
