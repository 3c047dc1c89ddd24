"""`meshd config`: check the configuration, or show what it amounts to."""

from __future__ import annotations

import json
from typing import Any

import click

from meshd.node.cli.lazy import LazyGroup
from meshd.node.cli.options import as_json
from meshd.node.cli.output import print_json
from meshd.node.cli.up import config_options, configure


@click.group(cls=LazyGroup)
def config() -> None:
    """Check or show the configuration of `meshd up`."""


@config.command(epilog="Example:  meshd config check --config node.toml")
@config_options
@as_json
def check(as_json: bool, **options: Any) -> None:
    """Check the configuration.

    Every wrong key is named, with its value and the cure. The file with the contracts'
    addresses is read too; nobody is contacted.
    """
    from meshd.config.deployment import deployment_of

    resolved = configure(**options)
    chain_id = deployment_of(resolved.chain).chain_id
    if as_json:
        print_json({"ok": True, "warnings": list(resolved.warnings), "chain_id": chain_id})
        return
    for warning in resolved.warnings:
        click.echo(f"meshd: warning: {warning}", err=True)
    click.echo(
        f"the configuration is right: network {resolved.network}, chain {chain_id}, "
        f"roles {', '.join(resolved.roles) or 'none (a client)'}"
    )


@config.command(epilog="Example:  meshd config show --preset validator > node.toml")
@config_options
@as_json
def show(as_json: bool, **options: Any) -> None:
    """Show every value, as a configuration file."""
    from meshd.config.schema import config_as_table

    table = config_as_table(configure(**options))
    if as_json:
        print_json(table)
        return
    inner = {name: value for name, value in table.items() if isinstance(value, dict)}
    _print_keys({name: value for name, value in table.items() if name not in inner})
    for name, value in inner.items():
        click.echo(f"\n[{name}]")
        _print_keys(value)


def _print_keys(table: dict[str, Any]) -> None:
    for key, value in table.items():
        click.echo(f"{key} = {json.dumps(value, ensure_ascii=False)}")
