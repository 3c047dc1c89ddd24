"""Options that many commands share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from meshd.node.client import Client

Function = TypeVar("Function", bound=Callable[..., Any])

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")

data_dir_option = click.option(
    "--data-dir",
    metavar="DIR",
    help="The daemon's data directory [default: MESHD_DATA_DIR, the config file's, or your own].",
)


def daemon_command(function: Function) -> Function:
    """Give a command the options --data-dir and --json; it calls `client(data_dir)`."""
    return data_dir_option(as_json(function))


def find_data_dir(flag: str | None, config: str | None = None) -> Path:
    """Return the data directory that the flags, the environment or the config file name."""
    from meshd.config.paths import config_file, data_directory, read_text

    file = config_file(config, os.environ)
    text = read_text(file, "configuration") if file is not None else None
    return data_directory(flag, os.environ, text)


def client(data_dir: str | None) -> Client:
    """Return the client of the daemon that --data-dir means."""
    from meshd.node.client import connect

    return connect(find_data_dir(data_dir))


def complete_job_id(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[Any]:
    """Complete a job id in the shell, from what the daemon knows."""
    from click.shell_completion import CompletionItem

    from meshd.node.control.api import ControlError

    try:
        jobs = client(ctx.params.get("data_dir")).jobs()
    except ControlError:
        return []
    return [
        CompletionItem(job["id"], help=job["state"])
        for job in jobs
        if job["id"].startswith(incomplete)
    ]
