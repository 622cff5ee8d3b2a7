#!/usr/bin/env python3
"""How accurate Q3.py is, and what each part of it is worth: the tables of the documents.

    python tests/benchmark_accuracy.py recipes --data inaturalist_12k --weights resnet50.pth

prints one of these tables:

    recipes       the published run with its faults, --recipe reference and --recipe tuned
    scratch       fine-tuning against training from scratch, epoch by epoch, and a picture of it
    freezing      what learns with 9, 8, 7, 6, 4 and 0 frozen children
    ingredients   the tuned recipe with one part changed at a time

Each run is one of Q3.py in a process of its own, with the changes listed here. A seed decides the
split too, and is the same for all rows, so that differences are taken seed by seed. Where rows are
compared, the 95 % interval of their mean difference allows for other draws from the same photos
(Student's t over the seeds) and, on the test photos, for other photos (the spread of the difference
over them). Validation figures are of the best epoch, which chooses what is tested; they decide what
is part of the recipe, the test only reports.

Runs are kept in --runs (without their checkpoints) and not made again: a benchmark that was stopped
goes on, one that is done prints its table at once. Remove a run's folder to have it made by a newer
version of the program. Two benchmarks must not fill the same folder at once.
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
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))
import benchmark_published_run

import Q3
from dataset_split import exit_codes, find_data
from Q3 import torch

STUDENT = {1: 0.0, 2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31,
           10: 2.26}  # 97.5 %, by number of seeds


# -- What is changed in Q3.py ----------------------------------------------------------------------

def recipe(name: str = "tuned", **changes) -> dict:
    return {"RECIPES": Q3.RECIPES | {name: replace(Q3.RECIPES[name], **changes)}}


def overall_deviation(features, dim=None, std=torch.Tensor.std):
    """Of all features together, where fit_head asks for that of each: all get the same scale."""
    return std(features)


INGREDIENTS = {  # name: (flags of Q3.py, what takes the place of what in it)
    "whole photos squashed to a square": ([], recipe(border=None)),
    "fc from noise": ([], recipe(fit_head=False)),
    "fc not multiplied by 0.3": ([], {"SOFTER": 1.0}),
    "start of fc on unscaled features": ([], {"torch.Tensor.std": overall_deviation}),
    "without crops": ([], recipe(crop=1.0)),
    "smaller crops, 16 x 16 of 28 x 28": ([], recipe(crop=4 / 7)),
    "BatchNorm's statistics updated": ([], recipe(hold_batchnorm=False)),
    "a tenth of the learning rates": (["--lr-head", "1e-4", "--lr-backbone", "1e-5"], {}),
    "constant learning rates": ([], recipe(cosine=False)),
}
VARIANTS = {
    "tuned": ([], {}),
    "reference": (["--recipe", "reference"], {}),
    "published, float32": ([], {"main": benchmark_published_run.train_and_test}),
    "from scratch": (["--from-scratch"], {}),
    "from scratch, constant learning rate": (["--from-scratch"], recipe("scratch", cosine=False)),
    "ResNet50 from random weights": (["--weights", "none"], {}),
    **{f"freeze {freeze}": (["--freeze", str(freeze)], {}) for freeze in (9, 8, 7, 4, 0)},
    "batches of 64": (["--batch-size", "64"], {}),
    **INGREDIENTS,
}


# -- Runs ------------------------------------------------------------------------------------------

def job(variant: str, words: list[str], out: Path) -> None:
    """One run, changed; what it took goes into its folder, and its checkpoints are deleted."""
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        for name, value in VARIANTS[variant][1].items():
            stack.enter_context(patch(f"Q3.{name}", value))
        stack.enter_context(exit_codes())
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        Q3.main(Q3.get_args(words))
    cost = {"seconds": time.perf_counter() - start, "memory_gb": peak_memory(), "parameters": 0}
    if (out / "last.pt").exists():
        learnt = Q3.load_tensors(out / "last.pt")["optimizer"]["state"].values()
        cost["parameters"] = sum(adam["exp_avg"].numel() for adam in learnt)
    (out / "cost.json").write_text(json.dumps(cost))
    for file in out.glob("*.pt"):
        file.unlink()


def peak_memory() -> float:
    """Of the GPU, if there is one, else of this process, in GB."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    import resource  # not on Windows
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1e9 if sys.platform == "darwin" else 1e6)


def apart(function, *args) -> None:
    """Call this in a process of its own, so that its peak memory is its own."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        sys.exit(process.exitcode)


def run(args: argparse.Namespace, variant: str, fraction: float, seed: int) -> dict:
    """What a run came to; it is only made if its folder isn't there."""
    out = args.runs / (f"{variant}, {fraction:g}, {args.image_size} px, "
                       f"{args.epochs or 'all'} epochs, seed {seed}")
    flags = VARIANTS[variant][0]
    if not (out / "cost.json").exists():
        shutil.rmtree(out, ignore_errors=True)
        words = ["--data", args.data, "--fraction", fraction, "--seed", seed, "--out", out,
                 "--image-size", args.image_size, "--cache", args.cache,
                 *([] if "--from-scratch" in flags else ["--weights", args.weights]),
                 *(["--epochs", args.epochs] if args.epochs else [])]
        print(f"{variant}, fraction {fraction:g}, seed {seed}", file=sys.stderr, flush=True)
        apart(job, variant, [*map(str, words), *flags], out)
    report, cost, split, options = (json.loads((out / f"{name}.json").read_text())
                                    for name in ("test", "cost", "split", "config"))
    weights = "none" if {"--from-scratch", "none"} & set(flags) else args.weights
    for name, expected in (("data", str(args.data)), ("weights", weights)):
        if (found := options["options"][name]) != expected:
            sys.exit(f"'{out}' was made with --{name} {found}: give another --runs")
    history, predictions = (read_csv(out / f"{name}.csv") for name in ("history", "predictions"))
    history = [{key: float(value) for key, value in row.items()} for row in history]
    return {**cost, "history": history, "val": next(row["val_acc"] for row in history
                                                 if row["epoch"] == report["epoch"]),
            "report": report, "test": report["accuracy"],
            "calibration": report["calibration_error"],
            "right": [row["label"] == row["predicted"] for row in predictions],
            "epochs": sum(row["seconds"] for row in history), "photos": len(split["train"]),
            "epoch": statistics.median([row["seconds"] for row in history if row["epoch"]][-5:])}


def read_csv(file: Path) -> list[dict]:
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


# -- Tables ----------------------------------------------------------------------------------------

def mean(runs: list[dict], key: str) -> float:
    return statistics.mean(run[key] for run in runs)


def median(runs: list[dict], key: str) -> float:
    return statistics.median(run[key] for run in runs)


def ahead(runs: list[dict], others: list[dict], key: str = "test") -> str:
    """Mean difference, seed by seed, and its 95 % interval, in percentage points."""
    values = [run[key] - other[key] for run, other in zip(runs, others, strict=True)]
    count = len(values)
    spread = statistics.stdev(values) / math.sqrt(count) if count > 1 else 0
    half = STUDENT.get(count, 2.26) * spread
    if key == "test":
        of_seeds = [[one - other for one, other in zip(run["right"], other["right"], strict=True)]
                    for run, other in zip(runs, others)]
        of_photos = [statistics.mean(differences) for differences in zip(*of_seeds)]
        half = math.hypot(half, 1.96 * statistics.stdev(of_photos) / math.sqrt(len(of_photos)))
    return f"{100 * statistics.mean(values):+.1f}" + (f" ± {100 * half:.1f}" if half else "")


def print_table(head: str, rows: list[list]) -> None:
    columns = range(head.count("|") + 1)
    print(f"| {head} |\n|{'|'.join('-:' if column else '-' for column in columns)}|")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


def recipes(args: argparse.Namespace, runs_of) -> None:
    rows = []
    for fraction in args.fraction:
        tuned = runs_of("tuned", fraction)
        for name in args.variants or ["published, float32", "reference", "tuned"]:
            runs, against = runs_of(name, fraction), ["", ""]
            if runs is not tuned:
                errors = (1 - mean(tuned, "test")) / max(1e-9, 1 - mean(runs, "test"))
                against = [ahead(tuned, runs), f"{errors:.2f}"]
            rows.append([name, f"{runs[0]['photos']:,}", f"{mean(runs, 'val'):.4f}",
                         f"{mean(runs, 'test'):.4f}", *against,
                         f"{100 * mean(runs, 'calibration'):.1f} %",
                         f"{median(runs, 'seconds'):.0f}"])
    print_table("recipe | training photos | validation | test | tuned is ahead by | errors, tuned "
                "/ this row | calibration error | seconds, whole job", rows)


def scratch(args: argparse.Namespace, runs_of) -> None:
    for fraction in args.fraction:
        columns = {"fine-tuned": runs_of("tuned", fraction),
                   **{name: runs_of(name, fraction) for name in args.variants or ["from scratch"]}}
        last = max(int(run["history"][-1]["epoch"]) for runs in columns.values() for run in runs)
        rows = []
        for epoch in [*range(6), *range(10, last + 1, 10)]:
            found = [[row["val_acc"] for run in runs for row in run["history"]
                      if row["epoch"] == epoch] for runs in columns.values()]
            rows.append([epoch, *(f"{statistics.mean(values):.4f}" if values else ""
                                  for values in found)])
        for title, cell in (
                ("training photos, last epoch", lambda runs: "{:.4f}".format(statistics.mean(
                    run["history"][-1]["train_acc"] for run in runs))),
                ("**test** of the best epoch", lambda runs: f"{mean(runs, 'test'):.4f}"),
                ("seconds an epoch", lambda runs: f"{median(runs, 'epoch'):.1f}"),
                ("seconds, whole job", lambda runs: f"{median(runs, 'seconds'):.0f}"),
                ("parameters that learn", lambda runs: f"{runs[0]['parameters']:,}")):
            rows.append([title, *map(cell, columns.values())])
        photos = columns["fine-tuned"][0]["photos"]
        print_table(f"epoch ({photos:,} training photos) | {' | '.join(columns)}", rows)
        if Q3.HAS_MATPLOTLIB:  # of the first seed
            picture = args.runs / f"scratch-{fraction:g}.png"
            Q3.draw_curves(picture, {name: (runs[0]["history"], runs[0]["report"])
                                     for name, runs in columns.items()})
            print(f"\n{picture}")


def freezing(args: argparse.Namespace, runs_of) -> None:
    rows = []
    for fraction in args.fraction:
        usual = runs_of("tuned", fraction)
        for depth in (9, 8, 7, 6, 4, 0):
            runs = runs_of("tuned" if depth == 6 else f"freeze {depth}", fraction)
            rows.append([depth, f"{runs[0]['parameters']:,}", f"{mean(runs, 'val'):.4f}",
                         f"{mean(runs, 'test'):.4f}", "" if runs is usual else ahead(runs, usual),
                         f"{median(runs, 'epoch'):.1f}", f"{median(runs, 'seconds'):.0f}",
                         f"{max(run['memory_gb'] for run in runs):.1f} GB"])
    print_table("frozen children | parameters that learn | validation | test | against 6 | seconds "
                "an epoch | whole job | peak memory", rows)


def ingredients(args: argparse.Namespace, runs_of) -> None:
    for fraction in args.fraction:
        tuned, rows = runs_of("tuned", fraction), []
        for name in dict.fromkeys(["tuned", *(args.variants or INGREDIENTS)]):
            runs = runs_of(name, fraction)
            val, test = ("" if runs is tuned else ahead(runs, tuned, part)
                         for part in ("val", "test"))
            rows.append([name, f"{mean(runs, 'val'):.4f}", val, f"{mean(runs, 'test'):.4f}", test,
                         f"{100 * mean(runs, 'calibration'):.1f} %",
                         f"{median(runs, 'epochs'):.0f}"])
        print_table(f"{tuned[0]['photos']:,} training photos | validation | against tuned | test | "
                    "against tuned | calibration error | epochs' seconds", rows)


TABLES = {table.__name__: table for table in (recipes, scratch, freezing, ingredients)}


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("table", choices=TABLES)
    add("--data", type=Path, default=Path("inaturalist_12k"), metavar="DIR")
    add("--weights", default="IMAGENET1K_V2", metavar="SPEC")
    add("--fraction", type=float, nargs="+", default=[0.25], metavar="F", help="(default: 0.25)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N", help="(default: 0 1 2)")
    add("--variants", nargs="+", choices=VARIANTS, metavar="NAME",
        help="only these rows (of scratch: columns); some of: " + "; ".join(VARIANTS))
    add("--epochs", type=int, metavar="N", help="(default: as in Q3.py)")
    add("--image-size", type=int, default=224, metavar="N", help="(default: 224)")
    add("--runs", type=Path, default=Path("runs/benchmark_accuracy"), metavar="DIR")
    add("--cache", default="none", metavar="DIR", help="""share decoded photos and trunk maps among
        runs, which saves time; but then the times of whole jobs can't be compared""")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    args.seeds, args.data = list(dict.fromkeys(args.seeds)), find_data(args.data)
    if args.variants and args.table == "freezing":
        sys.exit("--variants: 'freezing' has all its rows; it goes with the other tables")
    known = {}

    def runs_of(variant: str, fraction: float) -> list[dict]:
        if (variant, fraction) not in known:
            known[variant, fraction] = [run(args, variant, fraction, seed) for seed in args.seeds]
        return known[variant, fraction]

    TABLES[args.table](args, runs_of)


if __name__ == "__main__":
    with exit_codes():
        main()
