#!/usr/bin/env python3
"""Q3.py against the plain loop that a user would write: time, memory and accuracy.

    python tests/benchmark_training.py --data inaturalist_12k --weights resnet50.pth --enlarge large
    python tests/benchmark_training.py --data inaturalist_12k --weights resnet50.pth --growth

The plain loop is the protocol of `Q3.py --recipe reference`: a DataLoader that decodes and resizes
every photo again in every epoch, float32, and a forward pass through the frozen layers for every
photo in every epoch. Both run in turn, each in a process of its own, for each seed, on the same
photos and weights. Both are timed from outside and count the same work: training, validation after
each epoch, and one test of the best epoch. The table gives medians over the seeds (accuracies:
means). Q3.py starts with an empty cache, and is run again for one epoch in the end, to see how soon
a second run trains.

--growth runs Q3.py alone on 250, 500, 1,000, 2,000 and 4,000 photos, or all: seconds and memory of
each stage.
"""

import argparse
import copy
import csv
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dataset_split as disk
import Q3

# -- The plain loop --------------------------------------------------------------------------------

class Photos(torch.utils.data.Dataset):
    prepare = transforms.Compose([transforms.Resize((224, 224)), transforms.ToTensor(),
                                  transforms.Normalize(Q3.MEAN, Q3.STD)])

    def __init__(self, pairs):
        self.pairs = pairs

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, index):
        file, label = self.pairs[index]
        return self.prepare(Image.open(file).convert("RGB")), label


def one_pass(model, held, pairs, workers, device, optimizer=None):
    """Logits and labels of a pass over the photos, on the CPU. With an optimiser it trains, while
    the layers in `held` stay in eval mode."""
    model.train(optimizer is not None)
    for child in held:
        child.eval()
    steps = []
    with torch.set_grad_enabled(optimizer is not None):
        for images, labels in DataLoader(Photos(pairs), batch_size=64, num_workers=workers,
                                         shuffle=optimizer is not None):
            logits = model(images.to(device))
            if optimizer is not None:
                optimizer.zero_grad()
                F.cross_entropy(logits, labels.to(device)).backward()
                optimizer.step()
            steps.append((logits.detach().cpu(), labels))
    return tuple(map(torch.cat, zip(*steps)))


def plain_loop(args: argparse.Namespace, layers=("layer3", "layer4"), held=6, workers=0) -> None:
    """Train and test as options of Q3.py say; with --out, leave the tables of a run of Q3.py there.
    fc and these layers learn; BatchNorm's statistics don't change in the first `held` children."""
    if args.image_size != 224 or "batch_size" in args.typed:
        raise disk.InputError("the plain loop is of 224 x 224 pixels and batches of 64: leave "
                         "--image-size and --batch-size out")
    split, device = disk.load_split(args), Q3.pick_device(args.device)
    classes = split.manifest["classes"]
    torch.manual_seed(args.seed)
    model = Q3.build_network(*Q3.read_weights(args.weights), len(classes))
    model = model.to(device).requires_grad_(False)
    backbone = nn.ModuleList(getattr(model, name) for name in layers).requires_grad_(True)
    optimizer = torch.optim.Adam([
        {"params": list(model.fc.requires_grad_(True).parameters()), "lr": 1e-3},
        {"params": list(backbone.parameters()), "lr": 1e-4}])
    held, history = list(model.children())[:held], []

    print("Epoch | Train Loss | Train Acc | Val Loss | Val Acc")
    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        outputs = one_pass(model, held, split.parts["train"], workers, device, optimizer)
        train_loss, train_acc = Q3.loss_and_accuracy(*outputs)
        trained = time.perf_counter()
        outputs = one_pass(model, held, split.parts["val"], workers, device)
        val_loss, val_acc = Q3.loss_and_accuracy(*outputs)
        history.append({
            "epoch": epoch, "train_loss": train_loss, "train_acc": train_acc, "val_loss": val_loss,
            "val_acc": val_acc, "calibrated_loss": Q3.fit_temperature(*outputs)[1],
            "seconds": time.perf_counter() - start,
            "images_per_second": len(split.parts["train"]) / (trained - start)})
        if Q3.best_epoch(history) == epoch:
            best = copy.deepcopy(model.state_dict())
        print(Q3.ROW.format(**history[-1]), flush=True)

    model.load_state_dict(best)
    logits, labels = one_pass(model, held, split.parts["test"], workers, device)
    report = {"epoch": Q3.best_epoch(history), "temperature": 1.0,
              **Q3.test_report(logits, labels, classes, 1.0)}
    Q3.print_report(report)
    if args.out:
        disk.write_csv(args.out / "history.csv", history)
        disk.write_csv(args.out / "predictions.csv", [
            {"label": classes[label], "predicted": classes[guess]}
            for label, guess in zip(labels, logits.argmax(1))])
        disk.write_json(args.out / "test.json", report)
        disk.write_json(args.out / "split.json", split.manifest)
        disk.write_json(args.out / "config.json", {
            "options": {"data": str(args.data), "weights": args.weights}})


# -- What is measured ------------------------------------------------------------------------------

def measured(command: list, out: Path) -> dict:
    """Seconds of the stages of a command that trains and tests, peak memory (GB) of its main
    process, training photos a second, and accuracies."""
    command = [sys.executable, "-u", *map(str, command), "--out", str(out)]
    start, lines = time.perf_counter(), []
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        lines.append((time.perf_counter() - start, line))
    _, status, usage = os.wait4(process.pid, 0)
    job = time.perf_counter() - start
    if status:
        sys.exit(f"failed: {' '.join(command)}")

    def when(pattern: str) -> list[float]:
        return [seconds for seconds, line in lines if re.match(pattern, line)]

    def seconds_of(stage: str) -> float:  # a line for each folder of photos
        return sum(float(line.split()[-2]) for _, line in lines
                   if line.startswith(stage) and " photos in " in line)

    began, *epochs = [*when(r"Epoch \|"), *when(r" *\d+ \| ")]
    with open(out / "history.csv", newline="") as stream:
        history = [{key: float(value) for key, value in row.items()}
                   for row in csv.DictReader(stream)]
    report = json.loads((out / "test.json").read_text())
    took = {row["epoch"]: end - begin
            for row, (begin, end) in zip(history, pairwise([began, *epochs]), strict=True)}
    later = [seconds for epoch, seconds in took.items() if epoch > 1]
    return {"job": job, "began": began, "decoding": seconds_of("Decoding"),
            "maps": seconds_of("Trunk maps"), "head": took.get(0, 0.0), "first": took[1],
            "later": statistics.median(later or [0.0]), "test": when("Test of")[0] - epochs[-1],
            "rate": statistics.median(row["images_per_second"] for row in history if row["epoch"]),
            "memory": usage.ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6),
            "val_acc": next(row["val_acc"] for row in history if row["epoch"] == report["epoch"]),
            "test_acc": report["accuracy"]}


def run_plain(args, seed: int, folder: Path) -> dict:
    return measured([__file__, "--plain-workers", args.plain_workers, "--plain",
                     *shared_flags(args, seed)], Path(tempfile.mkdtemp(dir=folder)))


def run_q3(args, seed: int, folder: Path, *more) -> dict:
    out = Path(tempfile.mkdtemp(dir=folder))
    result = measured([Q3.__file__, *shared_flags(args, seed), "--cache", folder / "cache",
                       *args.flags, *more], out)
    shutil.rmtree(out)
    return result


def shared_flags(args, seed: int) -> list:
    return ["--data", args.data, "--weights", args.weights, "--fraction", args.fraction,
            "--epochs", args.epochs, "--seed", seed]


def machine() -> str:
    """Which instructions the processor has, as these decide what is fast; and the GPU, if any."""
    has = torch.cpu.get_capabilities()
    bf16 = [name for name in ("bf16", "avx512_bf16", "amx_bf16") if has.get(name)]
    gpu = f"; GPU: {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return (f"Processor: {torch.backends.cpu.get_cpu_capability()}, bfloat16 by "
            f"{', '.join(bf16) or 'emulation'}, {Q3.count_cores()} cores{gpu}")


def matrix_product_rate(precision: torch.dtype, device: torch.device) -> float:
    """GFLOP a second of a large matrix product, the fastest of five."""
    a, b = (torch.randn(4096, 4096, device=device).to(precision) for _ in "ab")
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        float((a @ b)[0, 0])
        seconds.append(time.perf_counter() - start)
    return 2 * 4096 ** 3 / min(seconds) / 1e9


def training_step(args, device: torch.device, precision: torch.dtype) -> tuple[float, float]:
    """Of Q3.py's training step on maps that lie on the device: photos a second, GFLOP a photo."""
    network = Q3.build_network(*Q3.read_weights(args.weights), 10)
    model = Q3.FineTuned(network, 6, device, precision, True)
    side, batch = round(Q3.RECIPES["tuned"].crop * 28), Q3.RECIPES["tuned"].batch_size
    maps = torch.rand(batch, 512, side, side, device=device).to(precision)
    labels = torch.arange(batch, device=device) % 10
    step = (maps.contiguous(memory_format=model.layout), labels, batch)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
    optimizer = Q3.build_optimizer(model, 1e-3, 1e-4)
    with FlopCounterMode(display=False) as counter:
        Q3.train_epoch(model, [step], optimizer, scaler, [1.0])
    steps, seconds = 10 if device.type == "cpu" else 200, []
    for _ in range(4):
        start = time.perf_counter()
        Q3.train_epoch(model, [step] * steps, optimizer, scaler, [1.0] * steps)
        seconds.append(time.perf_counter() - start)
    return steps * batch / statistics.median(seconds[1:]), counter.get_total_flops() / batch / 1e9


def enlarge(data: Path, target: Path) -> Path:
    """The same folder with every photo resized to 800 x 600, about as large as iNaturalist-12K's,
    and encoded again."""
    def one(file: Path) -> None:
        large = (target / file.relative_to(data)).with_suffix(".jpg")
        if not large.exists():
            large.parent.mkdir(parents=True, exist_ok=True)
            image = Image.open(file).convert("RGB")
            image.resize((800, 600), Image.Resampling.BICUBIC).save(large, quality=97)

    files = [data / part / path for part in ("train", "val")
             for paths in disk.list_photos(data / part).values() for path in paths]
    with ThreadPoolExecutor() as pool:
        list(pool.map(one, files))
    return target


# -- The tables ------------------------------------------------------------------------------------

def compare(args, folder: Path) -> None:
    plain, ours = [], []
    for seed in args.seeds:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        plain.append(run_plain(args, seed, folder))
        ours.append(run_q3(args, seed, folder))
        for name, result in (("plain loop", plain[-1]), ("Q3.py", ours[-1])):
            figures = {key: round(value, 4) for key, value in result.items()}
            print(f"seed {seed}, {name}: {json.dumps(figures)}", flush=True)
    again = run_q3(args, args.seeds[-1], folder, "--epochs", 1)

    def ours_median(key: str) -> float:
        return statistics.median(result[key] for result in ours)

    def row(title, key, shown, average=statistics.median, better=None):
        a, b = (average([result[key] for result in results]) for results in (plain, ours))
        times = f"{better(a, b):.1f} times" if better else ""
        print(f"| {title} | {shown.format(a)} | {shown.format(b)} | {times} |")

    def faster(a, b):
        return a / b if b else math.nan

    print("\n| | plain loop | Q3.py | |\n|-|-:|-:|-|")
    row("whole job: training, validation and test", "job", "{:.0f} s", better=faster)
    row("before the first epoch, or the start of fc", "began", "{:.1f} s")
    row("start of fc, and validation", "head", "{:.1f} s")
    row("first epoch, and validation", "first", "{:.1f} s", better=faster)
    row("later epochs, and validation", "later", "{:.1f} s", better=faster)
    row("test", "test", "{:.1f} s")
    row("training photos a second", "rate", "{:.1f}", better=lambda a, b: b / a)
    row("peak memory of the main process", "memory", "{:.2f} GB")
    row("validation accuracy, best epoch", "val_acc", "{:.4f}", statistics.mean)
    row("test accuracy", "test_acc", "{:.4f}", statistics.mean)
    print(f"\nQ3.py, once: decoding {ours_median('decoding'):.1f} s (the test's photos too), trunk "
          f"maps {ours_median('maps'):.1f} s. A second run began to train {again['began']:.1f} s "
          "after the command was given")
    if args.flags:
        return  # what follows is the step of the default options
    device = Q3.pick_device("auto")
    precision = Q3.pick_precision("auto", device)
    rate, gflop = training_step(args, device, precision)
    limit, float32 = (matrix_product_rate(each, device) for each in (precision, torch.float32))
    print(f"\nThe training step on maps that lie on the device: {rate:.1f} photos/s at {gflop:.2f} "
          f"GFLOP a photo, which is {rate * gflop / limit:.0%} of what matrix products alone reach "
          f"here ({limit:,.0f} GFLOP/s in {str(precision)[6:]}, {float32:,.0f} in float32). "
          f"Q3.py's epochs run at {ours_median('rate') / rate:.0%} of that step")


def growth(args, folder: Path) -> None:
    total = sum(map(len, disk.list_photos(disk.find_data(args.data) / "train").values()))
    print("| photos | decoding | trunk maps | an epoch | peak memory |\n|-:|-:|-:|-:|-:|")
    args.epochs = 1
    for photos in (250, 500, 1000, 2000, 4000):
        if photos < 2 * total:
            photos = min(photos, total)
            args.fraction = min(1.0, round(photos / total + 5e-7, 6))  # up: classes round down
            shutil.rmtree(folder / "cache", ignore_errors=True)
            result = run_q3(args, 0, folder)
            print(f"| {photos} | {result['decoding']:.1f} s | {result['maps']:.1f} s | "
                  f"{result['first']:.1f} s | {result['memory']:.2f} GB |", flush=True)


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=Path("inaturalist_12k"), metavar="DIR")
    add("--weights", default="IMAGENET1K_V2", metavar="SPEC")
    add("--fraction", type=float, default=0.25, metavar="F", help="(default: 0.25)")
    add("--epochs", type=int, default=5, metavar="N", help="(default: 5)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    add("--plain-workers", type=int, default=Q3.count_cores() if torch.cuda.is_available() else 0,
        metavar="N", help="""of the plain loop's DataLoader (default: the cores if there is a GPU;
        else 0, as on a CPU they compete with the training for the cores)""")
    add("--enlarge", type=Path, metavar="DIR", help="make the photos 800 x 600 first, in DIR")
    add("--growth", action="store_true", help="how Q3.py's time and memory grow with the photos")
    add("--flags", nargs=argparse.REMAINDER, default=[],
        help="further options of Q3.py; must come last")
    add("--plain", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)  # options of Q3.py
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    if args.plain:
        return plain_loop(Q3.get_args(args.plain), workers=args.plain_workers)
    print(machine(), flush=True)
    if args.enlarge:
        args.data = enlarge(disk.find_data(args.data), args.enlarge)
    with tempfile.TemporaryDirectory() as folder:
        (growth if args.growth else compare)(args, Path(folder))


if __name__ == "__main__":
    with disk.exit_codes():
        main()
