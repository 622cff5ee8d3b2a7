#!/usr/bin/env python3
"""Kill runs of Q3.py at random moments, resume them, and compare their results.

    python tests/benchmark_kills.py --data inaturalist_12k --weights resnet50.pth --kills 100

starts that many runs on a tenth of the photos at 64 x 64 pixels, each in a process of its own (from
a server that has loaded torch already), which gets SIGKILL at a random moment; every fourth while
it writes a checkpoint. A third of the resumed runs are killed again. A run fails unless it ends
with the same bits as one that was left alone: history.csv (timings aside), test.json,
predictions.csv, split.json, and every tensor and value of best.pt and last.pt.
"""

import argparse
import contextlib
import csv
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import Q3
from dataset_split import exit_codes

TIMINGS = ("seconds", "images_per_second")


def equal(one, two) -> bool:
    """Whether two nests of dicts and lists hold the same bits."""
    if isinstance(one, Q3.torch.Tensor):
        return one.dtype == two.dtype and one.shape == two.shape and Q3.torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(equal, one, two))
    return one == two


def result(out: Path) -> dict:
    """What a finished run has left behind, without the timings and the folder's own name."""
    def without_timings(row):
        return {key: value for key, value in row.items() if key not in TIMINGS}
    found = {name: (out / name).read_text()
             for name in ("test.json", "predictions.csv", "split.json")}
    with open(out / "history.csv", newline="") as stream:
        found["history.csv"] = list(map(without_timings, csv.DictReader(stream)))
    for name in ("best.pt", "last.pt"):
        found[name] = Q3.torch.load(out / name, weights_only=True)
        for option in ("data", "cache"):  # they may have moved
            del found[name]["options"][option]
    found["last.pt"]["history"] = list(map(without_timings, found["last.pt"]["history"]))
    return found


def kill_after(process, seconds: float) -> None:
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.005)
    process.kill()


def kill_while_writing(process, out: Path, chance: random.Random) -> bool:
    """Kill it while it writes a checkpoint, after a random number of others. Whether that was
    met."""
    passed, seen = chance.randrange(6), set()
    while process.poll() is None:
        time.sleep(0.001)
        with os.scandir(out) if out.exists() else contextlib.nullcontext([]) as entries:
            aside = {(entry.name, entry.inode()) for entry in entries if ".pt." in entry.name}
        if aside - seen and len(seen) >= passed:
            time.sleep(chance.uniform(0, 0.02))
            process.kill()
            process.wait()
            return any(out.glob("*.pt.*.tmp"))
        seen |= aside
    return False


def one_trial(start, out: Path, seconds: float, while_writing: bool,
              chance: random.Random) -> tuple[int, int]:
    """Start a run, kill it, and go on until it has ended. How often it was killed, and how often
    while it wrote a checkpoint.

    Args:
        start: takes words of a command line, and gives a process as `subprocess.Popen` does.
        seconds: how long a run takes that is left alone.
    """
    kills = writing = 0
    status = None
    while status != 0:
        if not (resume := (out / "last.pt").exists()):
            shutil.rmtree(out, ignore_errors=True)  # begun, and nothing kept
        words = ["--resume" if resume else "--out", out]
        process, begun = start(words), time.monotonic()
        if kills == 0 or (kills < 4 and chance.random() < 1 / 3):
            if while_writing:
                writing += kill_while_writing(process, out, chance)
            else:
                kill_after(process, chance.uniform(0, seconds))
            status = process.wait()
            kills += status != 0
            if status == 0 and kills == 0:  # it was faster
                shutil.rmtree(out)
                status, seconds = None, time.monotonic() - begun
        elif status := process.wait():
            raise SystemExit(f"a resumed run ended with exit code {status}, see {out}")
    if list(out.glob("*.tmp")):
        raise SystemExit(f"leftovers in {out}")
    return kills, writing


def trials(start, folder: Path, count: int, seed: int, every_writing: int = 4) -> str:
    """Kill and resume so many runs. Says what was found, or ends the program where bits differ."""
    chance, kills, writing = random.Random(seed), 0, 0
    for name in ("first", "alone"):  # the first has more to load; and they should be equal
        begun = time.monotonic()
        if start(["--out", folder / name]).wait() != 0:
            raise SystemExit(f"the run that was left alone failed, see {folder}")
    seconds, expected = time.monotonic() - begun, result(folder / "alone")
    for number in range(-1, count):
        out = folder / (f"trial{number}" if number >= 0 else "first")
        killed = met = 0
        if number >= 0:
            killed, met = one_trial(start, out, seconds, number % every_writing == 0, chance)
        kills, writing, found = kills + killed, writing + met, result(out)
        different = [name for name in expected if not equal(expected[name], found[name])]
        if different:
            raise SystemExit(f"{out}: {', '.join(different)} differ from the run left alone")
        shutil.rmtree(out)
        print(f"{out.name}: killed {killed} times, {met} of them while writing a checkpoint; "
              "identical", flush=True)
    return (f"{count} runs were killed {kills} times, {writing} of them while writing a "
            f"checkpoint; {count} ended with the bits of the run left alone")


class Forked:
    """A process as `subprocess.Popen` gives one, from a server that has loaded torch already."""

    def __init__(self, function, *args):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch._dynamo", "Q3", "dataset_split"])  # slow to load
        self.process = context.Process(target=function, args=args)
        self.process.start()
        self.kill = self.process.kill

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self) -> int:
        self.process.join()
        return self.process.exitcode


def run(output: Path, words: list[str]) -> None:
    sys.stdout = sys.stderr = open(output, "a")  # noqa: SIM115 - until the process ends
    Q3.HAS_MATPLOTLIB = False  # pictures would take longer than the epochs
    with exit_codes():
        Q3.main(Q3.get_args(words))


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("inaturalist_12k"), metavar="DIR")
    parser.add_argument("--weights", default="IMAGENET1K_V2", metavar="SPEC")
    parser.add_argument("--kills", type=int, default=100, metavar="N",
                        help="how many runs to kill (default: 100)")
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="of the moments (default: 0)")
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[],
                        help="further options of Q3.py; must come last")
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kills-"))
    begin = ["--data", args.data, "--weights", args.weights, "--fraction", 0.1,
             "--image-size", 64, "--epochs", 2, *args.flags]

    def start(words):
        words = [*words, "--cache", folder / "cache", *([] if "--resume" in words else begin)]
        return Forked(run, folder / "output.txt", list(map(str, words)))

    print(trials(start, folder, args.kills, args.seed))
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
