"""`meshd chain`: a development chain, its coins and meshd's contracts on it."""

from __future__ import annotations

import importlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from meshd.config.amounts import format_mcc, parse_mcc
from meshd.node.cli.lazy import LazyGroup
from meshd.node.cli.options import as_json, data_dir_option, find_data_dir
from meshd.node.cli.output import print_json, print_pairs

if TYPE_CHECKING:
    from meshd.p2p.identity import Identity

FAUCET_KEY = "devchain.key"
"""The key of the account that owns a development chain's coins, in the data directory."""

_FAUCET_WEI = 10**24

rpc_option = click.option(
    "--rpc",
    metavar="URL",
    default="http://127.0.0.1:8545",
    show_default=True,
    help="The chain's JSON-RPC.",
)
key_option = click.option(
    "--key",
    metavar="FILE",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"The sender's key file [default: {FAUCET_KEY} in the data directory].",
)


@click.group(
    cls=LazyGroup,
    epilog="\b\nExample:\n  meshd chain dev &\n  meshd chain deploy --out deployment.json",
)
def chain() -> None:
    """Run a development chain; deploy and fund on one."""


@chain.command(epilog="Example:  meshd chain dev --port 8545")
@click.option("--port", type=click.IntRange(0, 65_535), default=8545, show_default=True)
@click.option("--chain-id", type=click.IntRange(1), default=31_373, show_default=True)
@click.option(
    "--block-time", type=click.FloatRange(0.05, 60), default=1.0, show_default=True, help="Seconds."
)
@data_dir_option
def dev(port: int, chain_id: int, block_time: float, data_dir: str | None) -> None:
    """Run a development chain until ctrl-C.

    It listens on loopback and goes on where it stopped. It has a single authority and is for
    development only, never for real value. All its coins belong to the key that it keeps in
    the data directory.
    """
    import trio

    from meshd.config.paths import CHAIN
    from meshd.ledger.devchain.service import serve
    from meshd.p2p.identity import load_or_create

    directory = find_data_dir(data_dir)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    faucet = load_or_create(directory / FAUCET_KEY)
    run = partial(
        serve,
        directory / CHAIN,
        accounts={faucet.address: _FAUCET_WEI},
        port=port,
        chain_id=chain_id,
        block_time=block_time,
    )
    trio.run(_serve_until_stopped, run, chain_id, directory)


async def _serve_until_stopped(run: Any, chain_id: int, directory: Path) -> None:
    import signal

    import trio

    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            port = await nursery.start(run)
            click.echo(
                f"development chain {chain_id} at http://127.0.0.1:{port}, kept in {directory}: "
                "a single authority, never for real value"
            )
            async for _ in signals:
                nursery.cancel_scope.cancel()


@chain.command(
    epilog="Example:  meshd chain fund 0x52908400098527886E0F7030069857D2E4169EE7 --mcc 500"
)
@click.argument("address", nargs=-1, required=True)
@click.option("--coin", default="1", show_default=True, help="Native coin for each, for gas.")
@click.option("--mcc", default="0", show_default=True, help="MCC for each.")
@click.option("--deployment", type=click.Path(path_type=Path), help="Needed for --mcc.")
@rpc_option
@key_option
@data_dir_option
@as_json
def fund(
    address: tuple[str, ...],
    coin: str,
    mcc: str,
    deployment: Path | None,
    rpc: str,
    key: Path | None,
    data_dir: str | None,
    as_json: bool,
) -> None:
    """Send coin and MCC to every ADDRESS.

    Returns when all of it is on chain.
    """
    import trio

    from meshd.config.deployment import read_deployment
    from meshd.config.quantities import parse_account

    accounts = [parse_account(text) for text in address]
    coin_amount, mcc_amount = parse_mcc(coin), parse_mcc(mcc)
    if mcc_amount and deployment is None:
        raise click.UsageError("--mcc needs --deployment, the file that `meshd chain deploy` wrote")
    token = read_deployment(deployment).mcc if deployment is not None else None
    sender = _sender(key, data_dir)
    send = partial(
        importlib.import_module("meshd.ledger.deploy").fund,
        rpc,
        sender,
        accounts,
        coin=coin_amount,
        mcc=mcc_amount,
        token=token,
    )
    trio.run(send)
    if as_json:
        print_json([{"address": a, "coin": coin, "mcc": mcc} for a in address])
        return
    for account in address:
        click.echo(f"{account} received {coin} coin and {mcc} MCC")


@chain.command(epilog="Example:  meshd chain deploy --out deployment.json")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True)
@click.option("--epoch-blocks", type=click.IntRange(1), default=5, show_default=True)
@click.option("--unbonding", default="14d", show_default=True, help="Until a stake is free.")
@click.option("--minimum-stake", default="100", show_default=True, help="MCC.")
@rpc_option
@key_option
@data_dir_option
@as_json
def deploy(
    out: Path,
    epoch_blocks: int,
    unbonding: str,
    minimum_stake: str,
    rpc: str,
    key: Path | None,
    data_dir: str | None,
    as_json: bool,
) -> None:
    """Deploy meshd's contracts.

    They are MCC, NodeRegistry and JobEscrow; their addresses are written to a file, which is
    what `meshd up --deployment` takes. The sender receives the whole supply of MCC.
    """
    import trio

    from meshd.config.deployment import write_deployment
    from meshd.config.quantities import format_account, parse_duration

    sender = _sender(key, data_dir)
    deployed = trio.run(
        partial(
            importlib.import_module("meshd.ledger.deploy").deploy,
            rpc,
            sender,
            epoch_blocks=epoch_blocks,
            unbonding_s=parse_duration(unbonding),
            minimum_stake=parse_mcc(minimum_stake),
        )
    )
    write_deployment(deployed, out)
    if as_json:
        print_json({"path": str(out), **deployed.model_dump(mode="json")})
        return
    print_pairs(
        {
            "chain": deployed.chain_id,
            "MCC": format_account(deployed.mcc),
            "NodeRegistry": format_account(deployed.registry),
            "JobEscrow": format_account(deployed.escrow),
            "stake": f"at least {format_mcc(parse_mcc(minimum_stake))} MCC, "
            f"active after {epoch_blocks} blocks",
            "written to": out,
        }
    )


def _sender(key: Path | None, data_dir: str | None) -> Identity:
    from meshd.node.control.api import ControlError
    from meshd.p2p.identity import load_or_create

    path = key if key is not None else find_data_dir(data_dir) / FAUCET_KEY
    if not path.exists():
        raise ControlError(
            "usage",
            f"there is no key file {path}",
            "start `meshd chain dev` with the same data directory, or name a key with --key",
        )
    return load_or_create(path)
