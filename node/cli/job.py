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
    from meshd.node.control.api import JobDetail, JobEvent, JobWhy, ShardCounts, Submitted

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
    _print_submitted(answer, as_json)
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


@job.command(epilog="Example:  meshd job why 0x3f2a")
@job_id
@click.option("--shards", "most", type=click.IntRange(1), default=20, show_default=True)
@daemon_command
def why(job: str, most: int, data_dir: str | None, as_json: bool) -> None:
    """Say why a job is not further.

    For each shard that is not through, who has it and what it waits for; for each node that is
    known, what it does for the job or why it does nothing. --shards says how many are shown.
    """
    answer = client(data_dir).why(job)
    if as_json:
        print_json(answer)
    else:
        _print_why(answer, most)


@job.command(epilog="Example:  meshd job watch 0x3f2a")
@job_id
@daemon_command
def watch(job: str, data_dir: str | None, as_json: bool) -> None:
    """Follow a job until it ends.

    Prints a line for each event, with --json a line of JSON.
    """
    _follow(data_dir, job, as_json)


@job.command(epilog="Example:  meshd job logs 0x3f2a --kind attestation")
@job_id
@click.option("--after", type=click.IntRange(0), default=0, help="Begin after this batch.")
@click.option("--kind", metavar="KIND", help="Only entries of this kind, such as assignment.")
@daemon_command
def logs(job: str, after: int, kind: str | None, data_dir: str | None, as_json: bool) -> None:
    """Print the entries of a job's certified log.

    A line for each, in order: block, batch, kind, who signed it, and what it says. With --json
    a line of JSON for each.
    """
    import json

    from meshd.node.cli.failures import printable

    daemon = client(data_dir)
    place: int | None = after
    while place is not None:
        page = daemon.log(job, place)
        for line in page["lines"]:
            if kind is not None and line["kind"] != kind:
                continue
            if as_json:
                click.echo(json.dumps(line, ensure_ascii=False))
            else:
                name = f"{line['term']}.{line['seq']}"
                text = f"{line['height']:>8}  {name:<8}  {line['kind']:<14}  {line['signer']}"
                click.echo(printable(f"{text}  {line['text']}").rstrip())
        place = page["next"]


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


@job.command(epilog="Example:  meshd job retry 0x3f2a --deadline 2h")
@job_id
@click.option(
    "--deadline",
    metavar="DURATION",
    default="",
    help="Until when it has to be done, such as 2h [default: as long as the first time].",
)
@click.option("--watch", is_flag=True, help="Follow the job until it ends.")
@daemon_command
def retry(job: str, deadline: str, watch: bool, data_dir: str | None, as_json: bool) -> None:
    """Submit a job that failed or was cancelled again.

    The terms are the same but for the deadlines; it is a new job with an escrow of its own.
    """
    answer = client(data_dir).retry(job, deadline)
    _print_submitted(answer, as_json)
    if watch:
        _follow(data_dir, answer["id"], as_json)


@job.command(epilog="Example:  meshd job result 0x3f2a --out embeddings.rows")
@job_id
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where to write it [default: JOB.rows, or JOB.safetensors, here].",
)
@click.option("--part", type=click.IntRange(0), metavar="N", help="Only this shard or round.")
@daemon_command
def result(
    job: str, out: Path | None, part: int | None, data_dir: str | None, as_json: bool
) -> None:
    """Write a job's final output to a file.

    Of inference the rows in order; of training the weights, as safetensors. --part writes one
    shard's rows, or the weights after one round (from 0), while the job still runs.
    """
    daemon = client(data_dir)
    if out is None:
        training = daemon.job(job)["kind"] == "train"
        name = job if part is None else f"{job}.{part}"
        out = Path(f"{name}.{'safetensors' if training else 'rows'}")
    answer = daemon.result(job, out) if part is None else daemon.part(job, part, out)
    if as_json:
        print_json(answer)
    else:
        rows = f"{answer['rows']} rows, " if answer["rows"] else ""
        click.echo(f"wrote {rows}{answer['bytes']} bytes, to {answer['path']}")


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


def _print_submitted(answer: Submitted, as_json: bool) -> None:
    if as_json:
        print_json(answer)
        return
    for warning in answer["warnings"]:
        click.echo(f"meshd: note: {warning}", err=True)
    click.echo(
        f"job {answer['id']} is {answer['state']}: {answer['shards']} shards, "
        f"at most {answer['cap']} MCC, until {_moment(answer['deadline'])}"
    )


def _print_why(answer: JobWhy, most: int) -> None:
    print_pairs({"job": answer["id"], "state": answer["state"], "why": answer["note"]})
    shards = [
        (f"{s['round']}.{s['shard']}", s["attempt"], s["state"], s["worker"] or "-", s["reason"])
        for s in answer["shards"]
    ]
    if shards:
        click.echo()
        print_table(("SHARD", "ATTEMPT", "STATE", "WORKER", "WHY"), shards[:most], "")
        if len(shards) > most:
            click.echo(f"and {len(shards) - most} more: --shards {len(shards)} shows them")
    if answer["nodes"]:
        click.echo()
        nodes = [(n["address"], n["state"], n["reason"]) for n in answer["nodes"]]
        print_table(("NODE", "STATE", "WHY"), nodes, "")


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


def _rounds(answer: JobDetail) -> str:
    rounds = answer["rounds"]
    if rounds is None:
        return ""
    losses = [f"{loss:.4f}" for loss in rounds["losses"] if loss is not None]
    trend = f"; loss {losses[0]}" if losses else ""
    trend += f" to {losses[-1]}" if len(losses) > 1 else ""
    return f"{rounds['done']} of {rounds['total']} closed{trend}"


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
        "rounds": _rounds(answer),
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
