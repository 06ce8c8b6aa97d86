"""The command line `migrate`. Heavy modules are imported by the commands that need them: `--help` stays quick."""

from migrate.cli.group import main

__all__ = ["main"]
