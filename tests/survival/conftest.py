"""Containers that end with their test, and programs built once."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.survival.bundle import Container, compile_c

PROGRAMS = Path(__file__).parent / "programs"
_numbers = itertools.count()


class Yard:
    """Makes containers of one program; all see the same /shared."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.shared = directory / "shared"
        self.shared.mkdir()
        # Programs of other users run in it.
        for path in (directory, *list(directory.parents)[:3]):
            path.chmod(path.stat().st_mode | 0o055)
        self.made: list[Container] = []

    def program(self, name: str) -> list[str]:
        """The arguments that run a program of this folder."""
        if name.endswith(".c"):
            compile_c(PROGRAMS / name, self.shared / name[:-2])
            return [f"/shared/{name[:-2]}"]
        shutil.copy(PROGRAMS / name, self.shared / name)
        return ["/usr/bin/python3", f"/shared/{name}"]

    def container(self, args: Sequence[str], **options) -> Container:
        """Not created yet."""
        name = f"survival-{os.getpid()}-{next(_numbers)}"
        made = Container(name, self.directory / name, args, self.shared, **options)
        self.made.append(made)
        return made

    def running(self, args: Sequence[str], **options) -> Container:
        container = self.container(args, **options)
        container.create()
        container.start()
        return container

    def shell_of(self, source: Container, **options) -> Container:
        """What the target's runtime starts: the program itself, which will not run an instruction."""
        return self.container([os.readlink(f"/proc/{source.pid}/exe")], **options)

    def clear(self) -> None:
        for container in self.made:
            container.delete()


@pytest.fixture
def yard(tmp_path) -> Iterator[Yard]:
    made = Yard(tmp_path)
    yield made
    made.clear()
