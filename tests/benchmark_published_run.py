#!/usr/bin/env python3
"""The published run, with its two faults, on the split that Q3.py makes: to compare Q3.py with.

    python tests/benchmark_published_run.py --data inaturalist_12k --weights resnet50.pth

takes the options of Q3.py that choose photos, weights, epochs and --out. The protocol is that of
`Q3.py --recipe reference`, written as the usual plain loop, in float32. The faults are the
published ones. layer3 is meant to learn and is in no optimiser group, so it never moves (its
gradients, which changed nothing, are not even computed here). And model.train() reaches the frozen
layers too, so that their BatchNorm statistics drift with every batch.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from benchmark_training import plain_loop

from dataset_split import exit_codes
from Q3 import get_args


def train_and_test(args) -> None:
    plain_loop(args, layers=("layer4",), held=0)


if __name__ == "__main__":
    with exit_codes():
        train_and_test(get_args())
