"""A tiny language model of bytes, trained on the source text of Python's standard library.

python language.py                  writes text.npz, windows of 65 bytes
python language.py WEIGHTS 'text'   goes on from a text with a job's result
"""

import sys
import sysconfig
from pathlib import Path

import numpy
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from meshd.node.arrays import tensors_from_safetensors

CONTEXT, WIDTH, HEADS, LAYERS = 64, 96, 4, 2
WINDOWS = 8192


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.project = nn.Linear(WIDTH, 3 * WIDTH)
        self.join = nn.Linear(WIDTH, WIDTH)
        self.widen, self.narrow = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        batch, length, _ = x.shape
        parts = self.project(self.first(x)).reshape(batch, length, 3 * HEADS, -1)
        query, key, value = parts.transpose(1, 2).split(HEADS, dim=1)
        seen = scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.join(seen.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.narrow(nn.functional.gelu(self.widen(self.second(x))))


class Language(nn.Module):
    """The next byte's logits at every place of a window."""

    def __init__(self):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.last, self.logits = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 256)

    def forward(self, window):
        x = self.bytes(window) + self.places(torch.arange(window.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.logits(self.last(x))


class Loss(nn.Module):
    """Nats per byte over windows of 65 bytes."""

    def __init__(self):
        super().__init__()
        self.language = Language()

    def forward(self, window):
        logits = self.language(window[:, :-1])
        return cross_entropy(logits.reshape(-1, 256), window[:, 1:].reshape(-1))


def windows():
    """Return windows of 65 bytes, i64, of the library's own source files in their order."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"".join(path.read_bytes() for path in files)[: WINDOWS * (CONTEXT + 1)]
    usable = len(text) // (CONTEXT + 1) * (CONTEXT + 1)
    return torch.tensor(list(text[:usable])).reshape(-1, CONTEXT + 1)


def build():
    """What `meshd program export --training` calls: a module and an example of its batch."""
    torch.manual_seed(0)
    return Loss(), {"window": windows()[:4]}


def main():
    if len(sys.argv) == 1:
        numpy.savez("text.npz", window=windows().numpy())
        return
    module = Loss()
    module.load_state_dict(tensors_from_safetensors(Path(sys.argv[1]).read_bytes()))
    text = list(sys.argv[2].encode())
    for _ in range(200):
        seen = torch.tensor([text[-CONTEXT:]])
        text.append(int(module.language(seen)[0, -1].argmax()))
    print(bytes(text).decode(errors="replace"))


if __name__ == "__main__":
    main()
