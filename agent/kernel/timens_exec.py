"""`python -m agent.kernel.timens_exec OFFSET_NS -- COMMAND...`: run a command with its monotonic clock shifted."""

from __future__ import annotations

import sys

from agent.kernel import timens
from protocol.errors import MigrateError, UsageError


def main(arguments: list[str]) -> int:
    try:
        if len(arguments) < 3 or arguments[1] != "--":
            raise UsageError("usage: timens_exec OFFSET_NS -- COMMAND [ARGUMENT...]")
        return timens.run(arguments[2:], int(arguments[0]))
    except (MigrateError, OSError, ValueError) as error:
        sys.stderr.write(f"timens_exec: {error}\n")
        return 125


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
