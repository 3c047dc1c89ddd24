"""The contracts' rules in Python: one transaction on a state, as the memory chain runs it.

Rules, order of checks, names of errors and the draw of committees are those of contracts/src
(stake is only ever added here: the port has no call that takes it out); the same contract tests
run on both.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from meshd.ledger import memory_escrow
from meshd.ledger.chain import (
    AnchorSettlement,
    Call,
    CallFailed,
    CancelJob,
    ChainEvent,
    ClaimMany,
    OpenJob,
    RefundJob,
    Register,
    Stake,
    StartJob,
    Transfer,
)
from meshd.ledger.memory_escrow import VALIDATOR
from meshd.ledger.memory_state import ContractState, Node, Setting
from meshd.p2p.identity import NOBODY

ORCHESTRATOR = 1
"""Role bit of a node that may take jobs and keep their logs."""
WEIGHT_UNIT = 10**18
"""The unit of a draw's weight: one whole MCC."""


def apply(state: ContractState, call: Call, at: Setting) -> list[ChainEvent]:
    """Make *call* on *state* and return its events.

    Raises CallFailed with the name of the contract's error; *state* is then to be dropped.
    """
    match call:
        case Transfer():
            state.transfer(at.sender, call.to, call.amount)
            return []
        case Register():
            _register(state, call, at)
            return []
        case Stake():
            _stake(state, call, at)
            return []
        case OpenJob():
            return [memory_escrow.open(state, call, at)]
        case StartJob():
            return [memory_escrow.start(state, call, at)]
        case CancelJob():
            return [memory_escrow.cancel(state, call, at)]
        case AnchorSettlement():
            return memory_escrow.anchor(state, call, at)
        case ClaimMany():
            return memory_escrow.claim_many(state, call, at)
        case RefundJob():
            return [memory_escrow.refund(state, call, at)]
        case _:
            assert_never(call)


def _register(state: ContractState, call: Register, at: Setting) -> None:
    if at.sender in state.nodes:
        raise CallFailed("NodeRegistryAlreadyRegistered")
    if call.payout == NOBODY:
        raise CallFailed("NodeRegistryInvalidPayout")
    if not 0 < call.roles <= ORCHESTRATOR | VALIDATOR:
        raise CallFailed("NodeRegistryInvalidRoles")
    state.nodes[at.sender] = Node(call.payout, call.roles)


def _stake(state: ContractState, call: Stake, at: Setting) -> None:
    node = state.nodes.get(at.sender)
    if node is None:
        raise CallFailed("NodeRegistryNotRegistered")
    if call.amount == 0:
        raise CallFailed("NodeRegistryInvalidAmount")
    node = replace(node, bonded=node.bonded + call.amount)
    state.nodes[at.sender] = node
    if node.bonded >= at.minimum_stake:
        checkpoint = (at.height // at.epoch_length + 1, node.bonded // WEIGHT_UNIT)
        for role in (ORCHESTRATOR, VALIDATOR):
            if node.roles & role:
                seat = (role, at.sender)
                state.seats[seat] = (*state.seats.get(seat, ()), checkpoint)
    state.move(at.sender, at.registry, call.amount)
