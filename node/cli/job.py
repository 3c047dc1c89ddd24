"""`meshd job`: submit jobs and follow them to their results and receipts."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from meshd.node.cli.lazy import LazyGroup
from meshd.node.cli.options import client, complete_job_id, daemon_command
from meshd.node.cli.output import print_json, print_pairs, print_table, seconds_text

if TYPE_CHECKING:
    from meshd.node.control.api import JobDetail, JobEvent, ShardCounts

job_id = click.argument("job", metavar="JOB", shell_complete=complete_job_id)


@click.group(
    cls=LazyGroup, epilog="JOB is a job's id, or the beginning of it that no other job has."
)
def job() -> None:
    """Submit jobs, follow them, fetch what they computed."""


@job.command(epilog="Example:  meshd job submit job.toml --watch")
@click.argument("file", metavar="JOB.toml", type=click.Path(path_type=Path))
@click.option("--watch", is_flag=True, help="Follow the job until it ends.")
@daemon_command
def submit(file: Path, watch: bool, data_dir: str | None, as_json: bool) -> None:
    """Submit the job that JOB.toml describes.

    Opens its escrow and announces it; everything is checked before anything is spent. The keys
    are in docs/configuration.md.
    """
    daemon = client(data_dir)
    answer = daemon.submit(file)
    if as_json:
        print_json(answer)
    else:
        for warning in answer["warnings"]:
            click.echo(f"meshd: note: {warning}", err=True)
        click.echo(
            f"job {answer['id']} is {answer['state']}: {answer['shards']} shards, "
            f"at most {answer['cap']} MCC, until {_moment(answer['deadline'])}"
        )
    if watch:
        _follow(data_dir, answer["id"], as_json)


@job.command("ls", epilog="Example:  meshd job ls --json | jq -r '.[] | .id + \" \" + .state'")
@daemon_command
def list_jobs(data_dir: str | None, as_json: bool) -> None:
    """List the jobs submitted through this daemon, newest first."""
    answer = client(data_dir).jobs()
    if as_json:
        print_json(answer)
        return
    rows = [
        (
            found["id"][:18],
            found["kind"],
            found["state"],
            f"{found['shards']['accepted']}/{found['shards']['total']}",
            found["cap"],
            seconds_text(found["seconds"]),
            found["note"],
        )
        for found in answer
    ]
    print_table(
        ("JOB", "KIND", "STATE", "SHARDS", "CAP (MCC)", "TIME", "NOTE"),
        rows,
        "no jobs: `meshd job submit JOB.toml` announces one",
    )


@job.command(epilog="Example:  meshd job show 0x3f2a")
@job_id
@daemon_command
def show(job: str, data_dir: str | None, as_json: bool) -> None:
    """Show everything that is known of a job.

    Its state, shards, committee, workers, escrow and settlements.
    """
    answer = client(data_dir).job(job)
    if as_json:
        print_json(answer)
        return
    print_pairs(_described(answer))
    if answer["workers"]:
        click.echo()
        rows = [
            (w["account"], w["accepted"], w["rejected"], w["leases"]) for w in answer["workers"]
        ]
        print_table(("WORKER", "ACCEPTED", "REJECTED", "LEASES"), rows, "")


@job.command(epilog="Example:  meshd job watch 0x3f2a")
@job_id
@daemon_command
def watch(job: str, data_dir: str | None, as_json: bool) -> None:
    """Follow a job until it ends.

    Prints a line for each event, with --json a line of JSON.
    """
    _follow(data_dir, job, as_json)


@job.command(epilog="Example:  meshd job cancel 0x3f2a")
@job_id
@daemon_command
def cancel(job: str, data_dir: str | None, as_json: bool) -> None:
    """Take a job back, or stop it.

    Before its start the escrow comes back, less the burnt hundredth; after it what passed its
    audit is paid and the rest comes back.
    """
    answer = client(data_dir).cancel(job)
    if as_json:
        print_json(answer)
    else:
        click.echo(f"job {answer['id']} is {answer['state']}")


@job.command(epilog="Example:  meshd job result 0x3f2a --out embeddings.rows")
@job_id
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where to write it [default: JOB.rows here].",
)
@daemon_command
def result(job: str, out: Path | None, data_dir: str | None, as_json: bool) -> None:
    """Write a job's final output, rows in order, to a file."""
    answer = client(data_dir).result(job, out or Path(f"{job}.rows"))
    if as_json:
        print_json(answer)
    else:
        click.echo(f"wrote {answer['rows']} rows, {answer['bytes']} bytes, to {answer['path']}")


@job.command(epilog="Example:  meshd job receipts 0x3f2a --json | jq length")
@job_id
@daemon_command
def receipts(job: str, data_dir: str | None, as_json: bool) -> None:
    """List a job's receipts.

    A receipt is an accepted contribution of any kind and what it is paid.
    """
    answer = client(data_dir).receipts(job)
    if as_json:
        print_json(answer)
        return
    rows = [
        (r["kind"], r["shard"], r["attempt"], r["account"], r["units"], r["charged"], r["amount"])
        for r in answer
    ]
    print_table(
        ("KIND", "SHARD", "ATTEMPT", "ACCOUNT", "UNITS", "CHARGED", "AMOUNT (MCC)"),
        rows,
        "no receipts yet",
    )


def _follow(data_dir: str | None, name: str, as_json: bool) -> None:
    import json

    last: JobEvent | None = None
    for event in client(data_dir).watch(name):
        if as_json:
            click.echo(json.dumps(event, ensure_ascii=False))
        else:
            _print_event(event)
        last = event
    if last is not None and last["state"] == "failed":
        from meshd.node.control.api import ControlError

        raise ControlError("failed", "the job failed", "`meshd job show` says why")


def _print_event(event: JobEvent) -> None:
    from meshd.node.cli.failures import printable

    at = datetime.fromtimestamp(event["time"]).strftime("%H:%M:%S")
    click.echo(f"{at}  {_counts(event['shards']):<24}  {printable(event['text'])}")


def _counts(shards: ShardCounts) -> str:
    parts = [f"{shards['accepted']}/{shards['total']}"]
    parts += [f"{shards['rejected']} rejected"] if shards["rejected"] else []
    parts += [f"{shards['reissued']} re-issued"] if shards["reissued"] else []
    return ", ".join(parts)


def _moment(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _described(answer: JobDetail) -> dict[str, object]:
    escrow = answer["escrow"]
    committee = f"{len(answer['committee'])}, quorum {answer['quorum']}"
    if answer["committee"] and len(answer["committee"]) < 7:
        committee += " (small committee: you trust its quorum)"
    return {
        "job": answer["id"],
        "state": answer["state"],
        "note": answer["note"],
        "kind": f"{answer['kind']}, {answer['rows']} rows",
        "shards": _counts(answer["shards"]),
        "researcher": answer["researcher"],
        "orchestrator": answer["orchestrator"],
        "committee": committee if answer["committee"] else "not drawn yet",
        "log": f"term {answer['term']}, certified up to {answer['certified_seq']}",
        "price": f"{answer['price']} MCC per 10^9 compute units",
        "cap": f"{answer['cap']} MCC",
        "escrow": f"{escrow['deposited']} deposited = {escrow['burnt']} burnt + "
        f"{escrow['paid']} paid + {escrow['refunded']} refunded + the rest",
        "deadline": _moment(answer["deadline"]),
        "time": seconds_text(answer["seconds"]),
        "program": answer["program"],
        "data": answer["data"],
        "output": answer["output"],
        "anchor": [f"epoch {a['epoch']}: {a['total']} MCC, {a['tx']}" for a in answer["anchors"]],
    }
