"""Names for numbers that must not be mixed up."""

from __future__ import annotations

from typing import NewType

Pid = NewType("Pid", int)  # a process, as this host's pid namespace numbers it
Tid = NewType("Tid", int)  # a thread, same numbering; a leader's Tid equals its Pid
Address = NewType("Address", int)  # in the address space of a traced process, never in ours
Fd = NewType("Fd", int)  # a descriptor of ours
