"""The program with which a machine measures its own speed: two layers, as most models have."""

import struct

from meshd.node.workloads.program import Graph, Node, Output, Ref, encode_program
from meshd.node.workloads.rows import RowSchema, pack
from meshd.node.workloads.tensorfile import TensorData
from meshd.node.workloads.tensors import Column


def benchmark_program(width: int = 512, hidden: int = 2048) -> bytes:
    """Return x -> layer_norm(W2 gelu(W1 x)), f32[width]: at least 4 width hidden units a row."""
    weights = [
        TensorData("w1", "f32", (hidden, width), struct.pack("<f", 0.01) * (hidden * width)),
        TensorData("w2", "f32", (width, hidden), struct.pack("<f", 0.02) * (hidden * width)),
    ]
    nodes = (
        Node("linear", (Ref(2), Ref(0), None)),
        Node("gelu", (Ref(3), "none")),
        Node("linear", (Ref(4), Ref(1), None)),
        Node("layer_norm", (Ref(5), (width,), None, None, 1e-5)),
    )
    graph = Graph(
        (Column("x", "f32", (width,)),), (Output("y", "f32", (None, width), 6),), nodes, ()
    )
    return encode_program(graph, weights)


def benchmark_rows(width: int = 512, count: int = 512) -> bytes:
    """Return packed rows for the benchmark program of that width."""
    row = b"".join(struct.pack("<f", (at % 17) / 17) for at in range(width))
    return pack(RowSchema((Column("x", "f32", (width,)),)), [row] * count)
