"""The rehearsal of a freeze, on the engine's own program."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from agent.engine.native import rehearsal, sections
from agent.engine.native.rehearsal import Rehearsal, Stage

pytestmark = pytest.mark.root


def test_the_program_lives_on_through_every_rehearsal():
    with Stage() as stage:
        for _ in range(2):
            state, dumped = stage.dump()
        for _ in range(2):
            stage.restore(state, dumped)
        assert Path(f"/proc/{stage.pid}/stat").read_text().split(")")[1].split()[0] == "S"
        assert "TracerPid:\t0" in Path(f"/proc/{stage.pid}/status").read_text()


def test_every_common_kind_of_open_file_is_rehearsed():
    with Stage() as stage:
        section = sections.decode(stage.dump()[1])
    assert isinstance(section, sections.FilesStateSection)
    kinds = {type(record).__name__ for record in section.files.objects}
    assert {"TcpConnection", "TcpListener", "Epoll", "PipeEnd", "EventFd", "UnixSocket"} <= kinds


def test_the_program_is_gone_after_close():
    stage = Stage()
    pid = stage.pid
    stage.close()
    stage.close()
    assert not Path(f"/proc/{pid}").exists()
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)


def test_a_program_that_does_not_start_is_only_logged(monkeypatch, caplog):
    monkeypatch.setattr(rehearsal, "_PROGRAM", "raise SystemExit(1)")
    caplog.set_level("INFO")
    rehearsed = Rehearsal()
    rehearsed.start()
    rehearsed.begin_source()
    rehearsed.begin_target()
    rehearsed.refresh_source()
    rehearsed.refresh_target()
    rehearsed.close()
    assert [record.message for record in caplog.records] == [
        "no rehearsal, the freeze may take longer: MigrateError: the program for the rehearsal did not start"
    ]
