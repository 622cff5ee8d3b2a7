#!/usr/bin/env python3
"""What each ingredient of Q3.py's recipe is worth: accuracy and time, on given photos and weights.

    python tests/benchmark_accuracy.py --data inaturalist_12k --weights resnet50.pth --seeds 0 1 2

Each variant is the job of Q3.py with one thing changed, run once a seed. A seed decides the split too, and is the same for
all variants, so that differences are taken seed by seed. Validation accuracies are those of the best epoch, which chooses
what is tested; means over the seeds, and the 95 % interval of the mean difference to the first variant (Student's t).

Every finished run is a line of the file --results, and is not run again: a benchmark that was stopped goes on, and one that
is done prints its table at once.
"""

import argparse
import contextlib
import hashlib
import io
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import Q3  # noqa: E402
import dataset_split  # noqa: E402

STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # 97.5 %, by number of seeds


def look_at_cropped_pixels(self, which, places=None, look=Q3.Photos.look):
    """In training, cut photos before the trunk sees them, instead of cutting the trunk's maps of them."""
    if places is None:
        return look(self, which)
    kept, self.kept = self.kept, None
    try:
        return look(self, which, places)
    finally:
        self.kept = kept


VARIANTS = {  # name: (flags of Q3.py, what is changed in it)
    "tuned": ([], {}),
    "reference": (["--recipe", "reference"], {}),
    "tuned, whole photos squashed to a square": ([], {"BORDER": None}),
    "tuned, border of 4/232 instead of 1/16": ([], {"BORDER": 4 / 232}),
    "tuned, fc from noise": (["--lr-head", "1e-3", "--lr-backbone", "1e-4"], {"starts_from_probe": lambda args: False, "holds_batchnorm": lambda args: True}),
    "tuned, BatchNorm's statistics learnt": ([], {"holds_batchnorm": lambda args: False}),
    "tuned, the reference's learning rates": (["--lr-head", "1e-3", "--lr-backbone", "1e-4"], {}),
    "tuned, without crops": ([], {"CROP": 1.0}),
    "tuned, crops of pixels": ([], {"Photos.look": look_at_cropped_pixels}),
    "tuned, only fc learns": (["--freeze", "9"], {}),
}


def run(args: argparse.Namespace, variant: str, seed: int) -> dict:
    flags, changes = VARIANTS[variant]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        for name, value in changes.items():
            stack.enter_context(patch.object(Q3.Photos, "look", value) if name == "Photos.look" else patch.object(Q3, name, value))
        options = Q3.get_args(list(map(str, ["--data", args.data, "--weights", args.weights, "--fraction", args.fraction, "--val-fraction",
                                             args.val_fraction, "--seed", seed, "--epochs", args.epochs, "--image-size", args.image_size,
                                             "--cache", args.cache, "--out", folder, *flags])))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        Q3.main(options)
        rows = Q3.torch.load(Path(folder, "last.pt"), weights_only=True)["history"]
        report = json.loads(Path(folder, "test.json").read_text())
    return {"val": max(row["val_acc"] for row in rows), "last": rows[-1]["val_acc"], "last_loss": rows[-1]["val_loss"],
            "best_epoch": report["epoch"], "test": report["accuracy"], "seconds": sum(row["seconds"] for row in rows)}


def key_of(args: argparse.Namespace, variant: str, seed: int) -> str:
    """What a result depends on: when any of it changes, the run is made again. (But photos and weights count by name.)"""
    programs = hashlib.sha256(b"".join(Path(file).read_bytes() for file in (Q3.__file__, dataset_split.__file__, __file__)))
    device = Q3.pick_device("auto")
    return json.dumps([variant, seed, str(args.data), args.weights, args.fraction, args.val_fraction, args.epochs, args.image_size,
                       programs.hexdigest()[:16], Q3.torch.__version__, str(device), str(Q3.pick_precision("auto", device))])


def read_results(file: Path) -> dict[str, dict]:
    results = {}
    for text in file.read_text().splitlines() if file.exists() else ():
        with contextlib.suppress(ValueError):  # a line that a kill cut off
            line = json.loads(text)
            results[line["key"]] = line
    return results


def spread(values: list[float]) -> str:
    """Mean and 95 % interval, in percentage points."""
    if len(values) < 2:
        return f"{100 * values[0]:+.1f}"
    half = STUDENT.get(len(values), 2.0) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{100 * statistics.mean(values):+.1f} ± {100 * half:.1f}"


def print_table(args: argparse.Namespace, results: dict[str, list[dict]]) -> None:
    first = next(iter(results.values()))
    print("| | validation, last epoch | best epoch | test of the best | against the first | epochs' seconds |\n|-|-:|-:|-:|-:|-:|")
    for variant, runs in results.items():
        difference = "" if runs is first else spread([run["test"] - other["test"] for run, other in zip(runs, first)])
        last, val, test, seconds = (statistics.mean(run[key] for run in runs) for key in ("last", "val", "test", "seconds"))
        print(f"| {variant} | {last:.4f} | {val:.4f} | {test:.4f} | {difference} | {seconds:.0f} |")


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("inaturalist_12k"), metavar="DIR")
    parser.add_argument("--weights", default="IMAGENET1K_V2", metavar="SPEC")
    parser.add_argument("--epochs", type=int, default=5, metavar="N")
    parser.add_argument("--image-size", type=int, default=224, metavar="N")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="NAME", help="; ".join(VARIANTS))
    parser.add_argument("--results", type=Path, default=Path("runs/benchmark_accuracy.jsonl"), metavar="FILE")
    parser.add_argument("--cache", type=Path, default=Path(".cache"), metavar="DIR")
    dataset_split.add_split_options(parser, fraction=0.25)
    return parser


def main(argv: list[str] | None = None) -> None:
    args = get_args_parser().parse_args(argv)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    done = read_results(args.results)
    results = {variant: [] for variant in args.variants}
    for seed in args.seeds:
        for variant in args.variants:
            key = key_of(args, variant, seed)
            if key not in done:
                line = done[key] = {"key": key, **run(args, variant, seed)}
                with open(args.results, "a") as stream:
                    stream.write(json.dumps(line) + "\n")
                print(f"seed {seed}, {variant}: test {line['test']:.4f}", file=sys.stderr, flush=True)
            results[variant].append(done[key])
    print_table(args, results)


if __name__ == "__main__":
    main()
