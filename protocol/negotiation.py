"""Which version of the protocol two programs speak.

The answering side chooses: it alone sees both lists. Hello, Welcome and Failure never change their shape, in no
version, so that any two programs can at least say why they do not understand each other.
"""

from __future__ import annotations

from collections.abc import Collection

from protocol.errors import UnsupportedError
from protocol.messages import VERSIONS


def choose_version(
    offered: Collection[int],
    supported: Collection[int] = VERSIONS,
    *,
    offering: str = "the coordinator",
    answering: str = "the agent",
) -> int:
    """The newest version that both sides speak.

    `offered` comes from the peer's Hello, `supported` is our own; `offering` and `answering` name them for people
    ('migrate 1.2 on desk', 'migrate-agent 1.4 on hostB').

    Raises: UnsupportedError (code 'version'): they have none in common; says which side to upgrade.
    """
    common = set(offered) & set(supported)
    if common:
        return max(common)
    if not offered:
        raise UnsupportedError(
            f"{offering} offers no protocol version", code="version", hint=f"upgrade the program of {offering}"
        )
    # Each side can keep what is older than its newest; only the older one can gain a version by an upgrade.
    older = offering if max(offered) < max(supported) else answering
    raise UnsupportedError(
        f"no protocol version in common: {offering} speaks {_listed(offered)}, {answering} speaks {_listed(supported)}",
        code="version",
        hint=f"upgrade the program of {older}",
    )


def _listed(versions: Collection[int]) -> str:
    return ", ".join(str(version) for version in sorted(versions)) or "none"
