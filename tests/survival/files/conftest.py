import contextlib

import pytest

from agent.engine.native import files
from agent.engine.native.files import FilesSection, RestoredFiles
from protocol import codec
from tests.survival.files.puppet import Puppet, stopped


@pytest.fixture
def puppets():
    with contextlib.ExitStack() as stack:

        def make(**options) -> Puppet:
            puppet = Puppet(**options)
            stack.callback(puppet.close)
            return puppet

        yield make


def dump(source: Puppet, **options) -> FilesSection:
    """Dump by way of the wire's bytes."""
    prepared = files.PreparedDump.prepare(source.pid, **options)
    try:
        section = prepared.dump()
    finally:
        prepared.close()
    return codec.decode(codec.encode(section), FilesSection)


def restore(section: FilesSection, target: Puppet) -> RestoredFiles:
    with stopped(target.pid) as remote:
        return files.restore(section, files.RestoreContext(pid=target.pid, remote=remote))


@pytest.fixture
def move(puppets):
    """Dump one puppet, restore into a new one."""

    def move(source: Puppet, **options) -> Puppet:
        target: Puppet = puppets()
        restore(dump(source, **options), target)
        return target

    return move
