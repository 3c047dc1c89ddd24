"""BLAKE3 Merkle trees that bind their number of leaves, and each leaf's place.

Leaf `H(0x00 | leaf)`, node `H(0x01 | left | right)`, root `H(0x02 | u32 n | top)`; a node without
a sibling is carried up unchanged. Because n is bound, no node can pass for a leaf and no
duplicated last leaf for a longer tree.
"""

from __future__ import annotations

from collections.abc import Sequence

from meshd.p2p.codec import digest


def _levels(leaves: Sequence[bytes]) -> list[list[bytes]]:
    level = [digest(b"\x00" + leaf) for leaf in leaves]
    levels = [level]
    while len(level) > 1:
        pairs = [digest(b"\x01" + level[i] + level[i + 1]) for i in range(0, len(level) - 1, 2)]
        level = pairs + ([level[-1]] if len(level) % 2 else [])
        levels.append(level)
    return levels


def _seal(count: int, top: bytes) -> bytes:
    return digest(b"\x02" + count.to_bytes(4, "big") + top)


def root(leaves: Sequence[bytes]) -> bytes:
    """Return the root of *leaves* in order; an empty tree has the root of n = 0."""
    return _seal(len(leaves), _levels(leaves)[-1][0] if leaves else bytes(32))


def paths(leaves: Sequence[bytes], indices: Sequence[int]) -> list[tuple[bytes, ...]]:
    """Return the sibling paths, bottom up, of the leaves at *indices*.

    Raises IndexError for an index that is not that of a leaf.
    """
    levels = _levels(leaves)
    result = []
    for index in indices:
        if not 0 <= index < len(leaves):
            raise IndexError(f"leaf {index} of a tree of {len(leaves)} leaves")
        path = []
        place = index
        for level in levels[:-1]:
            if place ^ 1 < len(level):
                path.append(level[place ^ 1])
            place //= 2
        result.append(tuple(path))
    return result


def verify(tree: bytes, count: int, index: int, leaf: bytes, path: Sequence[bytes]) -> bool:
    """Return whether *leaf* is number *index* of the *count* leaves under the root *tree*."""
    if not 0 <= index < count < 2**32:
        return False
    node = digest(b"\x00" + leaf)
    place, width, rest = index, count, list(path)
    while width > 1:
        if place ^ 1 < width:
            if not rest:
                return False
            sibling = rest.pop(0)
            node = digest(b"\x01" + (sibling + node if place % 2 else node + sibling))
        place //= 2
        width = (width + 1) // 2
    return not rest and _seal(count, node) == tree
