"""`meshd status`, `peers`, `pause` and `resume`: a daemon in one glance, and its switch."""

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
            "paused": "takes no new shards: `meshd resume`" if answer["paused"] else "",
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


@click.command(epilog="Example:  meshd pause")
@daemon_command
def pause(data_dir: str | None, as_json: bool) -> None:
    """Take no new shards until `meshd resume`.

    The shards it has are finished and paid. It stays paused when the daemon is started again;
    its other roles go on.
    """
    answer = client(data_dir).pause()
    if as_json:
        print_json(answer)
    else:
        left = answer["shards"]
        rest = f"; it finishes {left} {'shard' if left == 1 else 'shards'}" if left else ""
        click.echo(f"paused: the daemon takes no new shards{rest}")


@click.command(epilog="Example:  meshd resume")
@daemon_command
def resume(data_dir: str | None, as_json: bool) -> None:
    """Take shards again after `meshd pause`."""
    answer = client(data_dir).resume()
    if as_json:
        print_json(answer)
    else:
        works = "takes shards again" if "worker" in answer["roles"] else "has no worker role"
        click.echo(f"resumed: the daemon {works}")
