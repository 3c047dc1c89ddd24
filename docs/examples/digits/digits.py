"""A classifier of handwritten digits, trained on the 1,797 images that come with scikit-learn.

python digits.py              writes train.npz (labelled) and test.npz (images alone)
python digits.py WEIGHTS      says how many test images a job's result gets right
python digits.py WEIGHTS out  exports the trained classifier as the program `out`
"""

import sys
from pathlib import Path

import numpy
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from meshd.node.arrays import tensors_from_safetensors
from meshd.node.workloads.export import export_program

TRAINING_ROWS = 1500


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def forward(self, image):
        return self.layers(image)


class Loss(nn.Module):
    """What training minimises: a scalar of a batch."""

    def __init__(self):
        super().__init__()
        self.classifier = Classifier()

    def forward(self, image, label):
        return cross_entropy(self.classifier(image), label)


def load():
    """Return images, f32[rows, 64] from 0 to 1, and labels, i64[rows]."""
    digits = load_digits()
    images = (digits.images.reshape(-1, 64) / 16).astype("float32")
    return torch.from_numpy(images), torch.from_numpy(digits.target.astype("int64"))


def build():
    """What `meshd program export --training` calls: a module and an example of its batch."""
    torch.manual_seed(0)
    images, labels = load()
    return Loss(), {"image": images[:4], "label": labels[:4]}


def trained(weights):
    """Return the classifier with the weights of a training job's result."""
    module = Loss()
    module.load_state_dict(tensors_from_safetensors(Path(weights).read_bytes()))
    return module.classifier


def main():
    images, labels = load()
    test = images[TRAINING_ROWS:]
    if len(sys.argv) == 1:
        train = {"image": images[:TRAINING_ROWS], "label": labels[:TRAINING_ROWS]}
        numpy.savez("train.npz", **{name: array.numpy() for name, array in train.items()})
        numpy.savez("test.npz", image=test.numpy())
    elif len(sys.argv) == 2:
        right = (trained(sys.argv[1])(test).argmax(1) == labels[TRAINING_ROWS:]).sum()
        print(f"{right} of {len(test)} test images are right")
    else:
        program = export_program(trained(sys.argv[1]), {"image": test[:4]}, outputs=["score"])
        Path(sys.argv[2]).write_bytes(program)


if __name__ == "__main__":
    main()
