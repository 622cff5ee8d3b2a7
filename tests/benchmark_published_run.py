#!/usr/bin/env python3
"""The published run, with its two faults, on the split that Q3.py makes: what Q2.md compares Q3.py with.

    python tests/benchmark_published_run.py --data inaturalist_12k --weights resnet50.pth

takes the options of Q3.py that choose photos, weights, epochs and --out. The protocol is that of `Q3.py --recipe reference`, written as the usual plain loop, in float32. The faults
are the published ones: layer3 is meant to learn and is in no optimiser group, so it never moves (its gradients, which changed
nothing, are not even computed here); and model.train() reaches the frozen layers too, so their BatchNorm statistics drift with
every batch.
"""

import argparse
import copy
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
from benchmark_training import Photos, one_pass  # noqa: E402
from dataset_split import InputError, exit_codes, load_split, write_csv, write_json  # noqa: E402
from Q3 import build_network, get_args, pick_device, test_report  # noqa: E402


def train_and_test(args: argparse.Namespace) -> None:
    """Print the table; leave history.csv, test.json and config.json in the folder --out, if there is one."""
    if args.image_size != 224 or args.batch_size != 64:
        raise InputError("the published run has photos of 224 x 224 and batches of 64: leave --image-size and --batch-size out")
    manifest, parts, _ = load_split(args, None)
    train, val, test = parts["train"], parts["val"], parts["test"]
    print(f"{len(train):,} training, {len(val):,} validation, {len(test):,} test photos")

    device = pick_device("auto")
    torch.manual_seed(args.seed)
    model = build_network(args.weights, len(manifest["classes"])).to(device).requires_grad_(False)
    nn.ModuleList([model.layer4, model.fc]).requires_grad_(True)
    optimizer = torch.optim.Adam([{"params": model.fc.parameters(), "lr": 1e-3}, {"params": model.layer4.parameters(), "lr": 1e-4}])

    print("Epoch | Train Loss | Train Acc | Val Loss | Val Acc")
    history, best_state = [], None
    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        train_loss, train_acc = one_pass(model, [], train, device, optimizer)
        val_loss, val_acc = one_pass(model, [], val, device)
        print(f"{epoch:5} | {train_loss:10.4f} | {train_acc:9.4f} | {val_loss:8.4f} | {val_acc:7.4f}", flush=True)
        if val_acc > max([row["val_acc"] for row in history], default=-1):
            best_state = copy.deepcopy(model.state_dict())
        history.append({"epoch": epoch, "train_loss": train_loss, "train_acc": train_acc, "val_loss": val_loss, "val_acc": val_acc,
                        "seconds": time.perf_counter() - start})
    model.load_state_dict(best_state)
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(images.to(device)).cpu() for images, _ in DataLoader(Photos(test), batch_size=64)])
    report = {"epoch": max(history, key=lambda row: row["val_acc"])["epoch"],
              **test_report(logits, torch.tensor([label for _, label in test]), manifest["classes"])}
    print(f"Test of the best epoch: loss {report['loss']:.4f}, accuracy {report['accuracy']:.4f}")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_csv(args.out / "history.csv", history)
        write_csv(args.out / "predictions.csv", [{"label": manifest["classes"][label], "predicted": manifest["classes"][guess]}
                                                 for (_, label), guess in zip(test, logits.argmax(1).tolist())])
        write_json(args.out / "test.json", report)
        write_json(args.out / "config.json", {"photos": {"train": len(train), "val": len(val), "test": len(test)},
                                              "options": {"data": str(args.data), "weights": args.weights},
                                              "trainable_parameters": sum(value.numel() for value in model.parameters() if value.requires_grad)})


if __name__ == "__main__":
    with exit_codes():
        train_and_test(get_args())
