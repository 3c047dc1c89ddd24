"""A py-libp2p host as meshd wants it: TCP, Noise and yamux only, guarded, quiet."""

from __future__ import annotations

import logging
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from libp2p import new_host
from libp2p.abc import IHost
from libp2p.crypto.secp256k1 import create_new_key_pair
from libp2p.crypto.x25519 import create_new_key_pair as create_x25519_key_pair
from libp2p.custom_types import TProtocol
from libp2p.host.basic_host import BasicHost
from libp2p.network.config import ConnectionConfig, RetryConfig
from libp2p.network.swarm import Swarm
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import PROTOCOL_ID as YAMUX
from libp2p.transport.tcp.tcp import TCPListener
from multiaddr import Multiaddr  # type: ignore[import-untyped]

from meshd.p2p.identity import Identity
from meshd.p2p.libp2p.guard import (
    BoundedYamux,
    DialGate,
    InboundGate,
    StreamGuard,
    batch_window_updates,
    bound_multiplexing,
    bound_negotiation,
)
from meshd.p2p.limits import Slots, is_public
from meshd.p2p.network import NetworkError


class ListenError(NetworkError):
    """This node cannot listen at an address; the text names it and the cure."""


@dataclass(frozen=True)
class NetworkSettings:
    """How a node takes part; the defaults suit a home machine."""

    lan: bool = False
    """Dial private and loopback addresses, and names, on a peer's word."""
    anchors: Path | None = None
    """File of peers that were good, dialled first after a restart."""
    anchor_after_s: float = 30.0
    """A peer that was dialled becomes an anchor when it has stayed for this long."""
    target_peers: int = 12
    """Peers that the connector holds by dialling; 6 to 12 keep gossip whole."""
    max_connections: int = 128
    """Connections in all; an eighth of them is kept for outbound ones."""
    handshakes_per_address: int = 8
    """Handshakes in progress from one address (64 from one network around it)."""
    ping_interval_s: float = 5.0
    """A peer that leaves two pings unanswered for this long each has departed."""
    handler_deadline_s: float = 120.0
    """A request's handler is cancelled after this long."""
    gossip_rate: float = 400.0
    """Messages a second and topic accepted from one peer."""
    wall: Callable[[], float] = time.time
    """Returns Unix seconds, for expiry."""


def quiet_library() -> None:
    """Silence py-libp2p, which logs each failed stream in six ERROR lines; meshd counts.

    Some of its loggers set a level of their own, and parts of it log through the root logger:
    a filter there drops what comes from its files.
    """
    for name in ("libp2p", *logging.root.manager.loggerDict):
        if name == "libp2p" or name.startswith("libp2p."):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    root = logging.getLogger()
    if _not_from_libp2p not in root.filters:
        root.addFilter(_not_from_libp2p)


def _not_from_libp2p(record: logging.LogRecord) -> bool:
    return "/site-packages/libp2p/" not in record.pathname


def make_host(identity: Identity, settings: NetworkSettings, stats: Counter[str]) -> IHost:
    """Return a guarded host of *identity* that does not listen yet."""
    quiet_library()
    bound_negotiation()
    bound_multiplexing()
    batch_window_updates()
    keys = create_new_key_pair(identity.secret)
    noise = NoiseTransport(keys, noise_privkey=create_x25519_key_pair().private_key)
    config = ConnectionConfig(
        max_connections=settings.max_connections,
        min_connections=0,
        low_watermark=0,
        high_watermark=settings.max_connections,
        dial_timeout=5.0,
        inbound_upgrade_timeout=10.0,
        outbound_upgrade_timeout=10.0,
    )
    host = new_host(
        key_pair=keys,
        sec_opt={NOISE: noise},
        muxer_opt={TProtocol(YAMUX): BoundedYamux},
        connection_config=config,
        disable_identify_address_discovery=True,
    )
    network = cast(Swarm, host.get_network())
    network.retry_config = RetryConfig(max_retries=0)
    network.set_resource_manager(None)  # its limits are replaced by the guard's
    # The library's own connector dials whatever address it hears of; meshd's replaces it.
    vars(network.auto_connector).update(maybe_connect=_stay_idle, run_background_task=_stay_idle)
    StreamGuard(network, stats)
    slots = Slots(
        total=settings.max_connections,
        per_address=settings.handshakes_per_address,
        per_network=64,
    )
    reserved = max(1, settings.max_connections // 8)
    InboundGate(network, stats, slots, established=settings.max_connections - reserved)
    network.connection_gate = DialGate(  # type: ignore[assignment]
        lambda address: settings.lan or _public_tcp(address), stats
    )
    return host


async def _stay_idle(*_: object) -> None:
    return


def _public_tcp(address: str) -> bool:
    parts = address.split("/")
    return len(parts) > 2 and parts[1] in ("ip4", "ip6") and is_public(parts[2])


def check_free(listen: Sequence[str]) -> None:
    """Raise ListenError for an address of *listen* that is malformed or in use.

    The library listens with SO_REUSEPORT, with which two daemons share a port in silence.
    """
    for text in listen:
        parts = text.split("/")
        try:
            family = {"ip4": socket.AF_INET, "ip6": socket.AF_INET6}[parts[1]]
            if len(parts) != 5 or parts[3] != "tcp":
                raise ValueError(text)
            host, port = parts[2], int(parts[4])
        except (KeyError, IndexError, ValueError) as error:
            raise ListenError(
                f"cannot listen at {text!r}: write it as /ip4/0.0.0.0/tcp/4001"
            ) from error
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            try:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
            except OSError as error:
                raise ListenError(
                    f"cannot listen at {text}: {error.strerror}; "
                    "choose another port or stop the program that uses this one"
                ) from error


def listen_at(host: IHost, listen: Sequence[str]) -> AbstractAsyncContextManager[None]:
    """Return a context in which *host* runs and listens; raises ListenError at once."""
    check_free(listen)
    assert isinstance(host, BasicHost)
    return host.run([Multiaddr(text) for text in listen])


async def stop_listening(host: IHost) -> None:
    """Close the listening sockets of *host*, which the library leaves open when it stops."""
    listeners = cast(Swarm, host.get_network()).listeners
    for listener in [cast(TCPListener, value) for value in listeners.values()]:
        # Taken out first: the library asks them for their addresses with every message.
        sockets = tuple(listener.listeners)
        listener.listeners.clear()
        await listener.close()
        for taken in sockets:
            await taken.aclose()
    listeners.clear()
