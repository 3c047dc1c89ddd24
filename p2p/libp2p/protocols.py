"""The libp2p protocol ids and the topic of the adapter itself; each names the network."""

from __future__ import annotations

from libp2p.custom_types import TProtocol

from meshd.p2p.messages import PROTOCOL


def requests_protocol(network: str) -> TProtocol:
    """Return the id of requests: a frame each way, the answer after a status byte."""
    return TProtocol(f"/meshd/{network}/msg/{PROTOCOL}")


def blobs_protocol(network: str) -> TProtocol:
    """Return the id of blobs: digest and offset there, size and bytes back."""
    return TProtocol(f"/meshd/{network}/blob/{PROTOCOL}")


def ping_protocol(network: str) -> TProtocol:
    """Return the id of pings: eight bytes, echoed, as often as wanted."""
    return TProtocol(f"/meshd/{network}/ping/{PROTOCOL}")


def exchange_protocol(network: str) -> TProtocol:
    """Return the id of the exchange of capability records, both ways."""
    return TProtocol(f"/meshd/{network}/capabilities/{PROTOCOL}")


def capabilities_topic(network: str) -> str:
    """Return the topic on which fresh capability records are gossiped."""
    return f"/meshd/{network}/capabilities/{PROTOCOL}"


def dht_namespace(network: str) -> str:
    """Return the namespace of capability records in the DHT: ``/meshd-NETWORK/ADDRESS``."""
    return f"meshd-{network}"
