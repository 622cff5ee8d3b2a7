#!/usr/bin/env python3
"""How accurate Q3.py is, and what each part of it is worth: tables of README.md, Q1.md and Q2.md.

    python tests/benchmark_accuracy.py recipes --data inaturalist_12k --weights resnet50.pth --fraction 0.8 --seeds 0 1 2 3 4

prints one of these tables:

    recipes       the published run with its faults, --recipe reference and --recipe tuned
    scratch       fine-tuning against training from scratch, epoch by epoch
    freezing      what learns with 9, 8, 7, 6, 4 and 0 frozen children
    data          fine-tuning, a linear probe and training from scratch on 5, 10, 25, 50 and 100 % of the photos
    ingredients   the tuned recipe without each of its parts
    candidates    the tuned recipe with each part that was tried and left out

Each run is one of Q3.py in a process of its own, with the changes listed here. A seed decides the split too, and is the same for all
rows, so that differences are taken seed by seed. Where rows are compared, the 95 % interval of their mean difference allows for other
draws from the same photos (Student's t over the seeds) and, on the test photos, for other photos (the spread of the difference over
them). Validation figures are of the best epoch, which chooses what is tested; they decide what is part of the recipe, the test only
reports.

Runs are kept in --runs (without their checkpoints) and not made again: a benchmark that was stopped goes on, one that is done prints
its table at once. Remove a run's folder to have it made by a newer version of the program. Two benchmarks must not fill the same
folder at once.
"""

import argparse
import contextlib
import csv
import json
import math
import multiprocessing
import shutil
import statistics
import sys
import time
from pathlib import Path
from unittest.mock import patch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import benchmark_published_run  # noqa: E402
import Q3  # noqa: E402
from dataset_split import exit_codes, find_data  # noqa: E402
from Q3 import F, torch  # noqa: E402

STUDENT = {1: 0.0, 2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # 97.5 %, by number of seeds


# -- what is changed in Q3.py: name -> what takes its place -------------------------------------------------------------------------

def look_at_cropped_pixels(self, which, places=None, mirrored=False, look=Q3.Photos.look):
    """In training, cut photos before the trunk sees them, instead of cutting the trunk's maps of them."""
    if places is None:
        return look(self, which, places, mirrored)
    kept, self.kept = self.kept, None
    try:
        return look(self, which, places)
    finally:
        self.kept = kept


def probe_without_mirrored(model, loaders, labels, probe=Q3.probe):
    return probe(model, loaders[:1], labels)


def cut_and_mirrored(photos, places, cut=Q3.cut):
    """Every other crop of a trunk map, as its place falls, with left and right exchanged."""
    views = cut(photos, places)
    return torch.where(((places[:, 0] * 1000).long() % 2 == 0).view(-1, 1, 1, 1).to(views.device), views.flip(2), views)


def smoothed(*args, loss=F.cross_entropy, **options):
    """Cross-entropy with a tenth of each label given to all classes, where it is what the network learns from."""
    return loss(*args, **options, label_smoothing=0.1 if options.get("reduction") == "none" else 0.0)


def groups(model, lr_head, lr_backbone):
    return [{"params": list(part.parameters()), "lr": rate, "initial_lr": rate} for part, rate in ((model.head, lr_head), (model.backbone, lr_backbone))]


def with_decay(model, lr_head, lr_backbone):
    return torch.optim.AdamW(groups(model, lr_head, lr_backbone), fused=True, weight_decay=1.0)


def with_momentum(model, lr_head, lr_backbone):
    """SGD, at a hundred times the rates that Adam has."""
    return torch.optim.SGD(groups(model, 100 * lr_head, 100 * lr_backbone), momentum=0.9, nesterov=True)


AVERAGE = {}


def train_and_average(model, loader, optimizer, scaler, shares, totals, after_step, train_epoch=Q3.train_epoch):
    state = {name: value for name, value in model.network.state_dict().items() if value.is_floating_point()}
    if optimizer is not AVERAGE.get("of"):
        AVERAGE.update(of=optimizer, steps=0, state={name: value.clone() for name, value in model.network.state_dict().items()})

    def average(losses):
        AVERAGE["steps"] += 1
        kept = min(0.98, (1 + AVERAGE["steps"]) / (10 + AVERAGE["steps"]))
        for name, value in state.items():
            AVERAGE["state"][name].lerp_(value, 1 - kept)
        after_step(losses)
    train_epoch(model, loader, optimizer, scaler, shares, totals, average)


def finish_with_average(self, epoch, *figures, finish=Q3.Training.finish_epoch):
    """Validate and keep, instead of an epoch's last weights, an exponential moving average over the steps."""
    if epoch == 0:
        return finish(self, epoch, *figures)
    learnt = {name: value.clone() for name, value in self.model.network.state_dict().items()}
    self.model.network.load_state_dict(AVERAGE["state"])
    finish(self, epoch, *figures)
    self.model.network.load_state_dict(learnt)


def train_on_mixtures(model, loader, optimizer, scaler, shares, totals, after_step, alpha=0.4):
    """Each map mixed with another of the batch, and the loss with that of the other's label (Verma et al., Manifold Mixup, ICML 2019)."""
    model.train()
    for (maps, labels, count), share in zip(loader, shares, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = share * group["initial_lr"]
        part = torch.distributions.Beta(alpha, alpha).sample().to(maps)
        logits = model(maps.lerp(maps.flip(0), part))
        losses = F.cross_entropy(logits, labels, reduction="none").lerp(F.cross_entropy(logits, labels.flip(0), reduction="none"), part.float())
        optimizer.zero_grad()
        scaler.scale(losses.sum() / count).backward()
        scaler.step(optimizer)
        scaler.update()
        totals += torch.stack([losses.detach().sum(), (logits.argmax(1) == labels).sum()])
        after_step(losses.detach())


class Again:
    """Batches that can be gone through more than once, also mirrored."""

    def __init__(self, *args, batches=Q3.batches, **options):
        self.args, self.options, self.batches = args, options, batches

    def __iter__(self):
        return self.batches(*self.args, **self.options)

    def mirrored(self):
        return Again(*self.args, **{**self.options, "mirrored": True})


def predict_twice(model, loader, layers=None, predict=Q3.predict):
    """Of a photo and its mirror image the mean confidence."""
    if layers is not None:
        return predict(model, loader, layers)
    return torch.logaddexp(predict(model, loader).log_softmax(1), predict(model, loader.mirrored()).log_softmax(1)) - math.log(2)


def probe_recalibrated(model, loaders, labels, probe=Q3.probe):
    """Before the start of fc, replace the statistics of layer3's and layer4's BatchNorm by those of the training photos, in batches
    that mix the classes."""
    layers = [module for module in model.backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None
    model.backbone.train()
    photos, which, *rest = loaders[0].args
    with torch.no_grad():
        for maps, _, _ in Again(photos, which[Q3.draw_epoch(len(which), 0, 0)[0]], *rest):
            model.features(maps)
    model.eval()
    return probe(model, loaders, labels)


USUAL_RATES = ["--lr-head", "1e-3", "--lr-backbone", "1e-4"]
VARIANTS = {  # name: (flags of Q3.py, what is changed in it)
    "tuned": ([], {}),
    "reference": (["--recipe", "reference"], {}),
    "published, float32": ([], {"main": benchmark_published_run.train_and_test}),
    "linear probe": (["--freeze", "9", "--epochs", "1", "--lr-head", "1e-12"], {}),
    "from scratch": (["--from-scratch"], {}),
    "from scratch, constant learning rate": (["--from-scratch"], {"rise_and_fall": lambda step, steps: 1.0}),
    "ResNet50 from random weights": (["--weights", "none", "--freeze", "0", "--lr-backbone", "1e-3", "--epochs", "40"], {}),
    **{f"freeze {freeze}": (["--freeze", str(freeze)], {}) for freeze in (9, 8, 7, 4, 0)},
    "whole photos squashed to a square": ([], {"BORDER": None}),
    "fc from noise, at the reference's learning rates": (USUAL_RATES, {"starts_from_probe": lambda args: False, "holds_batchnorm": lambda args: True}),
    "start of fc without mirrored photos": ([], {"probe": probe_without_mirrored}),
    "start of fc on unscaled features": ([], {"spread_of": torch.Tensor.std}),
    "without crops": ([], {"CROP": 1.0}),
    "BatchNorm's statistics learnt": ([], {"holds_batchnorm": lambda args: False}),
    "the reference's learning rates": (USUAL_RATES, {}),
    "constant learning rates": ([], {"rise_and_fall": lambda step, steps: 1.0}),
    "border of 4/232 instead of 1/16": ([], {"BORDER": 4 / 232}),
    "crops of 4/7 instead of 5/7": ([], {"CROP": 4 / 7}),
    "crops of pixels": ([], {"Photos.look": look_at_cropped_pixels}),
    "mirrored maps": ([], {"cut": cut_and_mirrored}),
    "label smoothing": ([], {"F.cross_entropy": smoothed}),
    "AdamW, decay 1": ([], {"build_optimizer": with_decay}),
    "SGD with momentum": ([], {"build_optimizer": with_momentum}),
    "moving average of the weights": ([], {"Training.finish_epoch": finish_with_average, "train_epoch": train_and_average}),
    "mixed maps": ([], {"train_epoch": train_on_mixtures}),
    "BatchNorm recalibrated": ([], {"batches": Again, "probe": probe_recalibrated}),
    "mean of photo and mirror image": ([], {"batches": Again, "predict": predict_twice}),
}
INGREDIENTS = ["whole photos squashed to a square", "fc from noise, at the reference's learning rates", "start of fc without mirrored photos",
               "start of fc on unscaled features", "without crops",
               "BatchNorm's statistics learnt", "the reference's learning rates", "constant learning rates"]
CANDIDATES = list(VARIANTS)[list(VARIANTS).index("border of 4/232 instead of 1/16"):]


# -- runs ---------------------------------------------------------------------------------------------------------------------------

def job(variant: str, words: list[str], out: Path) -> None:
    """One run, changed; what it took goes into its folder."""
    start, changes = time.perf_counter(), VARIANTS[variant][1]
    with contextlib.ExitStack() as stack:
        for name, value in changes.items():
            owner, _, name = name.rpartition(".")
            stack.enter_context(patch.object(getattr(Q3, owner) if owner else Q3, name, value))
        stack.enter_context(exit_codes())
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        Q3.main(Q3.get_args(words))
    seconds, memory = time.perf_counter() - start, 0.0
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated() / 1e9
    elif sys.platform == "linux":
        import resource
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    (out / "cost.json").write_text(json.dumps({"seconds": seconds, "memory_gb": memory}))
    for file in out.glob("*.pt"):
        file.unlink()


def apart(function, *args) -> None:
    """Call this in a process of its own, so that its peak memory is its own."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)


def run(args: argparse.Namespace, variant: str, fraction: float, seed: int) -> dict:
    """What a run came to; it is only made if its folder isn't there."""
    out = args.runs / f"{variant.replace('/', '-')}, {fraction:g}, {args.image_size} px, {args.epochs or 'all'} epochs, seed {seed}"
    flags = VARIANTS[variant][0]
    weights = "none" if {"--from-scratch", "none"} & set(flags) else args.weights
    if not (out / "cost.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        words = ["--data", args.data, "--fraction", fraction, "--seed", seed, "--image-size", args.image_size, "--out", out,
                 *([] if "--from-scratch" in flags else ["--weights", args.weights]), *(["--epochs", args.epochs] if args.epochs else []),
                 *(["--cache", args.cache] if args.cache else ["--no-cache"])]
        print(f"{variant}, fraction {fraction:g}, seed {seed}", file=sys.stderr, flush=True)
        apart(job, variant, [*map(str, words), *flags], out)
    history, predictions = (read_csv(out / name) for name in ("history.csv", "predictions.csv"))
    report, cost, config = (json.loads((out / name).read_text()) for name in ("test.json", "cost.json", "config.json"))
    for name, expected in (("data", args.data), ("weights", weights)):
        if config["options"][name] != str(expected):
            sys.exit(f"'{out}' was made with --{name} {config['options'][name]}: give another --runs")
    history = [{key: float(value) for key, value in row.items()} for row in history]
    return {**cost, "history": history, "val": max(row["val_acc"] for row in history), "test": report["accuracy"], "right": [row["label"] == row["predicted"] for row in predictions],
            "calibration": report["calibration_error"], "unscaled": report["calibration_error_unscaled"],
            "epochs": sum(row["seconds"] for row in history), "epoch": statistics.median([row["seconds"] for row in history if row["epoch"] > 0][-5:]),
            "parameters": config["trainable_parameters"], "photos": config["photos"]["train"]}


def read_csv(file: Path) -> list[dict]:
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


# -- tables -------------------------------------------------------------------------------------------------------------------------

def mean(runs: list[dict], key: str) -> float:
    return statistics.mean(run[key] for run in runs)


def ahead(runs: list[dict], others: list[dict], key: str = "test") -> str:
    """Mean of the differences, seed by seed, and its 95 % interval, in percentage points."""
    values = [run[key] - other[key] for run, other in zip(runs, others, strict=True)]
    half = STUDENT.get(len(values), 2.26) * (statistics.stdev(values) if len(values) > 1 else 0) / math.sqrt(len(values))
    if key == "test":
        photos = [sum(of_photo) / len(values) for of_photo in zip(*(
            [one - other for one, other in zip(run["right"], against["right"], strict=True)] for run, against in zip(runs, others)))]
        half = math.hypot(half, 1.96 * statistics.stdev(photos) / math.sqrt(len(photos)))
    return f"{100 * statistics.mean(values):+.1f}" + (f" ± {100 * half:.1f}" if half else "")


def print_table(head: str, rows: list[list]) -> None:
    print(f"| {head} |\n|{'|'.join('-:' if place else '-' for place in range(head.count('|') + 1))}|")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def print_chart(title: str, x_title: str, places: list, lines: dict[str, list[float]]) -> None:
    """A line chart in mermaid's language, which GitHub draws; it has no legend, so that the title names the lines as they end."""
    lines = dict(sorted(lines.items(), key=lambda line: -line[1][-1]))
    print(f'\n```mermaid\nxychart-beta\n    title "{title}: {", ".join(lines)} (from the top, at the right)"\n'
          f'    x-axis "{x_title}" [{", ".join(map(str, places))}]\n    y-axis "accuracy" 0 --> 1')
    for values in lines.values():
        print(f"    line [{', '.join(f'{value:.4f}' for value in values)}]")
    print("```\n")


def recipes(args: argparse.Namespace, runs_of) -> None:
    rows = []
    for fraction in args.fraction:
        tuned = runs_of("tuned", fraction)
        for name in args.variants or ["published, float32", "reference", "tuned"]:
            runs = runs_of(name, fraction)
            rows.append([name, f"{runs[0]['photos']:,}", f"{mean(runs, 'val'):.4f}", f"{mean(runs, 'test'):.4f}",
                         *(["", ""] if runs is tuned else [ahead(tuned, runs), f"{(1 - mean(tuned, 'test')) / (1 - mean(runs, 'test')):.2f}"]),
                         f"{100 * mean(runs, 'unscaled'):.1f} %",
                         f"{100 * mean(runs, 'calibration'):.1f} %" if mean(runs, "calibration") != mean(runs, "unscaled") else "",
                         f"{statistics.median(run['seconds'] for run in runs):.0f}"])
    print_table("recipe | training photos | validation | test | tuned is ahead by | errors, tuned / this row | calibration error | scaled | "
                "seconds, whole job", rows)


def scratch(args: argparse.Namespace, runs_of) -> None:
    for fraction in args.fraction:
        columns = {"fine-tuned": runs_of("tuned", fraction), **{name: runs_of(name, fraction) for name in args.variants or ["from scratch"]}}
        epochs, rows = range(1, int(max(run["history"][-1]["epoch"] for runs in columns.values() for run in runs)) + 1), []
        for epoch in [*range(0, 6), *range(10, len(epochs) + 1, 10)]:
            found = [[row["val_acc"] for run in runs for row in run["history"] if row["epoch"] == epoch] for runs in columns.values()]
            rows.append([epoch, *(f"{statistics.mean(values):.4f}" if values else "" for values in found)])
        for name, cell in (("training photos, last epoch", lambda runs: f"{statistics.mean(run['history'][-1]['train_acc'] for run in runs):.4f}"),
                           ("**test** of the best epoch", lambda runs: f"{mean(runs, 'test'):.4f}"),
                           ("seconds an epoch", lambda runs: f"{statistics.median(run['epoch'] for run in runs):.1f}"),
                           ("seconds, whole job", lambda runs: f"{statistics.median(run['seconds'] for run in runs):.0f}"),
                           ("parameters that learn", lambda runs: f"{runs[0]['parameters']:,}")):
            rows.append([name, *map(cell, columns.values())])
        photos = columns["fine-tuned"][0]["photos"]
        print_table(f"epoch ({photos:,} training photos) | {' | '.join(columns)}", rows)
        print_chart("Best validation accuracy so far", "epoch", list(epochs), {
            name: [statistics.mean(max(row["val_acc"] for row in run["history"] if row["epoch"] <= epoch) for run in runs) for epoch in epochs]
            for name, runs in columns.items()})


def freezing(args: argparse.Namespace, runs_of) -> None:
    rows = []
    for fraction in args.fraction:
        usual = runs_of("tuned", fraction)
        for depth in (9, 8, 7, 6, 4, 0):
            name = "tuned" if depth == 6 else f"freeze {depth}"
            runs = runs_of(name, fraction)
            rows.append([depth, f"{runs[0]['parameters']:,}", f"{mean(runs, 'val'):.4f}", f"{mean(runs, 'test'):.4f}",
                         "" if runs is usual else ahead(runs, usual), f"{statistics.median(run['epoch'] for run in runs):.1f}",
                         f"{statistics.median(run['seconds'] for run in runs):.0f}", f"{max(run['memory_gb'] for run in runs):.1f} GB"])
    print_table("frozen children | parameters that learn | validation | test | against 6 | seconds an epoch | whole job | peak memory", rows)


def data(args: argparse.Namespace, runs_of) -> None:
    found = {name: [runs_of(variant, fraction) for fraction in args.fraction]
             for name, variant in (("fine-tuned", "tuned"), ("linear probe", "linear probe"), ("from scratch", "from scratch"))}
    photos = [runs[0]["photos"] for runs in found["fine-tuned"]]
    accuracies = {name: [mean(runs, "test") for runs in of_fractions] for name, of_fractions in found.items()}
    print_table(f"training photos | {' | '.join(found)}",
                [[f"{count:,}", *(f"{accuracies[name][place]:.4f}" for name in found)] for place, count in enumerate(photos)])
    print_chart("Test accuracy", "training photos", photos, accuracies)


def changes(args: argparse.Namespace, runs_of, names: list[str]) -> None:
    for fraction in args.fraction:
        tuned, rows = runs_of("tuned", fraction), []
        for name in ["tuned", *(name for name in args.variants or names if name != "tuned")]:
            runs = runs_of(name, fraction)
            against = ["", ""] if runs is tuned else [ahead(runs, tuned, "val"), ahead(runs, tuned)]
            rows.append([name, f"{mean(runs, 'val'):.4f}", against[0], f"{mean(runs, 'test'):.4f}", against[1], f"{100 * mean(runs, 'calibration'):.1f} %",
                         f"{statistics.median(run['epochs'] for run in runs):.0f}"])
        print_table(f"{tuned[0]['photos']:,} training photos | validation | against tuned | test | against tuned | "
                    "calibration error, scaled | epochs' seconds", rows)


TABLES = {"recipes": recipes, "scratch": scratch, "freezing": freezing, "data": data,
          "ingredients": lambda *args: changes(*args, INGREDIENTS), "candidates": lambda *args: changes(*args, CANDIDATES)}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--data", type=Path, default=Path("inaturalist_12k"), metavar="DIR")
    parser.add_argument("--weights", default="IMAGENET1K_V2", metavar="SPEC")
    parser.add_argument("--fraction", type=float, nargs="+", metavar="F", help="(default: 0.25; for data 0.05 0.1 0.25 0.5 1.0)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="NAME", help="only these rows (of scratch: columns); one of: " + "; ".join(VARIANTS))
    parser.add_argument("--epochs", type=int, metavar="N", help="(default: as in Q3.py)")
    parser.add_argument("--image-size", type=int, default=224, metavar="N")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark_accuracy"), metavar="DIR")
    parser.add_argument("--cache", type=Path, metavar="DIR",
                        help="share decoded photos and trunk maps among runs, which saves time; but then the times of whole jobs can't be "
                             "compared")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    args.seeds, args.data = list(dict.fromkeys(args.seeds)), find_data(args.data)
    if args.variants and args.table in ("freezing", "data"):
        sys.exit(f"--variants: the table '{args.table}' has all its rows; it goes with recipes, scratch, ingredients and candidates")
    args.fraction = args.fraction or ([0.05, 0.1, 0.25, 0.5, 1.0] if args.table == "data" else [0.25])
    known = {}

    def runs_of(variant: str, fraction: float) -> list[dict]:
        if (variant, fraction) not in known:
            known[variant, fraction] = [run(args, variant, fraction, seed) for seed in args.seeds]
        return known[variant, fraction]

    TABLES[args.table](args, runs_of)


if __name__ == "__main__":
    with exit_codes():
        main()
