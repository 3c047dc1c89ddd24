"""The trees that claims are proven with, against those that @openzeppelin/merkle-tree makes."""

import json
from pathlib import Path
from typing import Any

import pytest
from eth_abi.abi import encode as abi_encode
from hypothesis import given
from hypothesis import strategies as st

from meshd.ledger.merkle import NOTHING, ClaimValue, Tree, leaf_hash, receipts_root, verify
from meshd.p2p.identity import Address

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parents[1] / "vectors" / "claims.json").read_text()
)
hashes = st.binary(min_size=32, max_size=32)


def raw(text: str) -> bytes:
    return bytes.fromhex(text.removeprefix("0x"))


def claim_value(row: list[str]) -> ClaimValue:
    job, account, earned, receipts = row
    return ClaimValue(raw(job), Address(raw(account)), int(earned), raw(receipts))


@pytest.mark.parametrize("tree", VECTORS["claims"], ids=lambda tree: str(len(tree["leaves"])))
def test_leaves_roots_and_proofs_are_those_of_openzeppelins_javascript(
    tree: dict[str, Any],
) -> None:
    leaves = [claim_value(item["value"]).leaf() for item in tree["leaves"]]
    assert leaves == [raw(item["leaf"]) for item in tree["leaves"]]
    ours = Tree(leaves)
    assert ours.root == raw(tree["root"])
    for leaf, item in zip(leaves, tree["leaves"], strict=True):
        assert ours.proof(leaf) == tuple(raw(sibling) for sibling in item["proof"])


@pytest.mark.parametrize("tree", VECTORS["receipts"], ids=lambda tree: str(len(tree["leaves"])))
def test_receipts_roots_are_those_of_openzeppelins_javascript(tree: dict[str, Any]) -> None:
    assert receipts_root([raw(item["value"][0]) for item in tree["leaves"]]) == raw(tree["root"])


@given(hashes, st.binary(min_size=20, max_size=20), st.integers(0, 2**256 - 1), hashes)
def test_a_leaf_hashes_what_solidity_encodes(
    job: bytes, account: bytes, earned: int, receipts: bytes
) -> None:
    encoded = abi_encode(
        ["bytes32", "address", "uint256", "bytes32"], [job, account, earned, receipts]
    )
    assert ClaimValue(job, Address(account), earned, receipts).leaf() == leaf_hash(encoded)


@given(st.sets(hashes, min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_every_leaf_is_proven_and_nothing_else(leaves: set[bytes], random: Any) -> None:
    order = sorted(leaves)
    random.shuffle(order)
    tree = Tree(order)
    assert tree.root == Tree(sorted(leaves)).root
    for leaf in order:
        proof = tree.proof(leaf)
        assert verify(tree.root, leaf, proof)
        assert not verify(tree.root, leaf_hash(leaf), proof)
        assert not verify(tree.root, leaf, (*proof, leaf))
        if proof:
            assert not verify(tree.root, leaf, proof[:-1])
            assert not verify(tree.root, leaf, (bytes(32), *proof[1:]))


def test_a_single_leaf_is_its_own_root() -> None:
    leaf = leaf_hash(b"alone")
    assert Tree([leaf]).root == leaf
    assert Tree([leaf]).proof(leaf) == ()


def test_no_node_passes_for_a_claim() -> None:
    tree = Tree([leaf_hash(bytes([place])) for place in range(4)])
    left, right = tree.proof(leaf_hash(b"\x00"))
    # The preimage of a node is 64 bytes, that of a leaf the hash of 128.
    assert all(verify(tree.root, node, ()) is (node == tree.root) for node in (left, right))


def test_no_receipts_have_the_zero_root() -> None:
    assert receipts_root([]) == NOTHING == bytes(32)


def test_a_leaf_may_be_there_twice() -> None:
    twice, other = leaf_hash(b"twice"), leaf_hash(b"other")
    tree = Tree([twice, other, twice])
    assert verify(tree.root, twice, tree.proof(twice))
    assert tree.root != Tree([twice, other]).root


def test_a_tree_of_no_leaf_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one leaf"):
        Tree([])


def test_a_proof_of_a_foreign_leaf_is_refused() -> None:
    with pytest.raises(KeyError):
        Tree([bytes(32)]).proof(b"\x01" * 32)
