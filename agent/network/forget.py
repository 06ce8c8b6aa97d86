"""Delete on the source what is left of a container's network after it has moved."""

from __future__ import annotations

from typing import TYPE_CHECKING

from agent.network.build import remove_network

if TYPE_CHECKING:
    from protocol.messages import Network


def forget_network(network: Network) -> None:
    """Delete the host ends (and with them the container's interfaces) and the named namespace, if it has a name.

    What is gone already is success. Raises: UnsupportedError: the path is not a permitted one. KernelError.
    """
    remove_network(network.path, *(interface.host_name for interface in network.interfaces if interface.host_name))
