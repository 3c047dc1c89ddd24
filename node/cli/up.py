"""`meshd up`: run the daemon in the foreground."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from meshd.node.cli.options import data_dir_option, find_data_dir

if TYPE_CHECKING:
    from meshd.config.schema import Config


def config_options(function: Any) -> Any:
    """Give a command the options that say how a daemon is configured."""
    for option in reversed(
        (
            click.option("--config", "file", metavar="FILE", help="The configuration, TOML."),
            click.option("--preset", metavar="NAME", help="home, orchestrator or validator."),
            data_dir_option,
            click.option("--ephemeral", is_flag=True, help="Keep everything in memory."),
            click.option(
                "--roles", metavar="LIST", help="Such as worker or orchestrator,aggregator."
            ),
            click.option("--listen", metavar="ADDR", help="Such as /ip4/127.0.0.1/tcp/4001."),
            click.option(
                "--bootstrap", metavar="LIST", help="Peers to dial first, with /p2p/PEER."
            ),
            click.option("--rpc", metavar="URL", help="The chain's JSON-RPC."),
            click.option("--deployment", metavar="FILE", help="What `meshd chain deploy` wrote."),
            click.option(
                "--set",
                "assignments",
                metavar="KEY=VALUE",
                multiple=True,
                help="Any key of the configuration; may be repeated.",
            ),
        )
    ):
        function = option(function)
    return function


def configure(
    *,
    file: str | None,
    preset: str | None,
    data_dir: str | None,
    ephemeral: bool,
    assignments: tuple[str, ...],
    roles: str | None = None,
    listen: str | None = None,
    bootstrap: str | None = None,
    rpc: str | None = None,
    deployment: str | None = None,
) -> Config:
    """Return the configuration that the options, the environment and the file describe."""
    from meshd.config.paths import config_file, read_text
    from meshd.config.schema import resolve

    path = config_file(file, os.environ)
    text = read_text(path, "configuration") if path is not None else None
    flags: dict[str, Any] = {
        "roles": roles,
        "listen": listen,
        "bootstrap": bootstrap,
        "chain.rpc": rpc,
        "chain.deployment": deployment,
    }
    flags = {key: value for key, value in flags.items() if value is not None}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise click.UsageError(f"--set {assignment!r} has no '=': write --set KEY=VALUE")
        flags[key.strip()] = value.strip()
    environ = dict(os.environ)
    if ephemeral:
        if data_dir:
            raise click.UsageError("--ephemeral keeps nothing: leave out --data-dir")
        flags["data_dir"] = None
    elif "data_dir" not in flags:
        flags["data_dir"] = find_data_dir(data_dir, file)
    return resolve(text, environ, flags, preset=preset, source=str(path or "configuration"))


@click.command(
    epilog="\b\nExamples:\n"
    "  meshd up --preset home --deployment deployment.json\n"
    "  meshd up --roles validator --set log.level=debug",
)
@config_options
def up(**options: Any) -> None:
    """Run a daemon on this machine, in the foreground.

    It makes its key on the first start, joins the swarm and works until it is stopped with
    ctrl-C or SIGTERM. Values come from the presets, the configuration file, the environment
    (MESHD_...) and the options, the later ones winning; see docs/configuration.md.
    """
    config = configure(**options)
    for warning in config.warnings:
        click.echo(f"meshd: warning: {warning}", err=True)
    if config.data_dir is not None:
        _refuse_wide_key(config.data_dir)
    _load_daemon().main(config)
    sys.stdout.flush()


def _load_daemon() -> Any:
    """Import the daemon without rich, which structlog would load to draw tracebacks: 3 MB."""
    sys.modules.setdefault("rich", None)  # type: ignore[arg-type]
    try:
        return importlib.import_module("meshd.node.daemon")
    finally:
        if sys.modules["rich"] is None:
            del sys.modules["rich"]


def _refuse_wide_key(data_dir: Path) -> None:
    """Raise IdentityError before anything is started if the key file may not be used."""
    from meshd.config.paths import KEY
    from meshd.p2p.identity import load_or_create

    if (data_dir / KEY).exists():
        load_or_create(data_dir / KEY)
