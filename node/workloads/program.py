"""The program format: a graph of known operators and its weights, in one file with one encoding.

Layout: `MESHPRG1`, u32le length of the graph, the graph (canonical msgpack), then a canonical
safetensors file. Values are numbered: weights in the order of their file, inputs, then the
results of each node. An argument is a reference (extension 1, u32be), an int, float, bool,
dtype, word, nothing, or a list of these; there are no expressions. The only dimension that is
not a number is that of the rows, the first of every input.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgpack
from blake3 import blake3

from meshd.node.workloads.errors import ProgramError, TensorFileError
from meshd.node.workloads.operators import OPERATORS, SYM_SIZE, Parameter
from meshd.node.workloads.rows import MAX_COLUMNS, RowSchema
from meshd.node.workloads.strictpack import REF_CODE, Reader, column_problem, packed_columns
from meshd.node.workloads.tensorfile import (
    StoredTensor,
    TensorData,
    parse_tensors,
    write_tensors,
)
from meshd.node.workloads.tensors import DTYPES, MAX_RANK, Column

MAGIC: Final = b"MESHPRG1"
VERSION: Final = 1
MAX_GRAPH: Final = 8 << 20
MAX_NODES: Final = 20_000
MAX_LIST: Final = 1024
MAX_VALUES: Final = 1 << 20

Buffer = bytes | bytearray | memoryview

_FOREIGN: Final = (
    (b"PK\x03\x04", "a zip archive (.pt, .pth, .pt2, .npz): such files can carry code"),
    (b"\x80\x02", "a pickle: unpickling runs code"),
    (b"\x80\x03", "a pickle: unpickling runs code"),
    (b"\x80\x04", "a pickle: unpickling runs code"),
    (b"\x80\x05", "a pickle: unpickling runs code"),
    (b"\x08", "ONNX, perhaps: it is imported on the author's side only"),
)
_FOREIGN_ENDINGS: Final = {
    ".pt2": "torch.export archives are code: torch.export.load runs what they contain",
    ".pt": "it is a pickle: unpickling runs code",
    ".pth": "it is a pickle: unpickling runs code",
    ".pkl": "it is a pickle: unpickling runs code",
    ".pickle": "it is a pickle: unpickling runs code",
    ".bin": "it is a pickle: unpickling runs code",
    ".onnx": "ONNX is imported on the author's side only",
}
_CURE: Final = "export the module with `meshd program export`"


@dataclass(frozen=True, slots=True)
class Ref:
    """A reference to a value by its number."""

    index: int


Argument = Ref | bool | int | float | str | None | tuple["Argument", ...]


@dataclass(frozen=True, slots=True)
class Node:
    """One step: an operator, one argument for each of its parameters, how many results it has."""

    operator: str
    arguments: tuple[Argument, ...]
    results: int = 1


@dataclass(frozen=True, slots=True)
class Output:
    """A result: one array of (rows, *shape), or, without rows, one number (a loss or metric)."""

    name: str
    dtype: str
    shape: tuple[int | None, ...]
    """None stands for the rows; a loss has the empty shape."""
    value: int


@dataclass(frozen=True, slots=True)
class Graph:
    """What a program computes, without weights."""

    inputs: tuple[Column, ...]
    """Name, dtype and shape of one row of each input."""
    outputs: tuple[Output, ...]
    nodes: tuple[Node, ...]
    trainable: tuple[str, ...]
    """Names of the weights that training changes, sorted."""


@dataclass(frozen=True, slots=True)
class Program:
    """A program whose form was checked, and its size in bytes. See `planning` for its shapes."""

    graph: Graph
    weights: tuple[StoredTensor, ...]
    digest: bytes
    """BLAKE3 of the file."""
    size: int

    @property
    def inputs(self) -> tuple[Column, ...]:
        """What it reads: columns of a dataset, by name."""
        return self.graph.inputs

    @property
    def outputs(self) -> tuple[Output, ...]:
        """What it returns."""
        return self.graph.outputs

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Its steps in order."""
        return self.graph.nodes

    @property
    def input_schema(self) -> RowSchema:
        """The rows that a shard of it reads, columns sorted by name as datasets have them."""
        return RowSchema(tuple(sorted(self.inputs, key=lambda column: column.name)))

    @property
    def output_schema(self) -> RowSchema:
        """The rows that it returns. Raises ProgramError when it computes a loss instead."""
        columns: list[Column] = []
        for output in self.outputs:
            if not output.shape or output.shape[0] is not None:
                raise ProgramError(
                    f"output {output.name!r} is a number, not rows: this program trains, "
                    "it does not infer"
                )
            sizes = tuple(size for size in output.shape[1:] if size is not None)
            columns.append(Column(output.name, output.dtype, sizes))
        return RowSchema(tuple(columns))


def program_digest(data: Buffer) -> bytes:
    """Return the content address of a program's file: its BLAKE3."""
    return blake3(data).digest()


def refuse_foreign(name: str) -> None:
    """Raise ProgramError when a file's name says that it is code, a pickle or ONNX."""
    for ending, reason in _FOREIGN_ENDINGS.items():
        if name.lower().endswith(ending):
            raise ProgramError(f"{name} is not a program: {reason}; {_CURE}")


def encode_program(graph: Graph, weights: Sequence[TensorData]) -> bytes:
    """Return the file of a program. Raises ProgramError when graph and weights do not fit."""
    packed = _encode_graph(graph)
    try:
        file = write_tensors(weights)
    except TensorFileError as error:
        raise ProgramError(f"weights: {error}") from error
    data = MAGIC + struct.pack("<I", len(packed)) + packed + file
    parse_program(data)
    return data


def parse_program(data: Buffer) -> Program:
    """Check `data` against the format and return what it holds; weights stay where they are.

    Form, bounds, names, argument kinds, references and the canonical encoding are checked;
    shapes are checked by `planning.plan` for a number of rows. Raises ProgramError.
    """
    view = memoryview(data).cast("B")
    if len(view) < 12 or bytes(view[:8]) != MAGIC:
        for magic, reason in _FOREIGN:
            if bytes(view[: len(magic)]) == magic:
                raise ProgramError(f"these bytes are no program but {reason}; {_CURE}")
        raise ProgramError(f"these bytes are no program: they do not start with MESHPRG1; {_CURE}")
    (length,) = struct.unpack_from("<I", view, 8)
    if length > min(MAX_GRAPH, len(view) - 12):
        raise ProgramError(f"the graph claims {length} bytes; at most {MAX_GRAPH}, within the file")
    try:
        weights = parse_tensors(data, start=12 + length)
    except TensorFileError as error:
        raise ProgramError(f"weights: {error}") from error
    packed = bytes(view[12 : 12 + length])
    graph = _decode_graph(packed, [tensor.name for tensor in weights])
    trainable = set(graph.trainable)
    for tensor in weights:
        if tensor.name in trainable and DTYPES[tensor.dtype].kind != 2:
            raise ProgramError(f"weight {tensor.name!r} is {tensor.dtype}: only floats are trained")
    if _encode_graph(graph) != packed:
        raise ProgramError("the graph is not in canonical form; export the program again")
    return Program(graph, tuple(weights), program_digest(data), len(view))


def _encode_graph(graph: Graph) -> bytes:
    outputs = [
        [output.name, output.dtype, list(output.shape), output.value] for output in graph.outputs
    ]
    nodes = [
        [node.operator, [_encode_argument(part) for part in node.arguments], node.results]
        for node in graph.nodes
    ]
    packed: bytes = msgpack.packb(
        [VERSION, packed_columns(graph.inputs), list(graph.trainable), nodes, outputs]
    )
    if len(packed) > MAX_GRAPH:
        raise ProgramError(f"the graph takes {len(packed)} bytes; at most {MAX_GRAPH} are allowed")
    return packed


def _encode_argument(argument: Argument) -> object:
    if isinstance(argument, Ref):
        return msgpack.ExtType(REF_CODE, struct.pack(">I", argument.index))
    if isinstance(argument, tuple):
        return [_encode_argument(part) for part in argument]
    return argument


def _decode_graph(packed: bytes, weights: Sequence[str]) -> Graph:
    reader = Reader(packed, ProgramError, "program")
    reader.array(5, 5, "parts")
    version = reader.leaf("the version")
    if type(version) is not int or version != VERSION:
        raise reader.fail(f"version {version!r} is not known; this meshd reads version {VERSION}")
    inputs = reader.columns(1, MAX_COLUMNS)
    trainable = tuple(
        reader.text("a trainable weight")
        for _ in range(reader.array(0, len(weights), "trainable weights"))
    )
    if list(trainable) != sorted(set(trainable)) or not set(trainable) <= set(weights):
        raise reader.fail("the trainable weights are not sorted names of weights")
    values = len(weights) + len(inputs)
    nodes: list[Node] = []
    for at in range(reader.array(0, MAX_NODES, "nodes")):
        nodes.append(_decode_node(reader, at, values))
        values += nodes[-1].results
        if values > MAX_VALUES:
            raise reader.fail(f"more than {MAX_VALUES} values; make the program smaller")
    outputs = tuple(
        _decode_output(reader, values) for _ in range(reader.array(1, MAX_COLUMNS, "outputs"))
    )
    reader.finish()
    if len({output.name for output in outputs}) != len(outputs):
        raise reader.fail("two outputs have the same name; names are unique")
    return Graph(inputs, outputs, tuple(nodes), trainable)


def _decode_node(reader: Reader, at: int, values: int) -> Node:
    reader.array(3, 3, f"parts of node {at}")
    name = reader.text(f"the operator of node {at}")
    if name == SYM_SIZE:
        parameters: tuple[Parameter, ...] = (Parameter("x", "tensor"), Parameter("dim", "int"))
    elif name in OPERATORS:
        parameters = OPERATORS[name].parameters
    else:
        raise reader.fail(f"node {at}: operator {name[:80]!r} is not in the table of operators")
    where = f"node {at} ({name})"
    reader.array(len(parameters), len(parameters), f"arguments of {where}")
    arguments = tuple(
        _decode_argument(reader, parameter, values, where) for parameter in parameters
    )
    return Node(name, arguments, reader.integer(1, MAX_LIST, f"the results of {where}"))


def _decode_argument(reader: Reader, parameter: Parameter, values: int, where: str) -> Argument:
    what = f"{parameter.name} of {where}"
    kind = parameter.kind
    if kind in ("tensors", "tensors?", "ints"):
        most = MAX_LIST if kind == "tensors" else MAX_RANK if kind == "tensors?" else MAX_LIST
        element = {"tensors": "tensor", "tensors?": "tensor?", "ints": "int"}[kind]
        return tuple(
            _check(reader, reader.leaf(what), element, values, what)
            for _ in range(reader.array(0, most, what))
        )
    return _check(reader, reader.leaf(what), kind, values, what)


def _check(reader: Reader, value: Any, kind: str, values: int, what: str) -> Argument:
    if kind.endswith("?"):
        if value is None:
            return None
        kind = kind[:-1]
    if isinstance(value, msgpack.ExtType) and kind in ("tensor", "operand", "int"):
        if value.code != REF_CODE or len(value.data) != 4:
            raise reader.fail(f"{what} is not a reference")
        (number,) = struct.unpack(">I", value.data)
        if number >= values:
            raise reader.fail(f"{what} refers to value {number} before it exists")
        return Ref(number)
    allowed = {
        "int": type(value) is int,
        "bool": type(value) is bool,
        "float": type(value) is float and math.isfinite(value),
        "scalar": _is_scalar(value),
        "operand": _is_scalar(value),
        "dtype": isinstance(value, str) and value in DTYPES,
    }.get(kind, isinstance(value, str) and "|" in kind and value in kind.split("|"))
    if type(value) is int and not -(1 << 63) <= value < 1 << 63:
        allowed = False
    if not allowed:
        raise reader.fail(f"{what} is {str(value)[:80]!r}; allowed is {kind}")
    checked: Argument = value
    return checked


def _is_scalar(value: object) -> bool:
    return type(value) in (bool, int) or (type(value) is float and not math.isnan(value))


def _decode_output(reader: Reader, values: int) -> Output:
    reader.array(4, 4, "parts of an output")
    name, dtype = reader.text("an output's name"), reader.text("an output's dtype")
    sizes: list[int | None] = []
    for at in range(reader.array(0, MAX_RANK, f"sizes of output {name!r}")):
        if at == 0:
            if reader.leaf("the rows") is not None:
                raise reader.fail(f"the first dimension of output {name!r} is not the rows")
            sizes.append(None)
        else:
            sizes.append(reader.integer(1, 1 << 40, f"a size of output {name!r}"))
    known = tuple(size for size in sizes if size is not None)
    if problem := column_problem(Column(name, dtype, known)):
        raise reader.fail(problem.replace("column", "output"))
    return Output(
        name, dtype, tuple(sizes), reader.integer(0, values - 1, f"the value of output {name!r}")
    )
