"""Solidity sources, their tests, and the built ABI and bytecode."""

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

ContractName = Literal["MCC", "NodeRegistry", "JobEscrow"]
"""The contracts that have an artifact."""


@dataclass(frozen=True)
class Artifact:
    """One built contract; `bytecode` is what a deployment sends in front of its arguments.

    `abi` is the contract's JSON ABI and the caller's to keep unchanged.
    """

    name: ContractName
    abi: list[dict[str, Any]]
    bytecode: bytes


@cache
def artifact(name: ContractName) -> Artifact:
    """Return the committed build of a contract.

    Raises FileNotFoundError if no contract has that name.
    """
    file = resources.files(__name__).joinpath("artifacts", f"{name}.json")
    built = json.loads(file.read_text(encoding="utf-8"))
    return Artifact(
        name=name, abi=built["abi"], bytecode=bytes.fromhex(built["bytecode"].removeprefix("0x"))
    )
