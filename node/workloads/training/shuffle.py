"""Which rows a shard reads: every data epoch is a keyed permutation that needs no memory.

The permutation of 0..rows-1 is a Feistel cipher over pairs (left, right), 0 <= left < a,
0 <= right < b, a b just above `rows`, and cycle walking for the few numbers that land outside.
Source: J. Black, P. Rogaway, Ciphers with arbitrary finite domains, CT-RSA 2002, methods 2 and 3.
"""

from __future__ import annotations

from math import isqrt
from typing import Final

from blake3 import blake3

from meshd.node.workloads.training.errors import TrainingError

ROUNDS: Final = 6
MAX_ROWS: Final = 1 << 40
MAX_COUNT: Final = 1 << 31
_CONTEXT: Final = b"meshd.shuffle.v1\0"


def rows_of(seed: bytes, *, rows: int, first: int, count: int) -> list[int]:
    """Return the rows at positions `first` to `first + count` of the shuffled data.

    Position p is place p % rows of data epoch p // rows; every row is in each epoch once.
    Raises TrainingError for numbers out of bounds.
    """
    if not 1 <= rows <= MAX_ROWS:
        raise TrainingError(f"{rows} rows cannot be shuffled; 1 to {MAX_ROWS} are allowed")
    if first < 0 or not 0 <= count <= MAX_COUNT:
        raise TrainingError(f"{count} rows from position {first} are out of bounds")
    found: list[int] = []
    epoch, permute = -1, _Permutation(seed, rows, 0)
    for position in range(first, first + count):
        if position // rows != epoch:
            epoch = position // rows
            permute = _Permutation(seed, rows, epoch)
        found.append(permute(position % rows))
    return found


class _Permutation:
    """A keyed bijection of 0..rows-1."""

    def __init__(self, seed: bytes, rows: int, epoch: int) -> None:
        self._rows = rows
        self._left = isqrt(rows - 1) + 1
        self._right = -(-rows // self._left)
        self._key = blake3(_CONTEXT + seed + epoch.to_bytes(16, "big")).digest()

    def __call__(self, place: int) -> int:
        """Return the row at a place. Walks on while it lands outside: it must come back."""
        place = self._encipher(place)
        while place >= self._rows:
            place = self._encipher(place)
        return place

    def _encipher(self, place: int) -> int:
        right, left = divmod(place, self._left)
        for round_ in range(ROUNDS):
            if round_ % 2:
                right = (right + self._mixed(round_, left)) % self._right
            else:
                left = (left + self._mixed(round_, right)) % self._left
        return right * self._left + left

    def _mixed(self, round_: int, half: int) -> int:
        text = bytes((round_,)) + half.to_bytes(8, "big")
        return int.from_bytes(blake3(text, key=self._key).digest(16), "big")
