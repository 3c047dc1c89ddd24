"""Trees over blobs and traces: each leaf proves its own place among n, and nothing else passes."""

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from meshd.p2p.merkle import paths, root, verify

SIZES = range(34)


def leaves_of(count: int) -> list[bytes]:
    return [f"leaf {place}".encode() for place in range(count)]


def by_hand(leaves: list[bytes]) -> bytes:
    """The root by another algorithm: recursion over the largest power of two."""

    def top(part: list[bytes]) -> bytes:
        if len(part) == 1:
            return blake3(b"\x00" + part[0]).digest()
        half = 1
        while half * 2 < len(part):
            half *= 2
        return blake3(b"\x01" + top(part[:half]) + top(part[half:])).digest()

    inner = top(leaves) if leaves else bytes(32)
    return blake3(b"\x02" + len(leaves).to_bytes(4, "big") + inner).digest()


@pytest.mark.parametrize("count", SIZES)
def test_every_leaf_of_every_size_is_proven_at_its_place_only(count: int) -> None:
    leaves = leaves_of(count)
    tree = root(leaves)
    assert tree == by_hand(leaves)
    for index, path in enumerate(paths(leaves, range(count))):
        assert len(path) <= 6
        places = [i for i in range(count + 2) if verify(tree, count, i, leaves[index], path)]
        assert places == [index]


@pytest.mark.parametrize("count", range(1, 34))
def test_another_number_of_leaves_is_refused(count: int) -> None:
    leaves = leaves_of(count)
    tree = root(leaves)
    for index, path in enumerate(paths(leaves, range(count))):
        counts = [n for n in range(70) if verify(tree, n, index, leaves[index], path)]
        assert counts == [count]


def test_roots_of_all_sizes_differ() -> None:
    assert len({root(leaves_of(count)) for count in SIZES}) == len(SIZES)
    assert len({root([b"same"] * count) for count in SIZES}) == len(SIZES)


def test_the_empty_tree_has_a_root_and_proves_nothing() -> None:
    assert root([]) == blake3(b"\x02" + bytes(4) + bytes(32)).digest()
    assert not verify(root([]), 0, 0, b"", ())
    assert not verify(root([]), 1, 0, b"", ())


@pytest.mark.parametrize("count", [1, 3, 5, 7, 9, 31, 33])
def test_a_duplicated_last_leaf_makes_another_tree(count: int) -> None:
    leaves = leaves_of(count)
    longer = [*leaves, leaves[-1]]
    tree = root(leaves)
    assert tree != root(longer)
    (path,) = paths(longer, [count])
    assert not verify(tree, count, count, leaves[-1], path)
    assert not verify(tree, count + 1, count, leaves[-1], path)


@pytest.mark.parametrize("count", [2, 4, 8, 32])
def test_a_node_does_not_pass_for_a_leaf(count: int) -> None:
    leaves = leaves_of(count)
    tree = root(leaves)
    left, right = (blake3(b"\x00" + leaf).digest() for leaf in leaves[:2])
    path = paths(leaves, [0])[0]
    for node in (left + right, b"\x01" + left + right, blake3(b"\x01" + left + right).digest()):
        for n in (count, count // 2):
            assert not verify(tree, n, 0, node, path[1:])


def test_a_leaf_that_looks_like_a_node_is_still_a_leaf() -> None:
    left, right = (blake3(b"\x00" + leaf).digest() for leaf in leaves_of(2))
    assert root([left + right]) != root(leaves_of(2))
    assert root([b"\x01" + left + right]) != root(leaves_of(2))


@pytest.mark.parametrize("count", [2, 3, 8, 33])
def test_swapped_leaves_make_another_tree(count: int) -> None:
    leaves = leaves_of(count)
    swapped = [leaves[1], leaves[0], *leaves[2:]]
    tree = root(leaves)
    assert tree != root(swapped)
    first, second = paths(leaves, [0, 1])
    assert not verify(tree, count, 1, leaves[0], first)
    assert not verify(tree, count, 0, leaves[0], second)
    assert not verify(tree, count, 1, leaves[0], second)


@pytest.mark.parametrize(
    ("count", "index"), [(4, -1), (4, 4), (0, 0), (-1, -1), (2**32, 0), (2**40, 2**39)]
)
def test_a_place_outside_the_tree_is_refused(count: int, index: int) -> None:
    leaves = leaves_of(4)
    assert not verify(root(leaves), count, index, leaves[index % 4], paths(leaves, [index % 4])[0])


@pytest.mark.parametrize("index", [-1, 4, 100])
def test_there_is_no_path_of_a_leaf_that_is_not_there(index: int) -> None:
    with pytest.raises(IndexError, match=f"leaf {index} of a tree of 4 leaves"):
        paths(leaves_of(4), [index])


@given(st.lists(st.binary(max_size=8), min_size=1, max_size=40), st.data())
def test_any_change_to_a_proof_is_refused(leaves: list[bytes], data: st.DataObject) -> None:
    tree = root(leaves)
    index = data.draw(st.integers(0, len(leaves) - 1))
    path = list(paths(leaves, [index])[0])
    assert verify(tree, len(leaves), index, leaves[index], path)
    assert not verify(tree, len(leaves), index, leaves[index] + b"\0", path)
    assert not verify(tree, len(leaves), index, leaves[index], [*path, bytes(32)])
    assert not verify(bytes(32), len(leaves), index, leaves[index], path)
    if path:
        place = data.draw(st.integers(0, len(path) - 1))
        assert not verify(tree, len(leaves), index, leaves[index], path[:place])
        path[place] = bytes(32)
        assert not verify(tree, len(leaves), index, leaves[index], path)
