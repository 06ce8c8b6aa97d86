"""Scope OPEN FILE: what a process holds open, one file a kind, dump and restore side by side.

`registry` lists the kinds; what stands below is all that the engine and the agent's service call.
"""

from agent.engine.native.files.checking import CheckContext, FilesCheck, check
from agent.engine.native.files.dumping import PreparedDump
from agent.engine.native.files.restoring import RestoreContext, RestoredFiles, prepare_restore, restore
from agent.engine.native.files.section import FilesSection
from agent.engine.native.files.tcp import TcpConnection
from agent.engine.native.files.tcp_restore import activate, leave_repair_everywhere

__all__ = [
    "CheckContext",
    "FilesCheck",
    "FilesSection",
    "PreparedDump",
    "RestoreContext",
    "RestoredFiles",
    "TcpConnection",
    "activate",
    "check",
    "leave_repair_everywhere",
    "prepare_restore",
    "restore",
]
