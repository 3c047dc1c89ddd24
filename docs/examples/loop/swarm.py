"""Scores the test digits with an untrained classifier, batch by batch, in the swarm."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "digits"))

import torch
from digits import TRAINING_ROWS, Classifier, load

from meshd.node.client import connect

torch.manual_seed(0)
module, (images, labels) = Classifier().eval(), load()
rows = images[TRAINING_ROWS:]

scores = torch.zeros(len(rows), 10)
job = connect().infer(module, {"image": rows}, price="100", cap="100", time={"window": "5s"})
for span, found in job.results():
    scores[span.start : span.stop] = found["out"]
    print(f"{int(scores.any(1).sum())} of {len(rows)} rows")

print(f"{(scores.argmax(1) == labels[TRAINING_ROWS:]).sum()} are right")
