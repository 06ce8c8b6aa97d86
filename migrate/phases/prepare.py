"""Lock and inspect at the source, build at the target, connect the two."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from migrate.events import Warned
from migrate.phases import rollback
from migrate.phases.session import Session
from migrate.phases.survey import Survey
from protocol import messages as m


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Both sides are ready for the first round."""

    container: m.ContainerReport  # as it was when it was locked
    armed_ms: float


async def enter(session: Session, survey: Survey) -> Prepared:
    """BeginSource, PrepareTarget, ConnectSource. Whatever happens, `undo` takes it back."""
    request = session.request
    begun = await session.source.request(
        m.BeginSource(
            migration=session.migration,
            epoch=session.epoch,
            container=request.container,
            target=session.target.name,
            storage=request.storage_on_wire,
            network=request.network,
            tcp=request.tcp,
        ),
        m.SourceBegun,
    )
    prepared = await session.target.request(
        m.PrepareTarget(
            migration=session.migration,
            epoch=session.epoch,
            source=session.source.name,
            container=begun.report,
            new_name=request.target_name,
            client_public_key=begun.client_public_key,
            monotonic_offset_ns=survey.offset.never_backwards_ns,
            keep_network=request.network == "keep",
            source_address=_numeric(session.source.host.address),
        ),
        m.TargetPrepared,
    )
    for warning in prepared.warnings:
        session.tell(Warned(text=warning))
    connected = await session.source.request(
        m.ConnectSource(
            migration=session.migration,
            address=session.target.host.address,
            port=prepared.port,
            host_key=prepared.host_key,
            compress=request.compress,
            bandwidth=request.bandwidth,
            track=request.is_live,
        ),
        m.SourceConnected,
    )
    return Prepared(container=begun.report, armed_ms=connected.armed_ms)


def _numeric(address: str) -> str:
    """`address` if it is an IP address by which another host can know its owner, else ''."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return ""  # a name may stand for several, and another one for the target
    return "" if parsed.is_loopback or parsed.is_unspecified or parsed.is_link_local else str(parsed)


async def undo(session: Session, reason: str) -> None:
    """End the migration on both sides. Raises: see rollback."""
    await rollback.abort_both(session, reason)
