"""Reads an exported torch graph into a program's graph and weights (author's side)."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx import Node as FxNode

from meshd.node.workloads.conversions import CONVERSIONS
from meshd.node.workloads.errors import ExportError, WorkloadError
from meshd.node.workloads.export_builder import Builder, Traced, dtype_name
from meshd.node.workloads.operators import OPERATORS
from meshd.node.workloads.planning import check_program
from meshd.node.workloads.program import (
    Argument,
    Graph,
    Node,
    Output,
    Ref,
    encode_program,
    parse_program,
)
from meshd.node.workloads.tensorfile import TensorData, file_order
from meshd.node.workloads.tensors import Column

_NO_GRAD: Final = "wrap_with_set_grad_enabled"
_DROPPED: Final = ("_assert", "sym_constrain", "_guard", "_check")
_HINTS: Final = {
    "einsum": "matmul with transpose",
    "baddbmm": "matmul and add",
    "nll_loss_nd": "cross_entropy on the logits",
    "nonzero": "where with three arguments",
    "masked_select": "where with three arguments",
    "one_hot": "eq with arange",
    "rand": "an input that carries the numbers",
    "randn": "an input that carries the numbers",
    "empty": "zeros",
    "upsample_nearest2d": "expand and reshape",
    "multinomial": "argmax",
    "lstm": "attention: recurrent layers come later",
    "gru": "attention: recurrent layers come later",
}


class _Unsupported:
    """Stands for a value that has no program; an error only when the outputs need it."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class GraphReader:
    """Reads one exported graph and writes it as a program."""

    def __init__(
        self, traced: torch.export.ExportedProgram, output_names: Sequence[str] | None
    ) -> None:
        self._traced = traced
        self._output_names = output_names
        signature = traced.graph_signature
        self._weight_of = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        self._env: dict[FxNode, Any] = {}
        self._arrays: list[tuple[str, Tensor, bool]] = []

    def program(self) -> bytes:
        """Return the file."""
        graph = self._traced.graph
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        inputs = [node for node in placeholders if node.name not in self._weight_of]
        self._bind_weights([node for node in placeholders if node.name in self._weight_of])
        columns: list[Column] = []
        first = len(self._arrays)
        for at, node in enumerate(inputs):
            meta = node.meta["val"]
            if not isinstance(meta, Tensor):
                raise ExportError(f"input {node.name!r} is not an array; make it a constant")
            self._env[node] = Traced(Ref(first + at), meta)
            shape = tuple(int(size) for size in meta.shape[1:])
            columns.append(Column(node.name, dtype_name(meta.dtype), shape))
        symbol = inputs[0].meta["val"].shape[0]
        if isinstance(symbol, int):
            raise ExportError(f"the module works for exactly {symbol} rows; it must for any number")
        self._build = Builder(first + len(inputs), symbol.node.expr, Ref(first))
        results = self._read(graph)
        return self._finish(columns, self._outputs(results))

    def _bind_weights(self, nodes: Sequence[FxNode]) -> None:
        names: dict[tuple[Any, ...], str] = {}
        for name, array in {**self._traced.state_dict, **self._traced.constants}.items():
            if isinstance(array, Tensor):
                names.setdefault(_storage(array, name), name)
        known: dict[str, Traced] = {}
        for node in nodes:
            own = self._weight_of[node.name]
            array = self._array(own)
            name = names[_storage(array, own)]
            if name not in known:
                known[name] = Traced(Ref(len(self._arrays)), node.meta["val"])
                trained = isinstance(array, nn.Parameter) and array.requires_grad
                self._arrays.append((name, array, trained))
            self._env[node] = known[name]

    def _array(self, name: str) -> Tensor:
        found = self._traced.state_dict.get(name, self._traced.constants.get(name))
        if not isinstance(found, Tensor):
            raise ExportError(f"{name} is a {type(found).__name__}, not an array")
        return found

    def _read(self, graph: torch.fx.Graph) -> list[Any]:
        for node in graph.nodes:
            if node.op == "output":
                listed = node.args[0]
                return [self._value(part) for part in _listed(listed)]
            if node.op == "call_function":
                self._env[node] = self._call(node)
            elif node.op not in ("placeholder", "get_attr"):
                raise ExportError(f"the traced graph has a step {node.op} {node.target}")
        raise ExportError("the traced graph has no output")

    def _call(self, node: FxNode) -> Any:
        target = str(node.target)
        if _NO_GRAD in target:
            return self._without_gradient(node)
        if getattr(node.target, "__name__", "") == "getitem":
            source = self._value(node.args[0])
            place = node.args[1]
            assert isinstance(place, int)
            return source[place] if isinstance(source, list) else source
        if isinstance(node.meta.get("val"), (int, float, bool, torch.SymInt, torch.SymBool)):
            return None
        name = target.removeprefix("aten.")
        if name.startswith(_DROPPED):
            return None
        try:
            return self._convert(node, name)
        except ExportError as error:
            return _Unsupported(f"{error}{_line(node)}")

    def _convert(self, node: FxNode, name: str) -> Any:
        base, _, overload = name.partition(".")
        changes = base.endswith("_") and not base.startswith("__")
        if changes:
            name = f"{base[:-1]}.{overload}"
            self._check_change(node)
        if name not in CONVERSIONS or not _is_aten(node):
            raise ExportError(f"operator {name} is not in the table; {_nearest(name)}")
        call = self._bound(node)
        for part in _flat(call.values()):
            if isinstance(part, _Unsupported):
                return part
        call = {"copy": False, **call}
        if changes:
            call.setdefault("alpha", 1)
        result = CONVERSIONS[name](self._build, call, node.meta["val"])
        if isinstance(result, list):
            return [Traced(part, meta) for part, meta in zip(result, node.meta["val"], strict=True)]
        value = result if isinstance(result, Traced) else Traced(result, node.meta["val"])
        if changes:
            changed = node.args[0]
            assert isinstance(changed, FxNode)
            self._env[changed] = value
        return value

    def _check_change(self, node: FxNode) -> None:
        """Allow a change in place only where nobody else can see the old or new value."""
        changed = node.args[0]
        assert isinstance(changed, FxNode)
        operator = str(changed.target).removeprefix("aten.")
        views = {n for n, op in OPERATORS.items() if op.view} | {"view", "alias", "t", "squeeze"}
        is_view = operator.partition(".")[0] in views or changed.op == "placeholder"
        seen = any(
            str(user.target).removeprefix("aten.").partition(".")[0] in views
            for user in changed.users
            if user is not node
        )
        if is_view or seen:
            raise ExportError(
                f"{node.target} changes an array in place that others see; use the plain operator"
            )

    def _bound(self, node: FxNode) -> dict[str, Any]:
        """Return the call's arguments by their schema names, defaults filled in."""
        schema = node.target._schema  # type: ignore[union-attr]
        call: dict[str, Any] = {}
        for at, argument in enumerate(schema.arguments):
            if at < len(node.args):
                given: Any = node.args[at]
            elif argument.name in node.kwargs:
                given = node.kwargs[argument.name]
            else:
                given = argument.default_value if argument.has_default_value() else None
            call[argument.name] = self._value(given)
        return call

    def _value(self, part: Any) -> Any:
        if isinstance(part, FxNode):
            number = part.meta.get("val")
            if isinstance(number, (torch.SymInt, int)) and not isinstance(number, bool):
                return number
            return self._env[part]
        if isinstance(part, (list, tuple)):
            return [self._value(element) for element in part]
        return part

    def _without_gradient(self, node: FxNode) -> Any:
        """Inline a region that torch marked as recording gradients or not."""
        enabled, inner = node.args[0], node.args[1]
        assert isinstance(inner, FxNode)
        region = getattr(self._traced.graph_module, str(inner.target))
        assert isinstance(region, GraphModule)
        given = [self._value(part) for part in node.args[2:]]
        sources = [n for n in region.graph.nodes if n.op == "placeholder"]
        self._env.update(zip(sources, given, strict=True))
        results = self._read(region.graph)
        if enabled:
            return results
        return [
            Traced(self._build.add("detach", part), part.meta) if isinstance(part, Traced) else part
            for part in results
        ]

    def _outputs(self, results: Sequence[Any]) -> list[Output]:
        names = list(self._output_names or self._names_of(len(results)))
        if len(names) != len(results):
            raise ExportError(f"{len(results)} outputs, but the names are {', '.join(names)}")
        found: list[Output] = []
        for name, result in zip(names, results, strict=True):
            if isinstance(result, _Unsupported):
                raise ExportError(result.reason)
            if not isinstance(result, Traced):
                raise ExportError(f"output {name!r} is {result!r}, not an array")
            shape = result.meta.shape
            if len(shape) and (isinstance(shape[0], int) or shape[0].node.expr != self._build.rows):
                raise ExportError(f"output {name!r} has shape {list(shape)}: rows must come first")
            sizes = (None, *(int(size) for size in shape[1:])) if len(shape) else ()
            found.append(Output(name, dtype_name(result.meta.dtype), sizes, result.ref.index))
        return found

    def _names_of(self, count: int) -> list[str]:
        spec = self._traced.call_spec.out_spec
        if spec is not None and spec.type is dict and len(spec.context) == count:
            return [str(name) for name in spec.context]
        return ["out"] if count == 1 else [f"out{at}" for at in range(count)]

    def _finish(self, columns: list[Column], outputs: list[Output]) -> bytes:
        weights = [
            TensorData(name, dtype_name(array.dtype), tuple(array.shape), _packed(array))
            for name, array, _ in self._arrays
        ]
        nodes, renumber, kept = _prune(
            self._build.nodes, [output.value for output in outputs], weights, len(columns)
        )
        trainable = sorted(
            name for at, (name, _, trained) in enumerate(self._arrays) if trained and at in kept
        )
        graph = Graph(
            tuple(columns),
            tuple(Output(o.name, o.dtype, o.shape, renumber[o.value]) for o in outputs),
            tuple(nodes),
            tuple(trainable),
        )
        try:
            data = encode_program(graph, [weights[at] for at in sorted(kept)])
            check_program(parse_program(data))
        except WorkloadError as error:
            raise ExportError(f"the module cannot be a program: {error}") from error
        return data


def _prune(
    nodes: Sequence[Node], wanted: Sequence[int], weights: Sequence[TensorData], inputs: int
) -> tuple[list[Node], dict[int, int], set[int]]:
    """Drop what no output needs; return nodes, new numbers of values, and weights kept."""
    first = len(weights) + inputs
    starts: list[int] = []
    at = first
    for node in nodes:
        starts.append(at)
        at += node.results
    needed, keep = set(wanted), set[int]()
    for number in reversed(range(len(nodes))):
        made = range(starts[number], starts[number] + nodes[number].results)
        if needed.intersection(made):
            keep.add(number)
            needed.update(_refs(nodes[number].arguments))
    kept = {index for index in range(len(weights)) if index in needed}
    order = sorted(kept, key=lambda at: file_order(weights[at].dtype, weights[at].name))
    renumber = {index: place for place, index in enumerate(order)}
    renumber |= {len(weights) + place: len(order) + place for place in range(inputs)}
    count = len(order) + inputs
    result: list[Node] = []
    for number in sorted(keep):
        node = nodes[number]
        arguments = tuple(_renumbered(part, renumber) for part in node.arguments)
        result.append(Node(node.operator, arguments, node.results))
        for offset in range(node.results):
            renumber[starts[number] + offset] = count + offset
        count += node.results
    return result, renumber, kept


def _refs(arguments: Sequence[Argument]) -> Iterator[int]:
    for part in arguments:
        if isinstance(part, Ref):
            yield part.index
        elif isinstance(part, tuple):
            yield from _refs(part)


def _renumbered(argument: Argument, renumber: Mapping[int, int]) -> Argument:
    if isinstance(argument, Ref):
        return Ref(renumber[argument.index])
    if isinstance(argument, tuple):
        return tuple(_renumbered(part, renumber) for part in argument)
    return argument


def _storage(array: Tensor, name: str) -> tuple[Any, ...]:
    """Return what tied weights have in common; empty ones share nothing."""
    shared = (array.data_ptr(), array.stride()) if array.numel() else (name,)
    return (*shared, tuple(array.shape), array.dtype)


def _is_aten(node: FxNode) -> bool:
    """Whether a traced call is one of torch's own operators."""
    return getattr(node.target, "namespace", "") == "aten"


def _nearest(name: str) -> str:
    base = name.partition(".")[0].rstrip("_")
    if base in _HINTS:
        return f"use {_HINTS[base]}"
    known = sorted({key.partition(".")[0] for key in CONVERSIONS})
    near = difflib.get_close_matches(base, known, n=1, cutoff=0.7)
    return f"the nearest that is: {near[0]}" if near else "write it with operators that are"


def _line(node: FxNode) -> str:
    trace = node.meta.get("stack_trace") or ""
    lines = [line.strip() for line in trace.strip().splitlines() if line.strip()]
    places = [at for at, line in enumerate(lines) if line.startswith("File ")]
    return f" ({' '.join(lines[places[-1] : places[-1] + 2])})" if places else ""


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [value]


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list):
            yield from _flat(value)
        else:
            yield value


def _packed(array: Tensor) -> bytes:
    flat = array.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
