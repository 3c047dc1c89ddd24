"""`meshd completion`: what a shell sources to complete commands, options and job ids."""

from __future__ import annotations

import click

from meshd.node.cli.options import as_json
from meshd.node.cli.output import print_json

_WHERE = {
    "bash": "~/.bashrc",
    "zsh": "~/.zshrc",
    "fish": "~/.config/fish/completions/meshd.fish",
}


@click.command(epilog='Example:  eval "$(meshd completion bash)"')
@click.argument("shell", type=click.Choice(list(_WHERE)))
@as_json
def completion(shell: str, as_json: bool) -> None:
    """Print the completion script of a shell: bash, zsh or fish.

    Source it in the shell's own start-up file; job ids are completed too, from what the daemon
    knows.
    """
    from click.shell_completion import get_completion_class

    from meshd.node.cli import cli

    found = get_completion_class(shell)
    assert found is not None
    script = found(cli, {}, "meshd", "_MESHD_COMPLETE").source()
    if as_json:
        print_json({"shell": shell, "file": _WHERE[shell], "script": script})
    else:
        click.echo(script)
