"""What can go wrong with the embedded chain.

DevchainError
├── ChainFileError       the chain's database cannot be used
├── TransactionRefused   a transaction is not taken into the pool
└── ExecutionFailed      a call or an estimate did not succeed
    └── ExecutionReverted    the contract said no, and carries its reason
"""

from __future__ import annotations


class DevchainError(Exception):
    """Root of the embedded chain's errors; the text names the thing, its value and the cure."""


class ChainFileError(DevchainError):
    """The chain's database is foreign, damaged, in use or of another chain."""


class TransactionRefused(DevchainError):
    """A transaction is not taken into the pool; the text is the one geth gives."""


class ExecutionFailed(DevchainError):
    """A call or an estimate ended with an error of the EVM, such as out of gas."""


class ExecutionReverted(ExecutionFailed):
    """A call or an estimate was reverted by the contract."""

    def __init__(self, message: str, data: bytes) -> None:
        super().__init__(message)
        self.data = data
        """The ABI-encoded reason: `Error(string)`, `Panic(uint256)`, a custom error or nothing."""
