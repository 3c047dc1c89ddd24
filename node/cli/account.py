"""`meshd wallet`, `stake` and `earnings`: what the node's account holds, and what it was paid."""

from __future__ import annotations

import click

from meshd.config.amounts import parse_mcc
from meshd.node.cli.options import client, daemon_command
from meshd.node.cli.output import print_json, print_pairs, print_table


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


@click.command(epilog="Example:  meshd earnings --json | jq -r .paid")
@click.option("--payments", is_flag=True, help="List every payment with its transaction.")
@daemon_command
def earnings(payments: bool, data_dir: str | None, as_json: bool) -> None:
    """Show what this node was paid, job by job.

    Payments are the escrow's own events, read from the chain now; what is earned and not paid
    yet comes from the logs of the jobs that the node takes part in.
    """
    answer = client(data_dir).earnings()
    if as_json:
        print_json(answer)
        return
    print_pairs(
        {
            "paid to": answer["account"],
            "paid": f"{answer['paid']} MCC",
            "pending": f"{answer['pending']} MCC",
        }
    )
    if payments:
        paid_rows = [
            (paid["height"], paid["job"][:18], paid["amount"], paid["tx"])
            for paid in answer["payments"]
        ]
        click.echo()
        print_table(("BLOCK", "JOB", "AMOUNT (MCC)", "TRANSACTION"), paid_rows, "no payments yet")
    elif answer["jobs"]:
        rows = [
            (job["job"][:18], _known(job["receipts"]), _known(job["earned"]), job["paid"])
            for job in answer["jobs"]
        ]
        click.echo()
        print_table(("JOB", "RECEIPTS", "EARNED (MCC)", "PAID (MCC)"), rows, "")


def _known(value: object) -> object:
    return "-" if value is None else value
