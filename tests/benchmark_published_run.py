#!/usr/bin/env python3
"""The published run, with its two faults, on the split that Q3.py makes: what Q2.md compares Q3.py with.

    python tests/benchmark_published_run.py --data inaturalist_12k --weights resnet50.pth

The protocol is that of `Q3.py --recipe reference`, written as the usual plain loop. The faults are the published ones:
layer3 is meant to learn and is in no optimiser group, so it never moves (its gradients, which changed nothing, are not
even computed here); and model.train() reaches the frozen layers too, so their BatchNorm statistics drift with every batch.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmark_training import one_pass  # noqa: E402
from dataset_split import add_split_options, find_data, labelled, list_photos, split  # noqa: E402
from Q3 import build_network, pick_device  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="inaturalist_12k", metavar="DIR")
    parser.add_argument("--weights", default="IMAGENET1K_V2", metavar="SPEC")
    parser.add_argument("--epochs", type=int, default=5, metavar="N")
    add_split_options(parser, fraction=0.25)
    args = parser.parse_args()

    data = find_data(args.data)
    manifest = split(list_photos(data / "train"), args.fraction, args.val_fraction, args.seed)
    train, val = (labelled(data / "train", manifest[part], manifest["classes"]) for part in ("train", "val"))
    test = labelled(data / "val", sum(list_photos(data / "val").values(), []), manifest["classes"])
    print(f"{len(train):,} training, {len(val):,} validation, {len(test):,} test photos")

    device = pick_device("auto")
    torch.manual_seed(args.seed)
    model = build_network(args.weights, len(manifest["classes"])).to(device).requires_grad_(False)
    nn.ModuleList([model.layer4, model.fc]).requires_grad_(True)
    optimizer = torch.optim.Adam([{"params": model.fc.parameters(), "lr": 1e-3}, {"params": model.layer4.parameters(), "lr": 1e-4}])

    print("Epoch | Train Loss | Train Acc | Val Loss | Val Acc")
    best_accuracy, best_state = -1, None
    for epoch in range(1, args.epochs + 1):
        train_loss, train_acc = one_pass(model, [], train, device, optimizer)
        val_loss, val_acc = one_pass(model, [], val, device)
        print(f"{epoch:5} | {train_loss:10.4f} | {train_acc:9.4f} | {val_loss:8.4f} | {val_acc:7.4f}", flush=True)
        if val_acc > best_accuracy:
            best_accuracy, best_state = val_acc, copy.deepcopy(model.state_dict())
    model.load_state_dict(best_state)
    print("Test of the best epoch: loss {:.4f}, accuracy {:.4f}".format(*one_pass(model, [], test, device)))


if __name__ == "__main__":
    main()
