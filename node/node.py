"""One node: its roles over its ports, in one nursery. The same for daemons and simulations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from meshd.node.jobs import Jobs
from meshd.node.ports import Ports
from meshd.node.researcher import Researcher
from meshd.node.roles.aggregator import Aggregator
from meshd.node.roles.orchestrator import ENTRY_KINDS, Orchestrator
from meshd.node.roles.validator import Validator
from meshd.node.roles.worker import Worker, WorkerSettings
from meshd.p2p.messages import (
    Assignment,
    LeaseEnd,
    LogBatch,
    LogRequest,
    Message,
    Offer,
    OpenRequest,
    OutputAck,
    Progress,
    RoundClose,
    SettlementRequest,
    TermRequest,
)

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # the stubs that mypy has for trio

ROLES = ("orchestrator", "worker", "validator", "aggregator")

REQUESTS: tuple[type[Message], ...] = (
    Offer,
    Assignment,
    Progress,
    RoundClose,
    LeaseEnd,
    OpenRequest,
    LogBatch,
    LogRequest,
    TermRequest,
    OutputAck,
    SettlementRequest,
    *ENTRY_KINDS,
)
"""What a node answers, if somebody on it takes part in the job."""


@dataclass(frozen=True)
class NodeSettings:
    """Which roles a node plays, and how."""

    roles: frozenset[str] = frozenset()
    worker: WorkerSettings = field(default_factory=WorkerSettings)
    audits_at_once: int = 1


class Node:
    """Any combination of roles; every node can also submit jobs of its own."""

    def __init__(self, ports: Ports, settings: NodeSettings) -> None:
        self.ports = ports
        self.settings = settings
        self.jobs = Jobs(ports)
        self.researcher = Researcher(ports, self.jobs)
        self.worker = Worker(ports, self.jobs, settings.worker)
        self._aggregator = Aggregator(ports, self.jobs)
        self._validator = Validator(ports, self.jobs, audits_at_once=settings.audits_at_once)
        self._orchestrator = Orchestrator(ports, self.jobs, self._aggregator.output)

    async def run(self, *, task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled. A role that fails takes the node down."""
        services = [self.jobs.run, self.researcher.run]
        roles = self.settings.roles
        if roles & {"orchestrator", "aggregator"}:
            services += [self._aggregator.run, self._orchestrator.run]
        if "validator" in roles:
            services.append(self._validator.run)
        if "worker" in roles:
            services.append(self.worker.run)
        async with (
            self.ports.dispatch.serving(self.ports.network, REQUESTS),
            trio.open_nursery() as nursery,
        ):
            for service in services:  # each ready before the next one starts
                await nursery.start(service)
            task_status.started()
