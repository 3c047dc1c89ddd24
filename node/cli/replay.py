"""`meshd replay`: compute a training job again and compare every bit."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import click

from meshd.node.cli.options import client, complete_job_id, daemon_command

if TYPE_CHECKING:
    from meshd.node.control.api import ReplayEvent


@click.command(epilog="Example:  meshd replay 0x3f2a --round 3")
@click.argument("job", metavar="JOB", shell_complete=complete_job_id)
@click.option("--round", "round_", type=click.IntRange(0), help="Only this round, from 0.")
@daemon_command
def replay(job: str, round_: int | None, data_dir: str | None, as_json: bool) -> int:
    """Compute a training job again and compare every bit.

    On the daemon's machine, from terms, log and public blobs alone. Every shard of every closed
    round is trained again, and every round closed again. Exits 0 if all is equal, or differs only
    where audits had found it; else 1. With --json it prints a line of JSON for each shard and
    round.
    """
    result = ""
    for event in client(data_dir).replay(job, round_):
        if as_json:
            click.echo(json.dumps(event, ensure_ascii=False))
        else:
            _print(event)
        result = event["result"]
    return 0 if result == "equal" else 1


def _print(event: ReplayEvent) -> None:
    """Print a line for each round and the end; shards are counted on a terminal only."""
    from meshd.node.cli.failures import printable

    terminal = sys.stdout.isatty()
    text = printable(event["text"])
    if event["event"] != "shard":
        click.echo(f"\r\x1b[K{text}" if terminal else text)
    elif terminal:
        click.echo(f"\r\x1b[K{event['done']} of {event['total']} shards; {text}", nl=False)
