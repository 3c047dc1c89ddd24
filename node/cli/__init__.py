"""The meshd command: one module per group, talking to a running daemon by its control API only."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

import click

from meshd.node.cli.failures import leaves, report
from meshd.node.cli.lazy import LazyGroup

_HERE = "meshd.node.cli"

COMMANDS = {
    "up": f"{_HERE}.up:up",
    "status": f"{_HERE}.status:status",
    "peers": f"{_HERE}.status:peers",
    "doctor": f"{_HERE}.doctor:doctor",
    "pause": f"{_HERE}.status:pause",
    "resume": f"{_HERE}.status:resume",
    "wallet": f"{_HERE}.account:wallet",
    "stake": f"{_HERE}.account:stake",
    "earnings": f"{_HERE}.account:earnings",
    "job": f"{_HERE}.job:job",
    "replay": f"{_HERE}.replay:replay",
    "program": f"{_HERE}.program:program",
    "data": f"{_HERE}.data:data",
    "chain": f"{_HERE}.chain:chain",
    "config": f"{_HERE}.config:config",
    "service": f"{_HERE}.service:service",
    "completion": f"{_HERE}.completion:completion",
    "demo": f"{_HERE}.demo:demo",
}


def _show_version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from importlib.metadata import version  # 20 ms that no other command pays

        click.echo(f"meshd {version('meshd')}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    lazy=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 96},
    epilog="Begin with `meshd demo`: a whole swarm on this machine, in a few minutes.",
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_show_version,
    help="Show the version and exit.",
)
@click.option("--traceback", is_flag=True, help="Show where an unexpected error arose.")
def cli(traceback: bool) -> None:
    """Train and run AI on a swarm of anybody's machines, checked and paid shard by shard."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; errors become one line each on stderr."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = cli.main(arguments, prog_name="meshd", standalone_mode=False)
        sys.stdout.flush()
    except click.Abort:
        return _interrupted()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return 2
    except click.ClickException as error:
        print(f"meshd: {error.format_message()}{_hint(error)}", file=sys.stderr)
        return 2
    except BaseException as error:
        return _exit_code(error, is_traceback_wanted="--traceback" in arguments)
    return code if isinstance(code, int) else 0


def _hint(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f" (see `{context.command_path} --help`)" if context is not None else ""


def _exit_code(error: BaseException, *, is_traceback_wanted: bool) -> int:
    inner = list(leaves(error))
    if any(isinstance(leaf, KeyboardInterrupt) for leaf in inner):
        return _interrupted()
    if all(isinstance(leaf, BrokenPipeError) for leaf in inner):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing more to flush
        return 128 + signal.SIGPIPE
    if isinstance(error, SystemExit) or is_traceback_wanted:
        raise error
    code = report(error)
    if code is None:
        first = inner[0]
        print(
            f"meshd: internal error: {type(first).__name__}: {first}: this is a bug; "
            "`meshd --traceback ...` shows where",
            file=sys.stderr,
        )
        return 1
    return code


def _interrupted() -> int:
    print("meshd: interrupted", file=sys.stderr)
    return 128 + signal.SIGINT
