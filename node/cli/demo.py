"""`meshd demo`: a whole swarm on this machine."""

from __future__ import annotations

import importlib
from pathlib import Path

import click

from meshd.node.demo.options import JOBS, DemoOptions


@click.command(epilog="Example:  meshd demo --json demo.json --seed 7")
@click.option(
    "--jobs",
    default=",".join(JOBS),
    show_default=True,
    help="Kinds of job, with commas; one begins when the work of the one before is done.",
)
@click.option(
    "--workers",
    type=click.IntRange(3, 32),
    default=4,
    show_default=True,
    help="Worker processes; one of them cheats and one is killed.",
)
@click.option(
    "--validators",
    type=click.IntRange(1, 21),
    default=3,
    show_default=True,
    help="Validator processes; with less than 7 you trust their quorum.",
)
@click.option("--keep", is_flag=True, help="Keep the data directories and logs.")
@click.option(
    "--seed", type=click.IntRange(0), default=0, show_default=True, help="Chooses who fails."
)
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the report as JSON too.",
)
@click.option(
    "--out",
    metavar="DIR",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("demo-out"),
    show_default=True,
    help="Where the outputs go.",
)
@click.pass_context
def demo(
    ctx: click.Context,
    jobs: str,
    workers: int,
    validators: int,
    keep: bool,
    seed: int,
    json_file: Path | None,
    out: Path,
) -> None:
    """Run a whole swarm on this machine.

    Every participant is a process of its own, with an embedded chain and a cheater among them.
    The workers embed real sentences, then train a small language model. One worker invents
    results and leaves out steps, one is killed. The end shows who did what, what was found, and
    where the money went. Exits 0 only if everything adds up.
    """
    kinds = tuple(dict.fromkeys(kind.strip() for kind in jobs.split(",") if kind.strip()))
    unknown = [kind for kind in kinds if kind not in JOBS]
    if unknown or not kinds:
        named = unknown[0] if unknown else jobs
        raise click.UsageError(f"--jobs {named!r} is unknown: use one of {', '.join(JOBS)}")
    options = DemoOptions(kinds, workers, validators, keep, seed, json_file, out)
    ctx.exit(importlib.import_module("meshd.node.demo").main(options))
