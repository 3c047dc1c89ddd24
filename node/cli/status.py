"""`meshd status` and `meshd peers`: a daemon in one glance."""

from __future__ import annotations

import click

from meshd.node.cli.options import client, daemon_command
from meshd.node.cli.output import print_json, print_pairs, print_table, seconds_text


@click.command(epilog="Example:  meshd status --json | jq .peers")
@daemon_command
def status(data_dir: str | None, as_json: bool) -> None:
    """Show whether the daemon runs and what it does."""
    answer = client(data_dir).status()
    if as_json:
        print_json(answer)
        return
    chain = answer["chain"]
    height = "cannot be reached" if chain["height"] is None else f"block {chain['height']}"
    print_pairs(
        {
            "daemon": f"{answer['version']}, process {answer['pid']}, "
            f"up {seconds_text(answer['uptime_s'])}",
            "network": answer["network"],
            "address": answer["address"],
            "peer id": answer["peer_id"],
            "roles": ", ".join(answer["roles"]) or "none: a client",
            "listens": answer["listen"],
            "peers": answer["peers"],
            "jobs": f"{answer['jobs']} open, {answer['shards']} shards being computed here",
            "chain": f"{chain['chain_id']}, {height}, {chain['rpc']}",
            "warning": answer["warnings"],
        }
    )


@click.command(epilog="Example:  meshd peers --json | jq -r .[].address")
@daemon_command
def peers(data_dir: str | None, as_json: bool) -> None:
    """List the peers that are connected now."""
    answer = client(data_dir).peers()
    if as_json:
        print_json(answer)
        return
    rows = [
        (
            peer["address"],
            ",".join(peer["roles"]) or "-",
            "-" if peer["latency_ms"] is None else f"{peer['latency_ms']:.1f} ms",
            peer["device"] or "-",
            peer["ask"] or "-",
            peer["multiaddrs"][0] if peer["multiaddrs"] else "-",
        )
        for peer in answer
    ]
    print_table(
        ("ADDRESS", "ROLES", "LATENCY", "DEVICE", "ASK", "AT"),
        rows,
        "no peer is connected: are there bootstrap peers in the configuration?",
    )
