"""`meshd service`: the daemon as a service of systemd."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import click

from meshd.node.cli.lazy import LazyGroup
from meshd.node.cli.options import as_json
from meshd.node.cli.output import print_json
from meshd.node.cli.unit import Service


@click.group(cls=LazyGroup)
def service() -> None:
    """Run the daemon as a service of this machine."""


@service.command(
    epilog="\b\nExamples:\n"
    "  meshd service install --user\n"
    "  meshd service install --system --config /etc/meshd/node.toml --print"
)
@click.option("--user", "scope", flag_value="user", help="For this user; no root is needed.")
@click.option("--system", "scope", flag_value="system", help="For the machine; needs root.")
@click.option("--print", "only_print", is_flag=True, help="Print the unit and write nothing.")
@click.option("--name", default="meshd", show_default=True, help="For more than one daemon.")
@click.option(
    "--config",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The daemon's configuration.",
)
@as_json
def install(
    scope: str | None, only_print: bool, name: str, config: Path | None, as_json: bool
) -> None:
    """Write a hardened systemd unit that runs `meshd up`.

    Nothing is started: the commands that do it are printed. A system service has a user of its
    own and keeps its state in /var/lib/NAME; a user's in ~/.local/share/NAME.
    """
    if scope is None and not only_print:
        raise click.UsageError("say --user or --system, or --print to see the unit")
    found = Service(name, _program(), config.absolute() if config else None, scope == "system")
    home = Path.home()
    path = found.path(home, _config_home())
    text = found.text(home)
    warnings = _warnings(found, config)
    if not only_print:
        _write(path, text)
    if as_json:
        print_json(
            {
                "unit": found.unit,
                "path": str(path),
                "data_dir": found.data_dir(home),
                "written": not only_print,
                "warnings": warnings,
                "text": text,
            }
        )
        return
    for warning in warnings:
        click.echo(f"meshd: warning: {warning}", err=True)
    if only_print:
        click.echo(text, nl=False)
        return
    control = "systemctl" if found.system else "systemctl --user"
    click.echo(f"wrote {path}")
    click.echo(f"start it:  {control} daemon-reload && {control} enable --now {found.unit}")
    if not found.system:
        click.echo("keep it running when you are logged out:  loginctl enable-linger")


def _program() -> tuple[str, ...]:
    """Return the command that runs this very meshd."""
    beside = Path(sys.executable).with_name("meshd")
    if beside.is_file() and os.access(beside, os.X_OK):
        return (str(beside),)
    found = shutil.which("meshd")
    return (found,) if found else (sys.executable, "-m", "meshd.node.cli")


def _config_home() -> Path | None:
    named = os.environ.get("XDG_CONFIG_HOME", "")
    return Path(named) if named.startswith("/") else None


def _warnings(service: Service, config: Path | None) -> list[str]:
    warnings = []
    if config is None:
        warnings.append("without --config the daemon has no chain.deployment: name its file")
    elif not config.is_file():
        warnings.append(f"{config} does not exist yet: write it before the service is started")
    private = ("/home/", "/root/", "/run/user/")
    used = [service.command[0], *([str(config.absolute())] if config else [])]
    hidden = [path for path in used if path.startswith(private)]
    if service.system and hidden:
        warnings.append(
            f"{hidden[0]} is in a home directory, which a system service does not see: "
            "install meshd and its configuration elsewhere, such as /opt/meshd and /etc/meshd"
        )
    return warnings


def _write(path: Path, text: str) -> None:
    from meshd.node.control.api import ControlError

    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except PermissionError as error:
        raise ControlError(
            "failed",
            f"{path} cannot be written: {error.strerror}",
            "run it as root, take --user, or put the output of --print there yourself",
        ) from error
