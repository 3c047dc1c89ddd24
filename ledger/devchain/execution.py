"""py-evm at work: transactions into blocks, calls and gas estimates on a past state."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

from eth.abc import (
    ChainDatabaseAPI,
    ComputationAPI,
    ReceiptAPI,
    SignedTransactionAPI,
    StateAPI,
)
from eth.consensus.context import ConsensusContext
from eth.constants import BLANK_ROOT_HASH
from eth.db.atomic import AtomicDB
from eth.db.trie import make_trie_root_and_nodes
from eth.exceptions import Revert, VMError
from eth.vm.chain_context import ChainContext
from eth.vm.forks.berlin.transactions import calculate_txn_intrinsic_gas_berlin
from eth.vm.forks.london.headers import calculate_expected_base_fee_per_gas
from eth.vm.forks.prague import PragueVM
from eth.vm.forks.prague.blocks import PragueBlockHeader
from eth_abi.abi import decode
from eth_abi.exceptions import DecodingError
from eth_typing import Address as EthAddress

from meshd.ledger.devchain.errors import ExecutionFailed, ExecutionReverted
from meshd.ledger.devchain.store import (
    GAS_LIMIT,
    Block,
    Log,
    MinedTransaction,
    Store,
    block_header,
)
from meshd.p2p.identity import NOBODY, Address

MAX_INITCODE_SIZE = 49_152
"""Longest creation code in bytes (EIP-3860)."""

_ERROR_STRING = bytes.fromhex("08c379a0")  # Error(string)
_CALL_STIPEND = 2_300
_ESTIMATE_TOLERANCE = 0.015


class _VM(PragueVM):
    """Prague's rules over our store in place of py-evm's chain database."""

    previous: Callable[[int], Iterable[bytes]]

    @property
    def previous_hashes(self) -> Any:
        return self.previous(self.get_header().block_number)


@dataclass(frozen=True)
class _Nodes:
    """The one attribute of a chain database that executing transactions needs."""

    db: AtomicDB


@dataclass(frozen=True)
class Call:
    """A message to execute without a signature and for free; *to* empty creates a contract.

    It has the attributes by which py-evm knows a transaction.
    """

    sender: Address = NOBODY
    to: bytes = b""
    data: bytes = b""
    value: int = 0
    gas: int = GAS_LIMIT
    access_list: tuple[tuple[bytes, tuple[int, ...]], ...] = ()
    max_fee_per_gas: int = field(default=0, init=False)
    max_priority_fee_per_gas: int = field(default=0, init=False)
    type_id: int = field(default=2, init=False)

    @property
    def intrinsic_gas(self) -> int:
        """Gas that the transaction costs before its first instruction."""
        return intrinsic_gas(cast(SignedTransactionAPI, self))


@dataclass(frozen=True)
class CallResult:
    """What a call gave back; gas in units of gas."""

    output: bytes
    gas_used: int
    gas_needed: int
    """Used before refunds: with less the call would not get through."""


def intrinsic_gas(transaction: SignedTransactionAPI) -> int:
    """Return the gas *transaction* costs before its first instruction, as py-evm charges it."""
    return int(calculate_txn_intrinsic_gas_berlin(transaction))


def least_gas(transaction: SignedTransactionAPI) -> int:
    """Return the smallest gas limit with which *transaction* is worth including.

    The intrinsic gas, with the cost of creation code (EIP-3860), or the floor that its data
    costs (EIP-7623).
    """
    needed = intrinsic_gas(transaction)
    if transaction.to == b"":
        needed += 2 * ((len(transaction.data) + 31) // 32)
    zeros = transaction.data.count(0)
    tokens = zeros + 4 * (len(transaction.data) - zeros)
    return max(needed, 21_000 + 10 * tokens)


def decode_transaction(raw: bytes) -> SignedTransactionAPI:
    """Return the signed transaction in *raw*; raises what py-evm raises for bad bytes."""
    return PragueVM.get_transaction_builder().decode(raw)


class Accounts:
    """The accounts as they are after one block."""

    def __init__(self, state: StateAPI) -> None:
        self._state = state

    def nonce(self, address: Address) -> int:
        """Return how many transactions *address* has sent (a contract: created)."""
        return int(self._state.get_nonce(EthAddress(address)))

    def balance(self, address: Address) -> int:
        """Return what *address* has, in wei."""
        return int(self._state.get_balance(EthAddress(address)))

    def code(self, address: Address) -> bytes:
        """Return the code at *address*, empty if there is none."""
        return bytes(self._state.get_code(EthAddress(address)))

    def storage(self, address: Address, slot: int) -> int:
        """Return the word in *slot* of the contract at *address*."""
        return int(self._state.get_storage(EthAddress(address), slot))


class Execution:
    """Runs the EVM over the states in a store."""

    def __init__(self, store: Store, chain_id: int) -> None:
        self.chain_id = chain_id
        self._store = store
        self._nodes = _Nodes(AtomicDB(store.nodes))

    def _vm(self, header: PragueBlockHeader) -> _VM:
        """Return the machine that executes in the block of *header*, on the state it names."""
        vm = _VM(
            header=header,
            chaindb=cast(ChainDatabaseAPI, self._nodes),
            chain_context=ChainContext(self.chain_id),
            consensus_context=ConsensusContext(self._nodes.db),
        )
        vm.previous = self._previous_hashes
        return vm

    def accounts(self, header: PragueBlockHeader) -> Accounts:
        """Return the accounts after the block of *header*."""
        return Accounts(self._state(header))

    def call(self, header: PragueBlockHeader, call: Call) -> CallResult:
        """Execute *call* on the state and in the surroundings of *header*.

        Raises ExecutionReverted or ExecutionFailed.
        """
        state = self._state(_copy(header, base_fee_per_gas=0))
        if call.gas < call.intrinsic_gas:
            raise ExecutionFailed(
                f"intrinsic gas too low: have {call.gas}, want {call.intrinsic_gas}"
            )
        transaction = cast(SignedTransactionAPI, call)
        executor = state.get_transaction_executor()
        try:
            # Without the executor's validation: a call may come from a contract or from nobody.
            message = executor.build_evm_message(transaction)
            computation = executor.build_computation(message, transaction)
        except VMError as error:
            raise ExecutionFailed(str(error)) from error
        _check(computation)
        gas_needed = call.gas - computation.get_gas_remaining()
        executor.finalize_computation(transaction, computation)
        gas_used = PragueVM.finalize_gas_used(transaction, computation)
        return CallResult(computation.output, gas_used, max(gas_needed, gas_used))

    def estimate_gas(self, header: PragueBlockHeader, call: Call) -> Iterator[int]:
        """Yield ever better gas limits with which *call* succeeds; the last is the answer.

        Every step is one execution, so that the caller can do something else in between. The
        last is at most 1.5 % above the smallest limit that works, the bound that geth uses.
        Raises as `call` does if the call fails with all the gas it may have.
        """
        result = self.call(header, call)
        low, high = result.gas_needed - 1, call.gas
        yield high
        # What it used is enough unless it calls on: a call keeps back 1/64 of the gas it has.
        guess = min(result.gas_needed, high)
        likely = min((result.gas_needed + _CALL_STIPEND) * 64 // 63, high)
        while high - low > 1 and (high - low) / high > _ESTIMATE_TOLERANCE:
            try:
                self.call(header, replace(call, gas=guess))
            except ExecutionFailed:
                low = guess
            else:
                high = guess
            yield high
            guess = likely if low < likely < high else (low + high) // 2

    def genesis(self, timestamp: int, base_fee: int, balances: Mapping[Address, int]) -> Block:
        """Write the first state, *balances* in wei, into the store and return the first block.

        To be called within a transaction of the store.
        """
        header = block_header(
            number=0,
            parent_hash=bytes(32),
            state_root=BLANK_ROOT_HASH,
            timestamp=timestamp,
            base_fee=base_fee,
            mix_hash=bytes(32),
        )
        state = self._state(header)
        for address, balance in balances.items():
            state.set_balance(EthAddress(address), balance)
        state.persist()
        return Block(_copy(header, state_root=state.state_root))

    def build(self, header: PragueBlockHeader) -> BlockBuilder:
        """Return a builder of the block that *header* begins."""
        return BlockBuilder(self._vm(header), header)

    def _state(self, header: PragueBlockHeader) -> StateAPI:
        return self._vm(header).state

    def _previous_hashes(self, number: int) -> Iterator[bytes]:
        for earlier in range(number - 1, max(number - 257, -1), -1):
            block_hash = self._store.block_hash(earlier)
            if block_hash is None:
                return
            yield block_hash


class BlockBuilder:
    """A block in the making: transactions are applied one by one, all is written at the end."""

    def __init__(self, vm: _VM, header: PragueBlockHeader) -> None:
        self._vm = vm
        self._header = header
        self._transactions: list[SignedTransactionAPI] = []
        self._receipts: list[ReceiptAPI] = []

    @property
    def gas_left(self) -> int:
        """Gas that still fits into the block."""
        return self._header.gas_limit - self._header.gas_used

    @property
    def is_empty(self) -> bool:
        """Whether no transaction has been applied."""
        return not self._transactions

    @property
    def base_fee(self) -> int:
        """Wei per gas that every transaction must be able to pay."""
        return base_fee(self._header)

    @property
    def slots(self) -> list[tuple[Address, int]]:
        """Sender and nonce of every transaction applied."""
        return [(Address(applied.sender), applied.nonce) for applied in self._transactions]

    def nonce(self, sender: Address) -> int:
        """Return the nonce that *sender*'s next transaction in the block must have."""
        return Accounts(self._vm.state).nonce(sender)

    def apply(self, transaction: SignedTransactionAPI) -> None:
        """Execute *transaction* as the next of the block.

        Raises eth_utils.ValidationError, with the state unchanged, if it cannot be in this block.
        After any other exception the builder is of no more use.
        """
        receipt, _ = self._vm.apply_transaction(self._header, transaction)
        header = self._vm.add_receipt_to_header(self._header, receipt)
        self._header = cast(PragueBlockHeader, header)
        self._transactions.append(transaction)
        self._receipts.append(receipt)

    def seal(self) -> Block:
        """Write the new state into the store and return the finished block.

        To be called within a transaction of the store.
        """
        if self.is_empty:
            return Block(self._header)
        self._vm.state.persist()
        header = _copy(
            self._header,
            state_root=self._vm.state.state_root,
            transaction_root=make_trie_root_and_nodes(self._transactions)[0],
            receipt_root=make_trie_root_and_nodes(self._receipts)[0],
        )
        return Block(header, tuple(self._mined()), tuple(self._logs()))

    def _mined(self) -> Iterator[MinedTransaction]:
        cumulative = 0
        for position, (transaction, receipt) in enumerate(
            zip(self._transactions, self._receipts, strict=True)
        ):
            yield MinedTransaction(
                block=self._header.block_number,
                position=position,
                hash=transaction.hash,
                raw=transaction.encode(),
                sender=Address(transaction.sender),
                status=int.from_bytes(receipt.state_root, "big"),
                gas_used=receipt.gas_used - cumulative,
                cumulative_gas_used=receipt.gas_used,
            )
            cumulative = receipt.gas_used

    def _logs(self) -> Iterator[Log]:
        index = 0
        for position, receipt in enumerate(self._receipts):
            for log in receipt.logs:
                yield Log(
                    block=self._header.block_number,
                    index=index,
                    position=position,
                    address=Address(log.address),
                    topics=tuple(topic.to_bytes(32, "big") for topic in log.topics),
                    data=log.data,
                )
                index += 1


def next_header(parent: PragueBlockHeader, *, timestamp: int, mix_hash: bytes) -> PragueBlockHeader:
    """Return the header of the block after *parent* while it is empty (base fee: EIP-1559)."""
    return block_header(
        number=parent.block_number + 1,
        parent_hash=parent.hash,
        state_root=parent.state_root,
        timestamp=timestamp,
        base_fee=next_base_fee(parent),
        mix_hash=mix_hash,
    )


def base_fee(header: PragueBlockHeader) -> int:
    """Return the base fee of *header* in wei per gas."""
    return int(header.base_fee_per_gas or 0)


def next_base_fee(header: PragueBlockHeader) -> int:
    """Return the base fee of the block after *header* (EIP-1559)."""
    return int(calculate_expected_base_fee_per_gas(header))


def _copy(header: PragueBlockHeader, **changed: object) -> PragueBlockHeader:
    return cast(PragueBlockHeader, header.copy(**changed))


def _check(computation: ComputationAPI) -> None:
    if not computation.is_error:
        return
    if isinstance(computation.error, Revert):
        data = computation.output
        raise ExecutionReverted(_revert_text(data), data)
    name = type(computation.error).__name__
    raise ExecutionFailed(f"{name}: {computation.error}"[:300])


def _revert_text(data: bytes) -> str:
    if data.startswith(_ERROR_STRING):
        try:
            (reason,) = decode(["string"], data[4:])
        except (DecodingError, UnicodeDecodeError, OverflowError):
            return "execution reverted"
        return f"execution reverted: {reason}"
    return "execution reverted"
