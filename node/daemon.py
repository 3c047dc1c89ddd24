"""The composition root: builds a daemon from its configuration and runs it."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import logging
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TextIO, cast

import structlog
import trio

from meshd.config.deployment import deployment_of
from meshd.config.paths import KEY, SOCKET
from meshd.config.schema import Config, LogConfig
from meshd.ledger.beacon import BlockHashBeacon
from meshd.ledger.evm_chain import EvmChain
from meshd.ledger.patient import PatientChain
from meshd.node.availability import Availability
from meshd.node.compute.executor import Executor
from meshd.node.compute.forkserver import open_forkserver
from meshd.node.control.server import serve as serve_control
from meshd.node.control.socket import data_directory_lock
from meshd.node.desk import PAUSED, Desk
from meshd.node.node import Node, NodeSettings
from meshd.node.notify import READY, STOPPING, keep_telling, notify
from meshd.node.ports import Dispatch, Ports
from meshd.node.roles.worker import WorkerSettings
from meshd.node.store import VERSION, Store
from meshd.p2p.blobs import BlobStore
from meshd.p2p.identity import Address, Identity, hex_address, load_or_create
from meshd.p2p.libp2p import Libp2pNetwork, NetworkSettings, open_network
from meshd.p2p.messages import Capability

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # the stubs that mypy has for trio

log = structlog.get_logger()

CAPABILITY_LIFE_S = 600
"""A capability record is good for so long and renewed at half of it."""
ANCHORS = "anchors.json"
BLOBS = "blobs"
DATABASE = "meshd.sqlite3"

Wrap = Callable[[Executor], Executor]
"""Puts something between the roles and the executor (the demo's cheater)."""


class DaemonFailed(Exception):
    """A role or service failed after the daemon was ready; its log has the traceback."""


def main(config: Config, wrap_executor: Wrap | None = None) -> None:
    """Run a daemon in the foreground until SIGTERM or ctrl-C.

    Raises ConfigError, IdentityError, StoreError, NetworkError, ChainError and ControlError for
    what keeps it from starting, DaemonFailed for whatever ends it after that.
    """
    set_up_logs(config.log)
    try:
        trio.run(_run_until_told, config, wrap_executor)
    except BaseExceptionGroup as group:
        raise _only(group) from group


def _only(error: BaseException) -> BaseException:
    """Return what a group of one holds; a group of several stays one."""
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    return error


async def _run_until_told(config: Config, wrap_executor: Wrap | None) -> None:
    is_ready = False
    availability = Availability()
    try:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_end_on_signal, signals, availability, nursery.cancel_scope)
                await nursery.start(run, config, wrap_executor, availability)
                is_ready = True
                notify(READY)
    except Exception as error:  # the outermost edge of every role and service
        if not is_ready:
            raise
        first = _only(error)
        log.critical("daemon failed", exc_info=error)
        raise DaemonFailed(
            f"the daemon failed: {type(first).__name__}: {first}: its log has the traceback"
        ) from error


async def _end_on_signal(signals: Any, availability: Availability, scope: trio.CancelScope) -> None:
    """End at the first signal, handing back what was taken on; at the second one at once."""
    number = await anext(signals)
    log.info("stopping", signal=signal.Signals(number).name)
    notify(STOPPING, "STATUS=handing leases back")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_cancel_at_next, signals, scope)
        await availability.leave()
        nursery.cancel_scope.cancel()
    scope.cancel()


async def _cancel_at_next(signals: Any, scope: trio.CancelScope) -> None:
    async for number in signals:
        log.info("stopping at once", signal=signal.Signals(number).name)
        scope.cancel()


async def run(
    config: Config,
    wrap_executor: Wrap | None = None,
    availability: Availability | None = None,
    *,
    task_status: TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Build the daemon and run it until cancelled; started when it is ready."""
    async with AsyncExitStack() as stack:
        if config.data_dir is not None:
            stack.enter_context(data_directory_lock(config.data_dir))
        directory = config.data_dir
        identity = load_or_create(directory / KEY) if directory else Identity.generate()
        store = Store(directory / DATABASE if directory else None)
        stack.callback(store.close)
        if store.upgraded_from is not None:
            log.info("database upgraded", before=store.upgraded_from, now=VERSION)
        blobs = BlobStore(directory / BLOBS if directory else None)
        nursery = await stack.enter_async_context(trio.open_nursery())
        chain = EvmChain(
            config.chain.rpc,
            deployment_of(config.chain),
            identity,
            store,
            network=config.network,
        )
        await nursery.start(chain.run)
        network = await stack.enter_async_context(_network(config, identity, chain, blobs))
        executor: Executor = await stack.enter_async_context(open_forkserver())
        if wrap_executor is not None:
            executor = wrap_executor(executor)
        ports = _ports(config, identity, chain, network, store, blobs, executor)
        if availability is not None:
            ports = replace(ports, availability=availability)
        if await store.setting(PAUSED):
            ports.availability.pause()
        node = Node(ports, _settings(config))
        await nursery.start(node.run)
        nursery.start_soon(_advertise, config, ports, network)
        if directory is not None:
            desk = Desk(node, network, chain, config, trio.current_time())
            await nursery.start(serve_control, desk, directory / SOCKET)
        nursery.start_soon(keep_telling, partial(_status_line, node, network))
        _give_memory_back()
        log.info(
            "ready",
            address=hex_address(identity.address),
            roles=",".join(config.roles) or "none",
            listen=" ".join(network.multiaddrs),
            paused=ports.availability.paused,
        )
        task_status.started()
        await trio.sleep_forever()


@asynccontextmanager
async def _network(
    config: Config, identity: Identity, chain: EvmChain, blobs: BlobStore
) -> AsyncIterator[Libp2pNetwork]:
    anchors = config.data_dir / ANCHORS if config.data_dir else None
    settings = NetworkSettings(lan=not config.allow_public, anchors=anchors)
    async with open_network(
        identity,
        chain.domain,
        blobs,
        listen=config.listen,
        bootstrap=config.bootstrap,
        settings=settings,
    ) as network:
        yield network


def _ports(
    config: Config,
    identity: Identity,
    chain: EvmChain,
    network: Libp2pNetwork,
    store: Store,
    blobs: BlobStore,
    executor: Executor,
) -> Ports:
    patient = PatientChain(chain)
    return Ports(
        identity=identity,
        network=network,
        chain=patient,
        beacon=BlockHashBeacon(patient),
        store=store,
        blobs=blobs,
        executor=executor,
        dispatch=Dispatch(),
        payee=Address(config.payout) if config.payout else identity.address,
        wall=time.time,
    )


def _settings(config: Config) -> NodeSettings:
    worker = WorkerSettings(
        slots=config.worker.slots,
        ask=config.ask,
        memory_bytes=config.worker.memory,
        device=config.worker.device,
    )
    return NodeSettings(frozenset(config.roles), worker)


async def _advertise(config: Config, ports: Ports, network: Libp2pNetwork) -> None:
    """Keep this node's signed capability where others find it."""
    issued = 0
    while True:
        changes = ports.availability.changes
        issued = max(int(ports.wall()), issued + 1)  # of two in one second others keep the first
        resting = set() if ports.availability.open else {"worker"}
        capability = Capability(
            roles=tuple(sorted(set(config.roles) - resting)),
            addresses=network.multiaddrs,
            device=config.worker.device,
            memory_bytes=config.worker.memory,
            units_per_second=await _measured_speed(config, ports),
            ask=config.ask,
            issued=issued,
        )
        signed = ports.domain.sign(ports.identity, capability, expires=issued + CAPABILITY_LIFE_S)
        await network.advertise(signed)
        await ports.availability.changed(CAPABILITY_LIFE_S / 2, changes)


async def _status_line(node: Node, network: Libp2pNetwork) -> str:
    """Return what the service manager shows; the database is asked, so it must answer."""
    paused = await node.ports.store.setting(PAUSED)
    shards = len(node.worker.running)
    return f"{len(network.peers())} peers, {shards} shards{', paused' if paused else ''}"


async def _measured_speed(config: Config, ports: Ports) -> int:
    """Return this machine's compute units a second as last measured; 0: not yet."""
    return int(await ports.store.setting("units_per_second") or 0)


def _give_memory_back() -> None:
    """Return what importing and starting needed and running does not (glibc keeps it else)."""
    gc.collect()
    gc.freeze()  # what lives now stays for ever: later collections need not look at it
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class _StandardError:
    """Standard error, but what cannot be written is lost: a full disk must not end a daemon."""

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            sys.stderr.flush()


def set_up_logs(config: LogConfig) -> None:
    """Write events with key=value fields to standard error: for people, or as JSON."""
    human = config.format == "human" or (config.format == "auto" and sys.stderr.isatty())
    renderer: Any = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if human
        else structlog.processors.JSONRenderer()
    )
    level = getattr(logging, config.level.upper())
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(level),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _StandardError())),
    )
