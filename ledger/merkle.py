"""Keccak Merkle trees in the layout of OpenZeppelin's standard-merkle-tree, for claims.

A leaf is hashed twice, leaves are sorted, a node is the hash of its two children in sorted
order: what `MerkleProof.verify` of @openzeppelin/contracts checks on chain. (Blobs and traces
have trees of their own, `meshd.p2p.merkle`.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from eth_hash.auto import keccak

from meshd.p2p.identity import Address

NOTHING = bytes(32)
"""The root of no leaves, as in an account's receipts when it has none; no escrow anchors it."""


def leaf_hash(encoded: bytes) -> bytes:
    """Return the leaf of an ABI-encoded value: hashed twice, so that no node can pass for one."""
    return bytes(keccak(keccak(encoded)))


@dataclass(frozen=True)
class ClaimValue:
    """What a settlement's leaf says: an account earned so much of a job, for these receipts."""

    job_id: bytes
    account: Address
    earned: int
    """Sum over all epochs so far, in MCC's smallest unit."""
    receipts_root: bytes

    def leaf(self) -> bytes:
        """Return the leaf of (bytes32 jobId, address account, uint256 earned, bytes32 root)."""
        earned = self.earned.to_bytes(32, "big")
        return leaf_hash(self.job_id + bytes(12) + self.account + earned + self.receipts_root)


def receipts_root(struct_hashes: Sequence[bytes]) -> bytes:
    """Return the root over receipts' EIP-712 struct hashes; `NOTHING` if there are none."""
    return Tree([leaf_hash(value) for value in struct_hashes]).root if struct_hashes else NOTHING


def _node(left: bytes, right: bytes) -> bytes:
    return bytes(keccak(left + right if left < right else right + left))


class Tree:
    """A tree over leaves, whose order does not matter. Raises ValueError if there is none."""

    def __init__(self, leaves: Sequence[bytes]) -> None:
        if not leaves:
            raise ValueError("a tree needs at least one leaf")
        # A complete binary tree in an array: children of i at 2i+1 and 2i+2, leaves last,
        # the smallest leaf at the very end.
        count = len(leaves)
        nodes = [b""] * (count - 1) + sorted(leaves, reverse=True)
        for index in range(count - 2, -1, -1):
            nodes[index] = _node(nodes[2 * index + 1], nodes[2 * index + 2])
        self._nodes = nodes
        self._places = {nodes[place]: place for place in range(count - 1, 2 * count - 1)}

    @property
    def root(self) -> bytes:
        """The root, 32 bytes."""
        return self._nodes[0]

    def proof(self, leaf: bytes) -> tuple[bytes, ...]:
        """Return the siblings of *leaf* from the bottom up; raises KeyError if it is not here."""
        place = self._places[leaf]
        path = []
        while place:
            path.append(self._nodes[place - 1 if place % 2 == 0 else place + 1])
            place = (place - 1) // 2
        return tuple(path)


def verify(root: bytes, leaf: bytes, proof: Sequence[bytes]) -> bool:
    """Return whether *leaf* is under *root*."""
    node = leaf
    for sibling in proof:
        node = _node(node, sibling)
    return node == root
