"""The program format: one encoding, everything bounded, everything else refused by name."""

import io
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshd.node.workloads.errors import ProgramError
from meshd.node.workloads.planning import check_program, memory_bytes, plan, units
from meshd.node.workloads.program import (
    Graph,
    Node,
    Output,
    Program,
    Ref,
    encode_program,
    parse_program,
    program_digest,
    refuse_foreign,
)
from meshd.node.workloads.tensorfile import TensorData
from meshd.node.workloads.tensors import Column, TensorSpec

WEIGHTS = [
    TensorData("layer.bias", "f32", (3,), struct.pack("<3f", 1, 2, 3)),
    TensorData("layer.weight", "f32", (3, 4), struct.pack("<12f", *range(12))),
]
# Values: 0 bias, 1 weight, 2 x, 3 rows, 4 linear, 5 and 6 halves, 7 joined.
NODES = (
    Node("sym_size", (Ref(2), 0)),
    Node("linear", (Ref(2), Ref(1), Ref(0))),
    Node("split", (Ref(4), (1, 2), 1), 2),
    Node("cat", ((Ref(6), Ref(5)), 1)),
    Node("reshape", (Ref(7), (Ref(3), -1))),
)
GRAPH = Graph(
    (Column("x", "f32", (4,)),),
    (Output("y", "f32", (None, 3), 8),),
    NODES,
    ("layer.bias", "layer.weight"),
)
DATA = encode_program(GRAPH, WEIGHTS)


def with_node(at: int, node: Node) -> Graph:
    return replace(GRAPH, nodes=(*NODES[:at], node, *NODES[at + 1 :]))


def packed_graph(data: bytes) -> Any:
    (length,) = struct.unpack_from("<I", data, 8)
    return msgpack.unpackb(data[12 : 12 + length])


def with_graph(graph: bytes) -> bytes:
    (length,) = struct.unpack_from("<I", DATA, 8)
    return DATA[:8] + struct.pack("<I", len(graph)) + graph + DATA[12 + length :]


def with_parts(change: Callable[[list[Any]], None]) -> bytes:
    parts = packed_graph(DATA)
    change(parts)
    return with_graph(msgpack.packb(parts))


def test_a_program_comes_back_as_it_was_written() -> None:
    program = parse_program(DATA)
    assert program.graph == GRAPH
    assert [(w.name, w.shape) for w in program.weights] == [
        ("layer.bias", (3,)),
        ("layer.weight", (3, 4)),
    ]
    assert bytes(program.weights[0].bytes_in(DATA)) == WEIGHTS[0].data
    assert program.digest == program_digest(DATA)
    assert program.size == len(DATA)
    check_program(program)


def test_the_order_in_which_weights_are_given_does_not_matter() -> None:
    assert encode_program(GRAPH, WEIGHTS[::-1]) == DATA


def test_inputs_are_read_by_name_and_outputs_are_rows() -> None:
    columns = (Column("z", "f32", (4,)), Column("a", "i64", ()))
    graph = Graph(columns, (Output("y", "f32", (None, 4), 0),), (), ())
    program = parse_program(encode_program(graph, []))
    assert [column.name for column in program.inputs] == ["z", "a"]
    assert [column.name for column in program.input_schema.columns] == ["a", "z"]
    assert program.output_schema.columns == (Column("y", "f32", (4,)),)


def test_a_program_that_computes_a_loss_has_no_rows() -> None:
    nodes = (*NODES, Node("sum", (Ref(8), (0, 1), False)))
    graph = replace(GRAPH, nodes=nodes, outputs=(Output("loss", "f32", (), 9),))
    program = parse_program(encode_program(graph, WEIGHTS))
    check_program(program)
    with pytest.raises(ProgramError, match="this program trains"):
        program.output_schema.header(1)


def test_units_and_memory_follow_from_program_and_rows() -> None:
    program = parse_program(DATA)
    linear, cat, reshape = 5 * 3 * (2 * 4 + 1), 5 * 3, 5 * 3
    assert units(program, 5) == linear + cat + reshape
    assert units(program, 5, training=True) == 3 * units(program, 5)
    planned = plan(program, 5)
    assert planned.values[3] == 5
    assert planned.values[8] == TensorSpec("f32", (5, 3))
    assert planned.peak_bytes < planned.total_bytes < 2000
    assert memory_bytes(program, 5, training=True) > memory_bytes(program, 5) > len(DATA)


def test_memory_is_bounded_before_anything_is_allocated() -> None:
    nodes = (Node("expand", (Ref(0), (1 << 20, -1, -1))), Node("contiguous", (Ref(1),)))
    graph = Graph(
        (Column("x", "f32", (1 << 10,)),), (Output("y", "f32", (None, 1 << 10), 0),), nodes, ()
    )
    program = parse_program(encode_program(graph, []))
    assert plan(program, 2).peak_bytes >= 8 << 30


def test_memory_that_goes_before_the_end_is_counted_once() -> None:
    def chain(length: int) -> Program:
        nodes = tuple(Node("add", (Ref(at), 1.0, 1)) for at in range(length))
        outputs = (Output("y", "f32", (None, 1024), length),)
        return parse_program(
            encode_program(Graph((Column("x", "f32", (1024,)),), outputs, nodes, ()), [])
        )

    assert plan(chain(100), 8).peak_bytes == plan(chain(10), 8).peak_bytes
    assert plan(chain(100), 8).total_bytes > 9 * plan(chain(10), 8).total_bytes


def test_a_view_keeps_what_it_looks_at_alive() -> None:
    def peak(operator: Node) -> int:
        nodes = (
            Node("add", (Ref(0), 1.0, 1)),
            operator,
            Node("add", (Ref(0), 2.0, 1)),
            Node("add", (Ref(3), Ref(2), 1)),
        )
        outputs = (Output("y", "f32", (None, 1024), 4),)
        graph = Graph((Column("x", "f32", (1024,)),), outputs, nodes, ())
        return plan(parse_program(encode_program(graph, [])), 64).peak_bytes

    view = peak(Node("slice", (Ref(1), 1, 0, 1, 1)))
    copy = peak(Node("amax", (Ref(1), (1,), True)))
    assert view >= copy + 64 * 1023 * 4


@pytest.mark.parametrize("rows", [0, -1])
def test_no_rows_are_refused(rows: int) -> None:
    with pytest.raises(ProgramError, match="at least one"):
        plan(parse_program(DATA), rows)


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        (Node("linear", (Ref(2), Ref(0), None)), "not a matrix"),
        (Node("linear", (Ref(3), Ref(1), None)), "value 3 is not"),
        (Node("reshape", (Ref(2), (Ref(2), 3))), "value 2 is not"),
        (Node("reshape", (Ref(2), (5, 3))), "cannot take"),
        (Node("unsqueeze", (Ref(2), 7)), "dimension 7"),
        (Node("unsqueeze", (Ref(2), 0), 2), "1 results"),
        (Node("sym_size", (Ref(2), 5)), "dimension 5"),
        (Node("expand", (Ref(2), (1 << 40, -1, -1))), "2\\^40"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_the_node(node: Node, reason: str) -> None:
    program = parse_program(encode_program(with_node(1, node), WEIGHTS))
    with pytest.raises(ProgramError, match=rf"node 1 \({node.operator}\), 2 rows: .*{reason}"):
        plan(program, 2)


def test_an_output_that_is_not_what_it_says_is_refused() -> None:
    graph = replace(GRAPH, outputs=(Output("y", "f32", (None, 4), 8),))
    with pytest.raises(ProgramError, match=r"output 'y' is f32\[1,3\]"):
        check_program(parse_program(encode_program(graph, WEIGHTS)))


def test_a_program_that_works_for_one_number_of_rows_only_is_refused() -> None:
    graph = with_node(4, Node("reshape", (Ref(7), (2, -1))))
    with pytest.raises(ProgramError, match=r"1 rows: .* cannot take shape \[2, -1\]"):
        check_program(parse_program(encode_program(graph, WEIGHTS)))


@pytest.mark.parametrize(
    ("graph", "reason"),
    [
        (with_node(1, Node("aten.linear", (Ref(2), Ref(1), None))), "not in the table"),
        (with_node(1, Node("__import__", ())), "not in the table"),
        (with_node(1, Node("linear", (Ref(2), Ref(1)))), "2 arguments"),
        (with_node(1, Node("linear", (Ref(2), Ref(1), Ref(9)))), "before it exists"),
        (with_node(1, Node("linear", (Ref(2), Ref(4), None))), "before it exists"),
        (with_node(1, Node("linear", (Ref(2), None, None))), "allowed is tensor"),
        (with_node(1, Node("linear", (Ref(2), 3, None))), "allowed is tensor"),
        (with_node(1, Node("unsqueeze", (Ref(2), 1.0))), "allowed is int"),
        (with_node(1, Node("unsqueeze", (Ref(2), True))), "allowed is int"),
        (with_node(1, Node("unsqueeze", (Ref(2), 1 << 63))), "allowed is int"),
        (with_node(1, Node("mul", (Ref(2), float("nan")))), "allowed is operand"),
        (with_node(1, Node("mul", (Ref(2), "two"))), "allowed is operand"),
        (with_node(1, Node("cast", (Ref(2), "float32"))), "allowed is dtype"),
        (with_node(1, Node("gelu", (Ref(2), "tahn"))), "allowed is none"),
        (with_node(1, Node("leaky_relu", (Ref(2), float("inf")))), "allowed is float"),
        (with_node(1, Node("leaky_relu", (Ref(2), 1))), "allowed is float"),
        (with_node(1, Node("sum", (Ref(2), (0,), 1))), "allowed is bool"),
        (with_node(1, Node("reshape", (Ref(2), ((1,),)))), "exceeds"),
        (with_node(1, Node("reshape", (Ref(2), 3))), "list"),
        (with_node(1, Node("relu", (Ref(2),), 0)), "results"),
        (with_node(1, Node("relu", (Ref(2),), 1 << 11)), "results"),
        (replace(GRAPH, nodes=NODES * 4001), "nodes|before"),
        (replace(GRAPH, trainable=("layer.weight", "layer.bias")), "sorted"),
        (replace(GRAPH, trainable=("layer.other",)), "sorted names"),
        (replace(GRAPH, trainable=("layer.bias",) * 2), "sorted names"),
        (replace(GRAPH, inputs=()), "columns"),
        (replace(GRAPH, inputs=(Column("x/y", "f32", ()),)), "letters"),
        (replace(GRAPH, inputs=(Column("x", "c64", ()),)), "c64"),
        (replace(GRAPH, inputs=(Column("x", "f32", (0,)),)), "empty"),
        (replace(GRAPH, inputs=(Column("x", "f32", ()),) * 2), "same name"),
        (replace(GRAPH, outputs=()), "outputs"),
        (replace(GRAPH, outputs=(Output("y", "f32", (3, 3), 8),)), "not the rows"),
        (replace(GRAPH, outputs=(Output("y", "f32", (None, 3), 9),)), "integer from 0 to 8"),
        (replace(GRAPH, outputs=(Output("y", "f32", (None, 3), 8),) * 2), "same name"),
    ],
)  # fmt: skip
def test_graphs_that_are_not_well_formed_are_refused(graph: Graph, reason: str) -> None:
    with pytest.raises(ProgramError, match=reason):
        encode_program(graph, WEIGHTS)


def test_only_floats_can_be_trained() -> None:
    weight = TensorData("n", "i64", (), bytes(8))
    graph = Graph((Column("x", "f32", ()),), (Output("y", "f32", (None,), 1),), (), ("n",))
    with pytest.raises(ProgramError, match="only floats are trained"):
        encode_program(graph, [weight])


def test_weights_that_are_not_finite_are_refused() -> None:
    weight = TensorData("layer.bias", "f32", (3,), struct.pack("<3f", 1, float("nan"), 3))
    with pytest.raises(ProgramError, match=r"weights: tensor 'layer.bias' contains NaN"):
        encode_program(GRAPH, [weight, WEIGHTS[1]])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda parts: parts.append(None), "parts"),
        (lambda parts: parts.__setitem__(0, 2), "version 2"),
        (lambda parts: parts.__setitem__(0, True), "version True"),
        (lambda parts: parts.__setitem__(3, {}), "list"),
        (lambda parts: parts[3].__setitem__(0, [["a"], [], 1]), "operator"),
        (lambda parts: parts[3][0].append(1), "parts of node 0"),
        (lambda parts: parts[3][0].__setitem__(1, [msgpack.ExtType(2, bytes(4)), 0]), "reference"),
        (lambda parts: parts[3][0].__setitem__(1, [msgpack.ExtType(1, bytes(2)), 0]), "reference"),
        (lambda parts: parts[3][0].__setitem__(1, [msgpack.Timestamp(0), 0]), "allowed is tensor"),
        (lambda parts: parts[3][0].__setitem__(1, [b"\0\0\0\2", 0]), "allowed is tensor"),
        (lambda parts: parts[3][0].__setitem__(0, "x" * 300), "operator"),
    ],
)
def test_bytes_that_only_look_like_a_graph_are_refused(
    change: Callable[[list[Any]], None], reason: str
) -> None:
    with pytest.raises(ProgramError, match=reason):
        parse_program(with_parts(change))


def test_a_second_encoding_of_the_same_graph_is_refused() -> None:
    (length,) = struct.unpack_from("<I", DATA, 8)
    graph = DATA[12 : 12 + length]
    assert parse_program(with_graph(graph)).graph == GRAPH
    with pytest.raises(ProgramError, match="canonical"):
        parse_program(with_graph(b"\xdc\x00\x05" + graph[1:]))
    with pytest.raises(ProgramError, match="left over"):
        parse_program(with_graph(graph + b"\xc0"))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "MESHPRG1"),
        (b"MESHPRG1", "MESHPRG1"),
        (b"MESHPRG1" + b"\xff" * 4, "claims"),
        (DATA[:40], "claims"),
        (DATA[:-1], "weights"),
        (DATA + b"\0", "weights"),
        (with_graph(b"\x95" + b"\xdd\xff\xff\xff\xff" * 2), "version"),
        (with_graph(b"\xdd\xff\xff\xff\xff"), "4294967295 parts"),
        (with_graph(b"\x90" * 1_000_000), "0 parts"),
    ],
)
def test_bytes_that_are_no_program_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(ProgramError, match=reason):
        parse_program(data)


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (zipped(), "can carry code"),
        *(
            (pickle.dumps({}, protocol=protocol), "unpickling runs code")
            for protocol in (2, 3, 4, 5)
        ),
        (b"\x08\x07\x12\x07pytorch", "ONNX"),
    ],
)
def test_foreign_formats_are_refused_by_name(data: bytes, reason: str) -> None:
    with pytest.raises(ProgramError, match=f"(?s){reason}.*meshd program export"):
        parse_program(data)


@pytest.mark.parametrize("name", ["a.pt2", "B.PT", "c.pth", "d.pkl", "e.onnx", "f.bin"])
def test_foreign_files_are_refused_by_their_ending(name: str) -> None:
    with pytest.raises(ProgramError, match=f"{name} is not a program"):
        refuse_foreign(name)


def test_other_endings_are_not_refused() -> None:
    refuse_foreign("model.meshd")


@given(st.integers(0, len(DATA) - 1), st.integers(0, 255))
@settings(max_examples=500)
def test_a_changed_byte_is_another_program_or_refused(at: int, value: int) -> None:
    data = bytearray(DATA)
    data[at] = value
    try:
        program = parse_program(bytes(data))
        check_program(program)
    except ProgramError:
        return
    weights = [TensorData(w.name, w.dtype, w.shape, w.bytes_in(data)) for w in program.weights]
    assert encode_program(program.graph, weights) == bytes(data)


@given(st.binary(max_size=100), st.integers(0, 100), st.integers(0, 100))
@settings(max_examples=300)
def test_bytes_put_in_or_cut_out_make_no_program_of_the_same_digest(
    junk: bytes, at: int, cut: int
) -> None:
    data = DATA[:at] + junk + DATA[at + cut :]
    try:
        program = parse_program(data)
    except ProgramError:
        return
    assert data == DATA or program.digest != program_digest(DATA)
