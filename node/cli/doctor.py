"""`meshd doctor`: what keeps a daemon on this machine from working, and the cure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from meshd.node.cli.options import as_json, find_data_dir
from meshd.node.cli.output import print_json
from meshd.node.cli.up import config_options, configure

if TYPE_CHECKING:
    from meshd.config.schema import Config
    from meshd.node.cli.checkup import Finding

_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


@click.command(epilog="Example:  meshd doctor --config node.toml")
@config_options
@as_json
def doctor(as_json: bool, **options: Any) -> int:
    """Check everything that a daemon with these options needs.

    The configuration, its key and database, disk, torch, the chain and its contracts, the clock,
    the addresses to listen on, the bootstrap peers. A line for each: ok, warn or fail, and what
    to do. Exits 1 if a check fails.
    """
    findings = []
    for finding in _findings(options):
        findings.append(finding)
        if not as_json:
            _print(finding)
    counts = {state: sum(f.state == state for f in findings) for state in _COLOURS}
    if as_json:
        lines = [
            {"check": f.check, "state": f.state, "text": f.text, "cure": f.cure} for f in findings
        ]
        print_json({"ok": not counts["fail"], **counts, "checks": lines})
    else:
        click.echo(f"{counts['ok']} ok, {counts['warn']} to note, {counts['fail']} failed")
    return 1 if counts["fail"] else 0


def _findings(options: dict[str, Any]) -> Iterator[Finding]:
    from meshd.config.errors import ConfigError
    from meshd.node.cli.checkup import Finding, check_data_dir, check_user

    yield from check_user()
    try:
        config = configure(**options)
    except ConfigError as error:
        for line in str(error).splitlines():
            yield Finding("configuration", "fail", line)
        yield from check_data_dir(find_data_dir(options["data_dir"], options["file"]))
        return
    roles = ", ".join(config.roles) or "none, a client"
    yield Finding("configuration", "ok", f"network {config.network}, roles: {roles}")
    yield from _of_config(config)


def _of_config(config: Config) -> Iterator[Finding]:
    from meshd.config.deployment import deployment_of
    from meshd.config.errors import ConfigError
    from meshd.node.cli import chaincheck, checkup
    from meshd.node.client import connect
    from meshd.node.control.api import ControlError

    account = None
    runs = False
    if config.data_dir is not None:
        for finding in checkup.check_data_dir(config.data_dir):
            if finding.check == "key" and finding.state == "ok" and "0x" in finding.text:
                account = finding.text.split()[1].rstrip(",")
            yield finding
        try:
            status: Any = connect(config.data_dir, timeout_s=5).status()
            runs = True
        except ControlError as error:
            status = error
        yield from checkup.check_daemon(status)
    yield from checkup.check_torch(config.roles)
    try:
        deployment = deployment_of(config.chain)
    except ConfigError as error:
        yield checkup.Finding("contracts", "fail", str(error))
    else:
        yield from chaincheck.check_chain(config.chain.rpc, deployment, account)
    yield from checkup.check_listening(config, runs=runs)
    yield from checkup.check_bootstrap(config)


def _print(finding: Finding) -> None:
    from meshd.node.cli.failures import printable

    mark = click.style(f"{finding.state:<4}", fg=_COLOURS[finding.state])
    text = f"{finding.check}: {finding.text}"
    if finding.cure:
        text += f": {finding.cure}" if finding.state != "ok" else ""
    click.echo(f"{mark}  {printable(text)}")
