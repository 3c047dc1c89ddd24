"""Scores the test digits with an untrained classifier, batch by batch, on this machine."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "digits"))

import torch
from digits import TRAINING_ROWS, Classifier, load

torch.manual_seed(0)
module, (images, labels) = Classifier().eval(), load()
rows = images[TRAINING_ROWS:]

scores = torch.zeros(len(rows), 10)
for start in range(0, len(rows), 64):
    span = slice(start, start + 64)
    with torch.no_grad():
        scores[span] = module(rows[span])
    print(f"{int(scores.any(1).sum())} of {len(rows)} rows")

print(f"{(scores.argmax(1) == labels[TRAINING_ROWS:]).sum()} are right")
