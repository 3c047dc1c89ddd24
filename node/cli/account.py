"""`meshd wallet` and `meshd stake`: what the node's account holds."""

from __future__ import annotations

import click

from meshd.config.amounts import parse_mcc
from meshd.node.cli.options import client, daemon_command
from meshd.node.cli.output import print_json, print_pairs


@click.command(epilog="Example:  meshd wallet --json | jq -r .mcc")
@daemon_command
def wallet(data_dir: str | None, as_json: bool) -> None:
    """Show the node's addresses, balance and stake.

    The chain is asked now.
    """
    answer = client(data_dir).wallet()
    if as_json:
        print_json(answer)
        return
    print_pairs(
        {
            "address": answer["address"],
            "paid to": answer["payout"],
            "chain": answer["chain_id"],
            "balance": f"{answer['mcc']} MCC",
            "for gas": f"{answer['coin']} coin",
            "stake": f"{answer['stake']} MCC",
        }
    )


@click.command(epilog="Example:  meshd stake 1000")
@click.argument("amount")
@daemon_command
def stake(amount: str, data_dir: str | None, as_json: bool) -> None:
    """Stake AMOUNT of MCC, such as 1000 or 0.5.

    Validators and orchestrators need a stake. The node is registered first if need be; the
    stake counts from the registry's next epoch.
    """
    parse_mcc(amount)
    answer = client(data_dir).stake(amount)
    if as_json:
        print_json(answer)
    else:
        click.echo(
            f"staked {amount} MCC in block {answer['height']} ({answer['tx']}); "
            f"the stake is {answer['stake']} MCC now"
        )
