"""The open files of one process as they cross the wire."""

from __future__ import annotations

import msgspec

from agent.engine.native.files.base import Descriptor
from agent.engine.native.files.registry import ObjectOnWire


class FilesSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Every number of the table and every open file behind them; several numbers may share one."""

    descriptors: list[Descriptor]
    objects: list[ObjectOnWire]
    warnings: list[str] = []
