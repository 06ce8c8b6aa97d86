"""Test hosts on one machine: namespaces, disks of their own, one LAN, different monotonic clocks."""

from tests.lab.containers import Container
from tests.lab.host import Host, LabError
from tests.lab.lab import Lab

__all__ = ["Container", "Host", "Lab", "LabError"]
