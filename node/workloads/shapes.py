"""Shape rules: what element-wise, moving and reducing operators return, checked before they run.

Each rule takes an operator's arguments with specs in place of tensors and returns the spec of
the result (a list for several results), or raises ProgramError. They follow torch's documented
behaviour where the table allows an operator, and refuse what torch would do out of bounds.
"""

from collections.abc import Sequence

from meshd.node.workloads.errors import ProgramError
from meshd.node.workloads.tensors import DTYPES, Shape, TensorSpec

Scalar = bool | int | float
Operand = TensorSpec | Scalar


def need(condition: bool, problem: str) -> None:
    """Raise ProgramError with `problem` unless `condition` holds."""
    if not condition:
        raise ProgramError(problem)


def promote(*operands: Operand) -> str:
    """Return the dtype of mixed operands, as torch.result_type does.

    Arrays with dimensions outrank arrays without, which outrank plain numbers, unless the lower
    rank is of a higher kind (bool, integer, float).
    """
    ranks: list[str | None] = [None, None, None]
    for operand in operands:
        if isinstance(operand, TensorSpec):
            rank, dtype = (0 if operand.shape else 1), operand.dtype
        else:
            rank, dtype = 2, {bool: "bool", int: "i64", float: "f32"}[type(operand)]
        ranks[rank] = _join(ranks[rank], dtype)
    result = _by_rank(ranks[0], _by_rank(ranks[1], ranks[2]))
    if result is None:
        raise ProgramError("there is no operand")
    return result


def broadcast(*shapes: Shape) -> Shape:
    """Return the common shape of arrays that are combined element by element."""
    rank = max(map(len, shapes))
    result = [1] * rank
    for shape in shapes:
        for at, size in enumerate(shape, rank - len(shape)):
            if size != 1:
                need(result[at] in (1, size), f"shapes {_text(shapes)} cannot be combined")
                result[at] = size
    return tuple(result)


def axis(rank: int, dim: int) -> int:
    """Return `dim` counted from the front, checked against `rank`."""
    bound = max(rank, 1)
    need(-bound <= dim < bound, f"dimension {dim} does not exist in {rank} dimensions")
    return dim % bound


def axes(rank: int, dims: Sequence[int]) -> tuple[int, ...]:
    """Return several distinct dimensions, counted from the front."""
    found = tuple(axis(rank, dim) for dim in dims)
    need(len(set(found)) == len(found), f"dimensions {list(dims)} repeat")
    return found


def is_float(spec: TensorSpec) -> bool:
    """Whether the numbers are floating point."""
    return DTYPES[spec.dtype].kind == 2


def need_float(*specs: TensorSpec | None) -> None:
    """Raise ProgramError unless all that are given are floating point."""
    for spec in specs:
        need(spec is None or is_float(spec), f"{spec} is not floating point; cast it first")


def need_index(spec: TensorSpec) -> None:
    """Raise ProgramError unless `spec` can hold indices."""
    need(spec.dtype in ("i64", "i32"), f"indices are {spec.dtype}; i64 or i32 are allowed")


# Element by element.


def combine(x: TensorSpec, other: Operand) -> TensorSpec:
    """Two operands, the result in their common dtype."""
    shapes = [part.shape for part in (x, other) if isinstance(part, TensorSpec)]
    return TensorSpec(promote(x, other), broadcast(*shapes))


def combine_scaled(x: TensorSpec, other: Operand, alpha: Scalar) -> TensorSpec:
    """x and alpha * other; alpha may not be of a higher kind than the result."""
    result = combine(x, other)
    need(result.dtype != "bool", "bools cannot be added or subtracted; cast them first")
    need(type(alpha) is not float or is_float(result), "a fractional alpha needs floats")
    return result


def subtract(x: TensorSpec, other: Operand, alpha: Scalar) -> TensorSpec:
    """x - alpha * other; neither may be bool."""
    result = combine_scaled(x, other, alpha)
    bools = [part for part in (x, other) if isinstance(part, TensorSpec) and part.dtype == "bool"]
    need(not bools and type(other) is not bool, "bools cannot be subtracted; cast them first")
    return result


def power(x: TensorSpec, exponent: Operand) -> TensorSpec:
    """x to the power of the exponent; integers to a power that is not negative."""
    result = combine(x, exponent)
    need(result.dtype != "bool", "a bool has no powers; cast it first")
    if not is_float(result) and not isinstance(exponent, TensorSpec):
        need(exponent >= 0, f"an integer to the power of {exponent}; cast it first")
    return result


def combine_two_arrays(x: TensorSpec, other: TensorSpec) -> TensorSpec:
    """Two arrays, the result in their common dtype."""
    return combine(x, other)


def divide(x: TensorSpec, other: Operand, rounding: str) -> TensorSpec:
    """Division; integers are allowed without rounding only, and become floats."""
    result = combine(x, other)
    if not is_float(result):
        need(rounding == "none", "integers cannot be divided with rounding; cast them first")
        return TensorSpec("f32", result.shape)
    return result


def compare(x: TensorSpec, other: Operand) -> TensorSpec:
    """A truth value for each pair."""
    return TensorSpec("bool", combine(x, other).shape)


def logical(x: TensorSpec, other: TensorSpec) -> TensorSpec:
    """A truth value for each pair of arrays."""
    return TensorSpec("bool", combine(x, other).shape)


def bitwise(x: TensorSpec, other: Operand) -> TensorSpec:
    """Bit by bit, on integers and bools."""
    result = combine(x, other)
    need(not is_float(result), f"{result.dtype} has no bits to combine; compare it first")
    return result


def bitwise_single(x: TensorSpec) -> TensorSpec:
    """Every bit turned over, on integers and bools."""
    need(not is_float(x), f"{x.dtype} has no bits to turn over; compare it first")
    return x


def same(x: TensorSpec) -> TensorSpec:
    """The same dtype and shape."""
    return x


def same_number(x: TensorSpec) -> TensorSpec:
    """The same dtype and shape; bools are refused."""
    need(x.dtype != "bool", "a bool has no sign; cast it first")
    return x


def same_truth(x: TensorSpec) -> TensorSpec:
    """A truth value for each element."""
    return TensorSpec("bool", x.shape)


def to_float(x: TensorSpec) -> TensorSpec:
    """Floats stay what they are, everything else becomes f32."""
    return x if is_float(x) else TensorSpec("f32", x.shape)


def float_only(x: TensorSpec, *_: object) -> TensorSpec:
    """The same floats; further arguments do not change the shape."""
    need_float(x)
    return x


def clamp(x: TensorSpec, low: Scalar | None, high: Scalar | None) -> TensorSpec:
    """Bounds on each element."""
    need(low is not None or high is not None, "clamp has neither a lower nor an upper bound")
    bounds = [bound for bound in (low, high) if bound is not None]
    return TensorSpec(promote(x, *bounds), x.shape)


def where(condition: TensorSpec, x: Operand, other: Operand) -> TensorSpec:
    """x where the condition holds, other elsewhere."""
    need(condition.dtype == "bool", f"the condition is {condition.dtype}; it must be bool")
    shapes = [part.shape for part in (x, other) if isinstance(part, TensorSpec)]
    return TensorSpec(promote(x, other), broadcast(condition.shape, *shapes))


def masked_fill(x: TensorSpec, mask: TensorSpec, value: Scalar) -> TensorSpec:
    """`value` where the mask holds."""
    need(mask.dtype == "bool", f"the mask is {mask.dtype}; it must be bool")
    need(promote(x, value) == x.dtype, f"{value!r} does not fit into {x.dtype}")
    return TensorSpec(x.dtype, broadcast(x.shape, mask.shape))


def triangle(x: TensorSpec, diagonal: int) -> TensorSpec:
    """A triangle of the last two dimensions."""
    need(x.rank >= 2, f"{x} has fewer than two dimensions")
    need(abs(diagonal) <= 1 << 31, f"diagonal {diagonal} is out of range")
    return x


def cast(x: TensorSpec, dtype: str) -> TensorSpec:
    """Another dtype."""
    return TensorSpec(dtype, x.shape)


# Made from nothing.


def arange(start: int, end: int, step: int, dtype: str) -> TensorSpec:
    """Numbers from start to before end."""
    need(step != 0 and (end - start) * step >= 0, f"step {step} does not lead to {end}")
    count = max(0, -(-(end - start) // step))
    need(dtype != "bool", "a range cannot be bool")
    return TensorSpec(dtype, (count,))


def full(sizes: Sequence[int], value: Scalar, dtype: str) -> TensorSpec:
    """One value everywhere."""
    need(all(size >= 0 for size in sizes), f"sizes {list(sizes)} are negative")
    kind = DTYPES[dtype].kind
    fits = kind == 2 or (type(value) is not float and (kind == 1 or value in (0, 1)))
    need(fits, f"{value!r} does not fit into {dtype}")
    return TensorSpec(dtype, tuple(sizes))


def _join(a: str | None, b: str) -> str:
    if a is None or a == b:
        return b
    first, second = DTYPES[a], DTYPES[b]
    if first.kind != second.kind:
        return a if first.kind > second.kind else b
    if first.size == second.size:  # f16 with bf16, u8 with i8
        return "f32" if first.kind == 2 else "i16"
    return a if first.size > second.size else b


def _by_rank(higher: str | None, lower: str | None) -> str | None:
    if higher is None or lower is None:
        return higher or lower
    return _join(higher, lower) if DTYPES[lower].kind > DTYPES[higher].kind else higher


def _text(shapes: Sequence[Shape]) -> str:
    return " and ".join(str(list(shape)) for shape in shapes)
