#!/usr/bin/env python3
"""Q3.py against the plain loop that a user would write: time, memory and accuracy, on the same photos and weights.

    python tests/benchmark_training.py --data inaturalist_12k --weights resnet50.pth --enlarge /tmp/large --seeds 0 1 2
    python tests/benchmark_training.py --data inaturalist_12k --weights resnet50.pth --growth

The plain loop is the protocol of `Q3.py --recipe reference` without its faults: a DataLoader that decodes and resizes every
photo again in every epoch, float32, and a forward pass through the frozen layers for every photo in every epoch. Both run
in turn, each in a process of its own, for each seed; the table gives medians over the seeds (accuracies: means). Q3.py
starts with an empty cache, and is run again for one epoch in the end, to see how soon a second run trains.

--growth runs Q3.py alone on 250, 500, 1,000, 2,000 and 4,000 photos, or all: seconds and memory of each stage.
"""

import argparse
import copy
import csv
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import Q3  # noqa: E402
from dataset_split import exit_codes, find_data, list_photos  # noqa: E402


# -- the plain loop ---------------------------------------------------------------------------------------------------

class Photos(torch.utils.data.Dataset):
    prepare = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor(), transforms.Normalize(Q3.MEAN, Q3.STD)])

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        file, label = self.items[index]
        return self.prepare(Image.open(file).convert("RGB")), label


def one_pass(model, frozen, items, device, optimizer=None, workers=0) -> tuple[float, float]:
    """Mean loss and accuracy of a pass over the photos, one that trains if there is an optimiser. `frozen`: the layers that
    stay in eval mode, so that their BatchNorm statistics don't drift."""
    model.train(optimizer is not None)
    for child in frozen:
        child.eval()
    loss_sum = correct = 0
    with torch.set_grad_enabled(optimizer is not None):
        for images, labels in DataLoader(Photos(items), batch_size=64, shuffle=optimizer is not None, num_workers=workers):
            images, labels = images.to(device), labels.to(device)
            logits = model(images)
            loss = F.cross_entropy(logits, labels)
            if optimizer is not None:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            loss_sum += loss.item() * len(labels)
            correct += (logits.argmax(1) == labels).sum().item()
    return loss_sum / len(items), correct / len(items)


def plain_loop(args: argparse.Namespace) -> None:
    _, parts, _ = Q3.load_split(args, None)
    device = Q3.pick_device("auto")
    torch.manual_seed(args.seed)
    model = Q3.build_network(args.weights, len({label for _, label in parts["train"]})).to(device)
    frozen = nn.ModuleList(list(model.children())[:6]).requires_grad_(False)
    optimizer = torch.optim.Adam([{"params": model.fc.parameters(), "lr": 1e-3},
                                  {"params": [*model.layer3.parameters(), *model.layer4.parameters()], "lr": 1e-4}])
    epochs, best = [], None
    for _ in range(args.epochs):
        start = time.perf_counter()
        one_pass(model, frozen, parts["train"], device, optimizer, args.plain_workers)
        train_seconds = time.perf_counter() - start
        _, val_acc = one_pass(model, frozen, parts["val"], device, workers=args.plain_workers)
        epochs.append({"seconds": time.perf_counter() - start, "images_per_second": len(parts["train"]) / train_seconds, "val_acc": val_acc})
        if best is None or val_acc > best[0]:
            best = val_acc, copy.deepcopy(model.state_dict())
    model.load_state_dict(best[1])
    _, test_acc = one_pass(model, frozen, parts["test"], device, workers=args.plain_workers)
    json.dump({"epochs": epochs, "test_acc": test_acc}, open(args.out, "w"))


# -- what is measured -------------------------------------------------------------------------------------------------

def measured(command: list) -> tuple[str, dict]:
    """What a command printed; and its seconds, those until its epochs began, and its main process's peak memory in GB."""
    start, printed, began = time.perf_counter(), "", 0.0
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        printed += line
        if line.startswith("Epoch |"):
            began = time.perf_counter() - start
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"failed: {' '.join(map(str, command))}")
    memory = usage.ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    return printed, {"job": time.perf_counter() - start, "began": began, "memory": memory}


def run_plain(args, seed: int, folder: Path) -> dict:
    out = folder / f"plain-{seed}.json"
    _, run = measured([sys.executable, __file__, "--plain", *common(args, seed), "--plain-workers", args.plain_workers, "--out", out])
    result = json.loads(out.read_text())
    return {**run, "test": result["test_acc"], **of_epochs(result["epochs"])}


def run_q3(args, seed: int, folder: Path, *more) -> dict:
    out = Path(tempfile.mkdtemp(dir=folder)) / "run"
    printed, run = measured([sys.executable, ROOT / "Q3.py", *common(args, seed), "--cache", folder / "cache", "--out", out, *more])
    with open(out / "history.csv", newline="") as stream:
        epochs = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(stream)]
    stages = {name: float(took) for name, took in re.findall(r"^(Decoding|Trunk maps) .* in ([\d.]+) s", printed.split("Epoch |")[0], re.MULTILINE)}
    report = json.loads((out / "test.json").read_text())
    shutil.rmtree(out.parent)
    return {**run, "test": report["accuracy"], "decoding": stages.get("Decoding", 0.0),
            "maps": stages.get("Trunk maps", 0.0), **of_epochs(epochs)}


def common(args, seed: int) -> list:
    return ["--data", args.data, "--weights", args.weights, "--fraction", args.fraction, "--val-fraction", args.val_fraction,
            "--epochs", args.epochs, "--seed", seed]


def of_epochs(rows: list[dict]) -> dict:
    """Of the rows of a history, where epoch 0, if there is one, is the start of fc."""
    start, epochs = [row for row in rows if row.get("epoch") == 0], [row for row in rows if row.get("epoch") != 0]
    return {"head": sum(row["seconds"] for row in start), "first": epochs[0]["seconds"],
            "later": statistics.median([row["seconds"] for row in epochs[1:]] or [0.0]),
            "rate": statistics.median([row["images_per_second"] for row in epochs]), "val": max(row["val_acc"] for row in rows)}


def matrix_product_rate(precision: torch.dtype, device: torch.device) -> float:
    """Floating-point operations a second of a large matrix product, the fastest of five."""
    a, b = (torch.randn(4096, 4096, device=device).to(precision) for _ in "ab")
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        float((a @ b)[0, 0])
        seconds.append(time.perf_counter() - start)
    return 2 * 4096 ** 3 / min(seconds)


def training_step(args, device: torch.device, precision: torch.dtype) -> tuple[float, float]:
    """Of Q3.py's training step on maps that already lie on the device: photos a second, and GFLOP a photo."""
    model = Q3.FineTuned(Q3.build_network(args.weights, 10).to(device, memory_format=Q3.layout(device)), 6, precision, True)
    side = round(Q3.CROP * 28)
    maps = torch.rand(64, side, side, 512, device=device).to(precision).permute(0, 3, 1, 2)
    labels, seconds = torch.randint(0, 10, (64,), device=device), []
    optimizer, scaler = Q3.build_optimizer(model, 1e-3, 1e-4), torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    with FlopCounterMode(display=False) as counter:
        Q3.train_epoch(model, [(maps, labels, 64)], optimizer, scaler, [1.0], torch.zeros(2, device=device))
    steps = 10 if device.type == "cpu" else 200
    for _ in range(4):
        start = time.perf_counter()
        Q3.train_epoch(model, [(maps, labels, 64)] * steps, optimizer, scaler, [1.0] * steps, torch.zeros(2, device=device))
        seconds.append(time.perf_counter() - start)
    return steps * 64 / statistics.median(seconds[1:]), counter.get_total_flops() / 64 / 1e9


def enlarge(data: Path, target: Path) -> Path:
    """The same folder with every photo resized to 800 x 600 and encoded again, about as large as those of iNaturalist-12K."""
    def one(file: Path) -> None:
        copy = (target / file.relative_to(data)).with_suffix(".jpg")
        if not copy.exists():
            copy.parent.mkdir(parents=True, exist_ok=True)
            Image.open(file).convert("RGB").resize((800, 600), Image.Resampling.BICUBIC).save(copy, quality=97)
    files = [data / part / path for part in ("train", "val") for paths in list_photos(data / part).values() for path in paths]
    with ThreadPoolExecutor() as pool:
        list(pool.map(one, files))
    return target


# -- the tables -------------------------------------------------------------------------------------------------------

def compare(args, folder: Path) -> None:
    plain, ours = [], []
    for seed in args.seeds:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        plain.append(run_plain(args, seed, folder))
        ours.append(run_q3(args, seed, folder, *args.flags))
        for name, result in (("plain loop", plain[-1]), ("Q3.py", ours[-1])):
            print(f"seed {seed}, {name}: {json.dumps({key: round(value, 4) for key, value in result.items()})}", flush=True)
    again = run_q3(args, args.seeds[-1], folder, *args.flags, "--epochs", 1)

    def row(title, key, shown, average=statistics.median, better=None):
        a, b = (average(result[key] for result in results) for results in (plain, ours))
        print(f"| {title} | {shown.format(a)} | {shown.format(b)} | {f'{better(a, b):.1f} times' if better else ''} |")

    print("\n| | plain loop | Q3.py | |\n|-|-:|-:|-|")
    row("whole job", "job", "{:.0f} s", better=lambda a, b: a / b)
    row("start of fc, before the first epoch", "head", "{:.1f} s")
    row("first epoch", "first", "{:.1f} s", better=lambda a, b: a / b)
    row("later epochs", "later", "{:.1f} s", better=lambda a, b: a / b)
    row("training photos a second", "rate", "{:.1f}", better=lambda a, b: b / a)
    row("peak memory of the main process", "memory", "{:.2f} GB")
    row("validation accuracy, best epoch", "val", "{:.4f}", statistics.mean)
    row("test accuracy", "test", "{:.4f}", statistics.mean)
    print(f"\nQ3.py, once: decoding {statistics.median(result['decoding'] for result in ours):.1f} s, "
          f"trunk maps {statistics.median(result['maps'] for result in ours):.1f} s. Training, or the start of fc, began "
          f"{statistics.median(result['began'] for result in ours):.1f} s after the command was given, in a second run "
          f"{again['began']:.1f} s after")
    if args.flags:
        return  # what follows is the step of the default options
    device, precision = Q3.pick_device("auto"), Q3.pick_precision("auto", Q3.pick_device("auto"))
    rate, gflop = training_step(args, device, precision)
    limit = matrix_product_rate(precision, device) / 1e9
    ours_rate = statistics.median(result["rate"] for result in ours)
    print(f"\nThe training step on maps that lie on the device: {rate:.1f} photos/s at {gflop:.2f} GFLOP a photo, which is "
          f"{rate * gflop / limit:.0%} of what matrix products alone reach here ({limit:,.0f} GFLOP/s in "
          f"{str(precision).removeprefix('torch.')}, {matrix_product_rate(torch.float32, device) / 1e9:,.0f} in float32). "
          f"Q3.py's epochs run at {ours_rate / rate:.0%} of that step")


def growth(args, folder: Path) -> None:
    data = find_data(args.data)
    total = sum(map(len, list_photos(data / "train").values()))
    print("| photos | decoding | trunk maps | an epoch | peak memory |\n|-:|-:|-:|-:|-:|")
    for photos in (250, 500, 1000, 2000, 4000):
        if photos < 2 * total:
            photos = min(photos, total)
            args.fraction, args.epochs = min(1.0, round(photos / total + 5e-7, 6)), 1  # rounded up, as classes round down
            shutil.rmtree(folder / "cache", ignore_errors=True)
            result = run_q3(args, 0, folder, *args.flags)
            print(f"| {photos} | {result['decoding']:.1f} s | {result['maps']:.1f} s | {result['first']:.1f} s | {result['memory']:.2f} GB |", flush=True)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("inaturalist_12k"), metavar="DIR")
    parser.add_argument("--weights", default="IMAGENET1K_V2", metavar="SPEC")
    parser.add_argument("--epochs", type=int, default=5, metavar="N")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--plain-workers", type=int, default=os.cpu_count() if torch.cuda.is_available() else 0, metavar="N",
                        help="of the plain loop's DataLoader (default: the cores if there is a GPU; else 0, as on a CPU they "
                             "compete with the training for the cores)")
    parser.add_argument("--enlarge", type=Path, metavar="DIR", help="make the photos 800 x 600 first, in this folder")
    parser.add_argument("--growth", action="store_true", help="how Q3.py's time and memory grow with the photos")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="further options of Q3.py; must come last")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--fraction", type=float, default=0.25, metavar="F", help="part of the training photos (default: 0.25)")
    parser.add_argument("--val-fraction", type=float, default=0.2, metavar="V", help="part of these for validation (default: 0.2)")
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)  # of the plain loop
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    args.test_fraction = None
    if args.plain:
        return plain_loop(args)
    if args.enlarge:
        args.data = enlarge(find_data(args.data), args.enlarge)
    with tempfile.TemporaryDirectory() as folder:
        (growth if args.growth else compare)(args, Path(folder))


if __name__ == "__main__":
    with exit_codes():
        main()
