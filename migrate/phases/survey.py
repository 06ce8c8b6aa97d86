"""Look at both hosts and the container, without touching anything; the first half of every migration and `check`."""

from __future__ import annotations

import time
from dataclasses import dataclass

import trio

from migrate.clock import PROBES, Offset, Probe, estimate_offset
from migrate.link import AgentLink
from migrate.preflight import Preflight, preflight
from migrate.request import MigrationRequest
from protocol import messages as m
from protocol.errors import UnsupportedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What was seen, and what preflight says to it."""

    source: m.HostReport
    target: m.HostReport
    container: m.ContainerReport
    offset: Offset
    preflight: Preflight


async def enter(source: AgentLink, target: AgentLink, request: MigrationRequest) -> Survey:
    """Ask both agents for all that preflight needs.

    Raises: UnsupportedError: source and target are one; what the agents answer.
    """
    if source.name == target.name:
        raise UnsupportedError(f"{request.container} is on {target.name} already", code="same-host", host=target.name)
    reports: dict[str, m.HostReport] = {}

    async def report(link: AgentLink) -> None:
        reports[link.name] = (await link.request(m.GetHostReport(), m.HostReportReply)).report

    await report(source)  # one after the other: a nursery would bundle errors, and this takes milliseconds
    await report(target)
    inspect = m.InspectContainer(
        container=request.container, storage=request.storage_on_wire, tcp=request.tcp, network=request.network
    )
    container = (await source.request(inspect, m.ContainerReportReply)).report
    files = (await target.request(m.VerifyFiles(container=container), m.FilesVerified)).refusals
    offset = estimate_offset(await _probe(source), await _probe(target))
    return Survey(
        source=reports[source.name],
        target=reports[target.name],
        container=container,
        offset=offset,
        preflight=preflight(reports[source.name], reports[target.name], container, request, files),
    )


async def _probe(link: AgentLink) -> list[Probe]:
    probes = []
    for _ in range(PROBES):
        sent_ns = time.monotonic_ns()
        reading = (await link.request(m.ReadClock(), m.ClockReply)).reading
        received_ns = time.monotonic_ns()
        probes.append(
            Probe(
                sent_ns=sent_ns,
                received_ns=received_ns,
                monotonic_ns=reading.monotonic_ns,
                wall_ns=reading.wall_ns,
            )
        )
        await trio.lowlevel.checkpoint()
    return probes
