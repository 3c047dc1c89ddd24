"""The embedded chain as a process: a block at every tick, and RPC on loopback."""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
import trio

from meshd.ledger.devchain.chain import CHAIN_ID, Devchain, Genesis
from meshd.ledger.devchain.errors import DevchainError
from meshd.ledger.devchain.http import HttpServer
from meshd.ledger.devchain.methods import NOTICE
from meshd.ledger.devchain.rpc import answer
from meshd.p2p.identity import Address

if TYPE_CHECKING:
    from trio_typing import TaskStatus  # the stubs that mypy has for trio

_BUSY_SHARE = 0.8
"""Share of the block time that executing transactions may take."""
_CLOCK_WARNING_SECONDS = 5.0

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class DevchainConfig:
    """Everything that an embedded chain is started with; balances in wei, times in seconds."""

    path: Path
    accounts: Mapping[Address, int]
    host: str = "127.0.0.1"
    port: int = 8545
    chain_id: int = CHAIN_ID
    block_time: float = 1.0


async def run(
    config: DevchainConfig, *, task_status: TaskStatus[int] = trio.TASK_STATUS_IGNORED
) -> None:
    """Run the chain that *config* describes until cancelled; see `serve`."""
    await serve(
        config.path,
        accounts=config.accounts,
        host=config.host,
        port=config.port,
        chain_id=config.chain_id,
        block_time=config.block_time,
        task_status=task_status,
    )


async def serve(
    path: Path,
    *,
    accounts: Mapping[Address, int],
    host: str = "127.0.0.1",
    port: int = 0,
    chain_id: int = CHAIN_ID,
    block_time: float = 1.0,
    clock: Callable[[], float] = time.time,
    task_status: TaskStatus[int] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run the chain in the file *path* until cancelled.

    A new chain begins with *accounts* (wei); an old one must have begun with the same. A block
    comes every *block_time* seconds by trio's clock; *clock* tells Unix time for the timestamps.
    Port 0 means any. Starts with the port that it listens on.

    Raises DevchainError if *host* is not loopback, the port is taken or the file cannot be used.
    """
    _check_loopback(host)
    chain = Devchain(path, Genesis(chain_id, accounts), clock=clock)
    try:
        listeners = await _open_listeners(host, port)
        async with trio.open_nursery() as nursery:
            server = HttpServer(partial(answer, chain))
            bound_port = int(listeners[0].socket.getsockname()[1])
            nursery.start_soon(partial(trio.serve_listeners, server.serve_connection, listeners))
            nursery.start_soon(_produce_blocks, chain, block_time)
            _log.warning(
                "devchain.started",
                notice=NOTICE,
                url=f"http://{host}:{bound_port}",
                chain_id=chain_id,
                height=chain.head.block_number,
                waiting=len(chain.pool),
            )
            task_status.started(bound_port)
    finally:
        chain.close()


async def _produce_blocks(chain: Devchain, block_time: float) -> None:
    due = trio.current_time()
    while True:
        due = max(due + block_time, trio.current_time())
        await trio.sleep_until(due)
        has_warned = False
        while early := chain.seconds_too_early():
            if early > _CLOCK_WARNING_SECONDS and not has_warned:
                _log.warning("devchain.clock_is_behind", seconds=round(early, 1))
                has_warned = True
            await trio.sleep(min(early, block_time))
        await chain.produce_block(budget=_BUSY_SHARE * block_time)


async def _open_listeners(host: str, port: int) -> Sequence[trio.SocketListener]:
    try:
        return await trio.open_tcp_listeners(port, host=host)
    except OSError as error:
        raise DevchainError(
            f"cannot listen on {host}:{port}: {error}; choose another port"
        ) from error


def _check_loopback(host: str) -> None:
    try:
        is_loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise DevchainError(f"host {host} is not this machine: the chain serves loopback only")
