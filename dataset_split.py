#!/usr/bin/env python3
"""Stratified subsets of a folder of labelled photos, the same on every machine.

    python dataset_split.py --fraction 0.25

takes a quarter of every class of inaturalist_12k/train, sets a fifth of that aside for validation, and writes down
which photo is in which part: a manifest, not a copy. Q3.py imports this module and makes the same split itself.

How a photo finds its place: the photos of a class are put in the order of a hash of (seed, path), the first
`fraction` of that order is used, and every fifth position or so (for a `val-fraction` of 0.2) is validation. A photo's
place depends on nothing else, so a smaller subset is always inside a larger one, and no photo ever moves between
training and validation when the fraction changes.

Where there is no val/ with test photos, a part of each class (--test-fraction) is set aside for the test first, by a hash of
the path alone: always the same photos, whatever the fractions and the seed of the rest.

The module also holds what else Q3.py does with files: the folder of a run, files that are never half written, photos that
are there twice, the pictures of the demo, and the download of the public data set.
"""

import argparse
import csv
import difflib
import errno
import hashlib
import http.client
import io
import json
import math
import os
import shlex
import shutil
import stat
import sys
import tempfile
import time
import unicodedata
import urllib.error
import urllib.request
import zipfile
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path

from tqdm import tqdm

ARCHIVE = "https://storage.googleapis.com/wandb_datasets/nature_12K.zip"
PHOTO_ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # as in torchvision
MANIFEST_FORMAT = 1
TEST_FRACTION = 0.2  # of the photos, where there is no val/
PART_NAMES = ("train", "training", "test", "testing", "valid", "validation", "val")  # which folders of other projects have


class InputError(Exception):
    """Input that can't be used. Its text is the one line a person gets: what is wrong, where, and what to do."""


@contextmanager
def disk_errors(words: str):
    """Turn an OSError into an InputError: these words, and what the system says."""
    try:
        yield
    except OSError as error:
        name = str(error.filename2 or error.filename or "")
        file = f" ('{name}')" if name not in words else ""
        raise InputError(f"{words}: {error.strerror or error}{file}") from None


# -- Which photos there are -------------------------------------------------------------------------------------------

def find_data(folder: str | os.PathLike) -> Path:
    """The data folder, whatever capitals it is typed in: the public archive unpacks to inaturalist_12K. Raises InputError:
    there is no such folder."""
    folder = _in_any_capitals(Path(folder))
    if not os.path.isdir(folder):
        raise InputError(f"no data folder '{folder}' (looked in {Path.cwd()}): python Q3.py --download fetches iNaturalist-12K "
                         f"(3.8 GB, {ARCHIVE}), python Q3.py --demo draws pictures to try, --data names a folder of your own")
    return folder


def train_folder(data: Path) -> Path:
    """Where the class folders of the training photos are: in train/, or in the data folder itself. Raises InputError: there
    is a val/ and no train/, or parts of the data have other names."""
    if os.path.isdir(data / "train"):
        return data / "train"
    if os.path.isdir(data / "val"):
        raise InputError(f"no train/ beside val/ in the data folder '{data}': the training photos are expected as {data}/train/<Class>/<photo>.jpg")
    if parts := [name for name in os.listdir(data) if name.lower() in PART_NAMES]:
        raise InputError(f"'{data / parts[0]}' is called like a part of the data, not like a class: training photos are expected in "
                         f"{data}/train/<Class>/ and test photos, if any, in {data}/val/<Class>/")
    return data


def test_folder(data: Path) -> Path | None:
    """Where the class folders of the test photos are: in val/, if there is one."""
    return data / "val" if os.path.isdir(data / "val") else None


def unread_part(data: Path) -> Path | None:
    """A folder beside train/ that is called like a part of the data, and of which nothing is read."""
    read = [folder for folder in (train_folder(data), test_folder(data)) if folder]
    beside = [data / name for name in sorted(os.listdir(data)) if name.lower() in PART_NAMES] if data not in read else []
    return next((part for part in beside if part.is_dir() and not any(part.samefile(folder) for folder in read)), None)


def _in_any_capitals(folder: Path) -> Path:
    namesakes = (other for other in folder.parent.glob("*") if other.name.lower() == folder.name.lower())
    return folder if os.path.exists(folder) else next(namesakes, folder)


def list_photos(folder: Path, least: int = 2) -> dict[str, list[str]]:
    """The photos of a tree of class folders, with what is hidden left out.

    Args:
        folder: its sub-folders are the classes; a photo may lie deeper inside its class folder.
        least: how many classes there have to be.

    Returns:
        {class name: paths relative to `folder`, with "/"}, both sorted.

    Raises:
        InputError: `folder` is missing or unreadable, has too few class folders, or one of them has no photo.
    """
    with disk_errors(f"the photos in '{folder}' can't be listed"):
        with os.scandir(folder) as entries:
            classes = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
        if len(classes) < least:
            found = f"one class folder only ({classes[0]!r})" if classes else "no class folders"
            raise InputError(f"{found} in '{folder}': {least} or more are needed, each with the photos of one class; --data names the folder "
                             "that they, or train/ and val/, are in")
        files = {name: sorted(_visible_files(folder, name)) for name in classes}

    photos = {name: [path for path in files[name] if path.lower().endswith(PHOTO_ENDINGS)] for name in classes}
    for name in classes:
        if not photos[name]:
            raise InputError(f"no photos in the class folder '{folder / name}' ({', '.join(PHOTO_ENDINGS)}): "
                             "put some there, or take the class out")
    others = [path for name in classes for path in files[name] if not path.lower().endswith(PHOTO_ENDINGS)]
    if others:
        print(f"left out, being no photos by their ending: {len(others)} in {folder}, the first {others[0]!r}")
    return photos


def photos_in(place: Path) -> list[Path]:
    """The photos of a folder and of those in it, sorted, with what is hidden left out; then the folders in it that can't be read.
    Anything else, and a folder without photos, is given back as it is."""
    unreadable = []
    try:
        files = sorted(Path(folder, name) for folder, _, names in _visible(place, unreadable.append) for name in names
                       if name.lower().endswith(PHOTO_ENDINGS))
    except ValueError:  # no name of a file can hold a zero byte
        return [place]
    return files + [Path(error.filename) for error in unreadable if Path(error.filename) != place] or [place]


def file_facts(files: list[Path]) -> list[tuple]:
    """What changes when one of these files does: its name, and size and time of its last change if it is there."""
    facts = []
    for file in files:
        try:
            status = os.stat(file)
            facts.append((str(file), status.st_size, status.st_mtime_ns))
        except OSError:
            facts.append((str(file),))
    return facts


def changed_files(facts: list[tuple]) -> list[str]:
    """Those of the files that are no longer as these facts say."""
    return [before[0] for before, now in zip(facts, file_facts([Path(name) for name, *_ in facts])) if before != now]


def _visible_files(root: Path, class_name: str) -> list[str]:
    def fail(error):
        raise error

    return [f"{Path(folder).relative_to(root).as_posix()}/{name}" for folder, _, names in _visible(root / class_name, fail) for name in names]


def _visible(top: Path, onerror=None):
    """os.walk without what is hidden."""
    for folder, folders, names in os.walk(top, onerror=onerror):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield folder, folders, [name for name in names if not name.startswith(".")]


# -- Which photo is in which part -------------------------------------------------------------------------------------

def split(photos: dict[str, list[str]], fraction: float, val_fraction: float, seed: int) -> dict:
    """Divide a stratified subset of the photos into training and validation.

    Args:
        photos: as `list_photos` returns them.
        fraction: part of each class that is used, in (0, 1]; rounded down, but at least one photo.
        val_fraction: part of the used photos that is validation, in (0, 1).
        seed: another seed draws another subset.

    Returns:
        The manifest, a dict of plain values: `format`, `fraction`, `val_fraction`, `seed`, and the sorted lists
        `classes`, `train` and `val`.

    Raises:
        InputError: a class is too small to give each part a photo.
    """
    train, val, share = [], [], _exact(val_fraction)
    for name, paths in photos.items():
        ordered = sorted(paths, key=lambda path: _order_key(seed, path))
        used = ordered[:max(1, math.floor(len(ordered) * _exact(fraction)))]
        in_val = [round((k + 1) * share) > round(k * share) for k in range(len(used))]
        if not 0 < sum(in_val) < len(used):
            short = "validation" if not any(in_val) else "training"
            raise InputError(f"class {name!r} is too small: {len(used)} of its {len(paths)} photos are used, and none "
                             f"is left for {short}. Add photos, raise --fraction, or change --val-fraction")
        train += [path for path, held_out in zip(used, in_val) if not held_out]
        val += [path for path, held_out in zip(used, in_val) if held_out]
    return {"format": MANIFEST_FORMAT, "fraction": fraction, "val_fraction": val_fraction, "seed": seed,
            "classes": sorted(photos), "train": sorted(train), "val": sorted(val)}


def set_test_aside(photos: dict[str, list[str]], test_fraction: float) -> tuple[dict[str, list[str]], list[str]]:
    """Divide photos into those to learn from and a stratified test part, whatever --fraction and --seed are.

    Args:
        photos: as `list_photos` returns them.
        test_fraction: part of each class that is for the test, in (0, 1); rounded down, but at least one photo.

    Returns:
        The others, in the form of `photos`; and the sorted paths of the test part.

    Raises:
        InputError: a class has fewer than three photos: training, validation and test need one each.
    """
    rest, test = {}, []
    for name, paths in photos.items():
        if len(paths) < 3:
            raise InputError(f"class {name!r} is too small: training, validation and test need a photo each, and it has {len(paths)}")
        ordered = sorted(paths, key=lambda path: _order_key("test", path))
        count = max(1, math.floor(len(paths) * _exact(test_fraction)))
        test += ordered[:count]
        rest[name] = sorted(ordered[count:])
    return rest, sorted(test)


def _exact(number: float) -> Fraction:
    """The decimal that was typed: 0.29 of 100 photos is 29, where the nearest binary number makes it 28."""
    return Fraction(str(number))


def _order_key(seed: int | str, path: str) -> bytes:
    # NFC: macOS hands out accented names decomposed, other systems as they were written
    return hashlib.sha256(f"{seed}/{unicodedata.normalize('NFC', path)}".encode("utf-8", "surrogateescape")).digest()


def labelled(root: Path, paths: list[str], classes: list[str]) -> list[tuple[Path, int]]:
    """What goes from the disk to the network: (file, index of its class in `classes`) for each relative path."""
    index = {name: label for label, name in enumerate(classes)}
    return [(root / path, index[path.split("/", 1)[0]]) for path in paths]


def choose(args: argparse.Namespace) -> tuple[dict, dict[str, list[str]]]:
    """The manifest that these options ask for, and the photos of the training folder by class; without a val/ a test part of
    them is set aside, and named in the manifest. Raises InputError: folders or photos that can't be used, or a test part
    asked for beside a val/."""
    data = args.data = find_data(args.data)
    photos = list_photos(train_folder(data))
    if not test_folder(data):
        args.test_fraction = args.test_fraction or TEST_FRACTION
        rest, test = set_test_aside(photos, args.test_fraction)
        try:
            manifest = split(rest, args.fraction, args.val_fraction, args.seed)
        except InputError as error:
            raise InputError(f"{error} ({args.test_fraction:g} of each class was set aside for the test before, see --test-fraction)") from None
        return manifest | {"test_fraction": args.test_fraction, "test": test}, photos
    if args.test_fraction:
        raise InputError(f"--test-fraction {args.test_fraction}: '{data}' has test photos of its own, in val/")
    return split(photos, args.fraction, args.val_fraction, args.seed), photos


def load_split(args: argparse.Namespace, manifest_file: Path | None) -> tuple[dict, dict[str, list[tuple[Path, int]]], list[Path]]:
    """The manifest; the (file, label) pairs of "train", "val" and "test"; and all files of the training folder, used or not.
    No photo is opened. Raises InputError: folders, photos or a manifest that can't be used."""
    if manifest_file:
        data = args.data = find_data(args.data)
        photos = list_photos(train_folder(data))
        manifest = read_manifest(manifest_file, photos, test=not test_folder(data))
        args.fraction, args.val_fraction, args.test_fraction = (manifest.get(key) for key in ("fraction", "val_fraction", "test_fraction"))
    else:
        manifest, photos = choose(args)
    root, test_root, classes = train_folder(args.data), test_folder(args.data), manifest["classes"]
    parts = {part: labelled(root, manifest.get(part, []), classes) for part in ("train", "val", "test")}
    if test_root:
        test_photos = list_photos(test_root)
        if test_photos.keys() != photos.keys():
            raise InputError(f"'{root}' and '{test_root}' have different classes: {differences(photos, test_photos, 'train', 'val')}")
        parts["test"] = labelled(test_root, [path for paths in test_photos.values() for path in paths], classes)
    return manifest, parts, [root / path for paths in photos.values() for path in paths]


def same_photos(files: list[Path]) -> list[tuple[Path, Path]]:
    """Files that hold the same bytes, each with the first of its kind. Only those of the same size are read; empty ones are not."""
    by_size, firsts, pairs = defaultdict(list), {}, []
    for file in files:
        with suppress(OSError):  # who reads the photo will say so
            if file.is_file():
                by_size[os.path.getsize(file)].append(file)
    for size, alike in by_size.items():
        for file in alike if size and len(alike) > 1 else ():
            with suppress(OSError):
                first = firsts.setdefault(hashlib.sha256(file.read_bytes()).digest(), file)
                if first != file:
                    pairs.append((first, file))
    return pairs


def print_same_photos(parts: dict[str, list[tuple[Path, int]]], data: Path, out: Path) -> int:
    """Report photos that are in two parts or two classes, byte for byte, and list them in same_photos.csv. How many they are."""
    where = {file: (part, label) for part, pairs in parts.items() for file, label in pairs}
    rows = [{"path": first.relative_to(data).as_posix(), "same_as": other.relative_to(data).as_posix(),
             "parts": f"{where[first][0]} {where[other][0]}", "labels": "same" if where[first][1] == where[other][1] else "different"}
            for first, other in same_photos(list(where)) if where[first] != where[other]]
    if rows:
        first = rows[0]
        print(f"Same photo  {len(rows)} times in two parts or two classes, see {out / 'same_photos.csv'}; the first: {first['path']} = "
              f"{first['same_as']}", flush=True)
        write_csv(out / "same_photos.csv", rows)
    return len(rows)


# -- Files that are whole at any moment, and the folder of a run ------------------------------------------------------

@contextmanager
def atomic_write(file: Path):
    """Open `file` for writing bytes so that it is there whole or, after a kill or an error, as it was before: written beside its
    place, flushed to the disk, and moved there. Raises InputError: it can't be written."""
    aside = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(aside, file)
    except OSError as error:
        gone = "" if file.parent.is_dir() else f": the folder '{file.parent}' is gone"
        raise InputError(f"'{file}' can't be written: {error.strerror}{gone}") from None
    finally:
        with suppress(OSError):
            aside.unlink(missing_ok=True)


def write_json(file: Path, value) -> None:
    with atomic_write(file) as stream:
        stream.write((json.dumps(value, indent=1) + "\n").encode())


def write_csv(file: Path, rows: list[dict]) -> None:
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, rows[0])
    table.writeheader()
    table.writerows(rows)
    with atomic_write(file) as stream:
        stream.write(text.getvalue().encode("utf-8", "surrogateescape"))


def claim_folder(out: Path | None, names: tuple[str, ...], resume: bool = False) -> Path:
    """Make a run's folder, `out`, or runs/<date-time> where that is None, and clear away what a kill may have left of its files.

    Args:
        names: of the files that a run writes there.

    Raises:
        InputError: it can't be made or written to, or it holds a run already and not to `resume` it.
    """
    with disk_errors(f"--out '{out or 'runs'}' can't be the run's folder"):
        if out is None:
            out = new_folder(Path("runs"))
        out.mkdir(parents=True, exist_ok=True)
        if not resume and any((out / name).exists() for name in names):
            begun = f", or go on with it: python Q3.py --resume {quoted(str(out))}" if (out / "config.json").exists() else ""
            raise InputError(f"--out '{out}' already holds a run: give another folder, or move that one away{begun}")
        for name in names:
            for left in out.glob(f"{name}.[0-9]*.tmp"):
                left.unlink()
        tempfile.TemporaryFile(dir=out).close()
        return out


def refuse_inside_photos(args: argparse.Namespace) -> None:
    """Raise InputError if --out or --cache lies among the class folders of --data, where it would be taken for a class."""
    for name, folder in (("out", args.out or Path("runs")), ("cache", args.cache)):
        inside, roots = Path(os.path.realpath(folder)), [Path(os.path.realpath(root)) for root in (train_folder(args.data), test_folder(args.data)) if root]
        if any(root in inside.parents and not inside.relative_to(root).parts[0].startswith(".") for root in roots):
            raise InputError(f"--{name} '{folder}' lies among the class folders in '{args.data}', and would be one of them: choose another folder")


def new_folder(parent: Path) -> Path:
    """A folder that is named after this second; the next one, if another run has taken it."""
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = parent / time.strftime("%Y-%m-%d_%H-%M-%S")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            time.sleep(0.2)


def quoted(words: str) -> str:
    """As a shell takes it for one word."""
    return shlex.quote(words) if os.name == "posix" else f'"{words}"'


# -- The manifest on disk ---------------------------------------------------------------------------------------------

def write_manifest(manifest: dict, file: Path) -> None:
    """Write a manifest as JSON. One that is there already is left alone if equal, and never overwritten if not. Raises
    InputError: `file` can't be written, or holds something else."""
    with disk_errors(f"'{file}' can't be written"):
        if not os.path.exists(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, manifest)
        elif file.read_bytes() != (json.dumps(manifest, indent=1) + "\n").encode():
            raise InputError(f"'{file}' is there already and differs from the split just made (other photos "
                             "or options): delete it, or name another file with --out")


def read_manifest(file: str | os.PathLike, photos: dict[str, list[str]], test: bool = False) -> dict:
    """Read a manifest and check it against the photos that are there.

    Args:
        file: a JSON file that this program wrote, or one of the same form.
        photos: as `list_photos` returns them for the data the manifest is to be used with.
        test: whether it has to name test photos too, since there is no val/.

    Raises:
        InputError: not a manifest, other classes, photos that are not there, or a photo named twice.
    """
    try:
        manifest = json.loads(Path(file).read_bytes())
    except OSError as error:
        raise InputError(f"split '{file}' can't be read: {error.strerror} (dataset_split.py writes one)") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"split '{file}' is not JSON: {error}") from None

    if isinstance(manifest, dict) and test and "test" not in manifest:
        raise InputError(f"split '{file}' names no test photos, and the data has no val/ with any: put that back, or make the split again")
    form = {"format": int, "fraction": (int, float), "val_fraction": (int, float), "seed": int,
            "classes": list, "train": list, "val": list, **({"test_fraction": float, "test": list} if test else {})}
    if not isinstance(manifest, dict) or not all(isinstance(manifest.get(key), kind) for key, kind in form.items()):
        raise InputError(f"split '{file}' is not a manifest: it needs {', '.join(form)} (dataset_split.py writes one)")
    if manifest["format"] != MANIFEST_FORMAT:
        raise InputError(f"split '{file}' has format {manifest['format']}, this program reads {MANIFEST_FORMAT}: "
                         "write it again with dataset_split.py")
    if not test and manifest.keys() & {"test", "test_fraction"}:
        raise InputError(f"split '{file}' sets test photos aside, and the data has test photos of its own, in val/. Was it made from "
                         "other data? --data names the folder")
    named = manifest["train"] + manifest["val"] + manifest.get("test", [])
    if not all(isinstance(name, str) for name in manifest["classes"] + named):
        raise InputError(f"split '{file}' is not a manifest: its lists hold something else than names")
    if not (0 < manifest["fraction"] <= 1 and 0 < manifest["val_fraction"] < 1 and 0 < manifest.get("test_fraction", 0.5) < 1
            and 0 <= manifest["seed"] < 2**32):
        raise InputError(f"split '{file}' is not a manifest: its fraction, val_fraction, test_fraction or seed is out of range")
    if manifest["classes"] != sorted(photos):
        raise InputError(f"split '{file}' and the data have different classes: "
                         f"{differences(manifest['classes'], photos, 'the split', 'the data')}. Was it made from other "
                         "data? --data names the folder")
    missing = sorted(set(named).difference(*photos.values()))
    if missing:
        raise InputError(f"split '{file}' names photos that are not there ({len(missing)}), the first {missing[0]!r}: put them back. "
                         "Or was it made from other data? --data names the folder")
    repeated = [path for path, times in Counter(named).items() if times > 1]
    if repeated:
        raise InputError(f"split '{file}' names {len(repeated)} photos more than once, the first {repeated[0]!r}")
    untaught = sorted(set(photos) - {path.split("/", 1)[0] for path in manifest["train"]})
    if untaught or not manifest["val"] or test and not manifest["test"]:
        lack = f"training photos of {untaught[0]!r}" if untaught else "test photos" if manifest["val"] else "validation photos"
        raise InputError(f"split '{file}' has no {lack}: each class needs one for training, validation and the test need one")
    return manifest


def differences(ours, theirs, our_name: str, their_name: str) -> str:
    """Say in words what only one of two collections of names holds, the first three of each."""
    def some(names):
        return ", ".join(map(repr, names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")

    ours_alone, theirs_alone = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    parts = [f"only {where} has {some(names)}"
             for names, where in ((ours_alone, our_name), (theirs_alone, their_name)) if names]
    return "; ".join(parts) or f"{our_name} has them in another order"


# -- The same split as folders, for other tools -----------------------------------------------------------------------

def refuse_occupied(target: Path, source: Path) -> None:
    """Raise InputError unless `target` is a place where a new tree can be made without touching anybody's files."""
    with disk_errors(f"--materialize '{target}' can't be looked into"):
        occupied = os.path.lexists(target) and (not target.is_dir() or any(target.iterdir()))
        inside = source.resolve() in (target.resolve(), *target.resolve().parents)
    if occupied:
        raise InputError(f"--materialize '{target}' is not an empty folder: choose another, or empty it first")
    if inside:
        raise InputError(f"--materialize '{target}' lies inside the photos it would be made from: choose another folder")


def materialize(manifest: dict, source: Path, target: Path, mode: str) -> None:
    """Make the split as an ImageFolder tree target/train/<Class>, target/val/<Class> and, if test photos were set aside,
    target/test/<Class>, whole or not at all.

    Args:
        source: the folder that the manifest's paths are relative to.
        target: a folder that is empty or not there yet.
        mode: "symlink" (takes no room), "hardlink" (the same, and outlives a move of `source`) or "copy".

    Raises:
        InputError: `target` holds something, or the system refuses the links or the files.
    """
    place = {"symlink": os.symlink, "hardlink": os.link, "copy": shutil.copy2}[mode]
    refuse_occupied(target, source)
    with disk_errors(f"--materialize '{target}' --mode {mode} left nothing there (another --mode may do: symlink, hardlink, copy)"):
        target = target.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as aside:
            tree = Path(aside, "tree")
            for part in ("train", "val", "test"):
                for path in manifest.get(part, []):
                    copy = tree / part / path
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    place(os.path.abspath(source / path), copy)
            if target.exists():
                target.rmdir()
            tree.rename(target)


# -- A data set to try the program with, drawn ------------------------------------------------------------------------

PATTERNS = "Checks", "Crosses", "Discs", "Dots", "Rays", "Rings", "Spirals", "Stripes", "Triangles", "Waves"


def draw_demo(folder: Path, train: int = 100, test: int = 40, seed: int = 0) -> None:
    """Draw ten classes of patterns in any colours, places, sizes and directions, so that a network has to look at their
    form: `train` pictures a class in folder/train, `test` in folder/val. Whole or not at all; a folder that was drawn before
    is left as it is. Raises InputError: it can't be made, or something else is in its place."""
    if os.path.isdir(folder / "train" / "Checks") and os.path.isdir(folder / "val"):
        return
    if os.path.lexists(folder) and not (os.path.isdir(folder) and not os.listdir(folder)):
        raise InputError(f"'{folder}' is in the way: --demo draws its pictures there, move it away")
    with disk_errors(f"--demo can't draw its pictures in '{folder}'"):
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as aside:
            pictures = [(part, name, index) for part, count in (("train", train), ("val", test)) for name in PATTERNS for index in range(count)]
            for number, (part, name, index) in enumerate(tqdm(pictures, "Drawing", unit="picture", leave=False, disable=None)):
                file = Path(aside, "demo", part, name, f"{index:03}.png")
                file.parent.mkdir(parents=True, exist_ok=True)
                draw_picture(name, (seed, number)).save(file)
            if os.path.isdir(folder):
                os.rmdir(folder)
            os.rename(Path(aside, "demo"), folder)


def draw_picture(name: str, seed, width: int = 80, height: int = 64):
    """A PIL image of one of the PATTERNS, on grainy paper."""
    import numpy as np  # here, since all else in this file does without
    from PIL import Image

    random = np.random.default_rng(seed)
    across, down = np.meshgrid(np.arange(width) - width * random.uniform(0.35, 0.65), np.arange(height) - height * random.uniform(0.35, 0.65))
    r, angle = np.hypot(across, down) / random.uniform(2.5, 4.5), np.arctan2(down, across) + random.uniform(0, 2 * np.pi)
    x, y = r * np.cos(angle), r * np.sin(angle)
    painted = {"Checks": np.sin(x) * np.sin(y) > 0,
               "Crosses": (r < 6) & (np.minimum(abs(x), abs(y)) < 1.3),
               "Discs": r < 5,
               "Dots": np.cos(x) + np.cos(y) > 0.8,
               "Rays": np.sin(7 * angle) > 0,
               "Rings": np.sin(1.5 * r) > 0,
               "Spirals": np.sin(r + 2 * angle) > 0,
               "Stripes": np.sin(x) > 0,
               "Triangles": r * np.cos(angle % (2 * np.pi / 3) - np.pi / 3) < 3,
               "Waves": np.sin(y + 2 * np.sin(x)) > 0}[name]
    paper = random.integers(0, 256, 3)
    ink = (paper + random.integers(70, 187, 3)) % 256
    grain = random.integers(-40, 41, (height, width, 1))
    return Image.fromarray((np.where(painted[..., None], ink, paper) + grain).clip(0, 255).astype(np.uint8))


# -- The public data set, fetched -------------------------------------------------------------------------------------

def download(folder: Path, url: str = ARCHIVE) -> None:
    """Fetch the zip archive of a data set and make it `folder`, whole or not at all. A transfer that broke off goes on.
    Raises InputError: no network, no room, an archive that is damaged or isn't to be trusted, or a `folder` in use."""
    folder = _in_any_capitals(Path(os.path.abspath(folder)))
    if os.path.isdir(folder / "train") and os.path.isdir(folder / "val"):
        return print(f"'{folder}' is there already, nothing to download")
    part, aside = folder.with_name(f"{Path(url).name}.part"), folder.with_name(f".{folder.name}.unpacking")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise InputError(f"'{folder}' is in the way: --download makes that folder, move it away or give another --data")
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)  # of a download that was killed
        fetch(url, part)
        unpack(part, aside)
        whole = [path.parent for path in sorted(aside.rglob("train")) if (path.parent / "val").is_dir()]
        if not whole:
            raise InputError(f"the archive {url} holds no folder with train/ and val/; it was kept as '{part}'")
        if folder.exists():
            folder.rmdir()
        whole[0].rename(folder)
        part.unlink()
    except OSError as error:
        raise InputError(f"the data set can't be made in '{folder}': {error.strerror or error}. What was fetched is kept, "
                         "--download goes on from there") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def fetch(url: str, part: Path, patience: int = 4) -> None:
    """Make `part` the whole file, going on where an earlier transfer ended, until `patience` of them in a row brought nothing."""
    print(f"Fetching    {url}", flush=True)
    failures = 0
    with tqdm(desc=f"Fetching {Path(url).name}", unit="B", unit_scale=True, leave=False, disable=None) as progress:
        while True:
            have = os.path.getsize(part) if part.exists() else 0
            try:
                total = _transfer(url, part, have, progress)
                if total is None or os.path.getsize(part) == total:
                    return
                problem = f"broke off after {os.path.getsize(part):,} of {total:,} bytes"
            except urllib.error.HTTPError as error:
                if error.code == 416:  # nothing lies behind what is there
                    if error.headers.get("Content-Range", "").endswith(f"*/{have}"):
                        return
                    part.unlink()
                problem = f"was answered with {error.code} {error.reason}"
                failures += patience * (400 <= error.code < 500 and error.code not in (408, 416, 429))
            except (OSError, http.client.HTTPException) as error:
                if getattr(error, "errno", None) in (errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT):  # of the disk
                    raise
                problem = f"failed ({getattr(error, 'reason', None) or error or type(error).__name__})"
            failures = 0 if part.exists() and os.path.getsize(part) > have else failures + 1
            if failures >= patience:
                raise InputError(f"the transfer of {url} {problem}: look at the network, then the same command goes on with what was "
                                 "fetched; or fetch the archive elsewhere and unzip it here")
            time.sleep(2 ** failures)


def _transfer(url: str, part: Path, have: int, progress) -> int | None:
    """Append to `part` what lies behind its first `have` bytes, or write all of it if the server starts anew. The whole length,
    if the server says so."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=60) as response:
        goes_on = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        start, length = have if goes_on else 0, response.headers.get("Content-Length")
        total = start + int(length) if length else None
        need_room(part.parent, 2 * (total or 0) - start)  # the archive and its photos, which were compressed before
        progress.total, progress.n = total, start
        with open(part, "ab" if goes_on else "wb") as stream:
            while block := response.read(2**20):
                stream.write(block)
                progress.update(len(block))
    return total


def unpack(archive: Path, target: Path) -> None:
    """Unpack a zip archive, checking each member's CRC. None of its files may lie outside `target`, none may be a link.
    Raises InputError: it is damaged, and deleted then; it isn't to be trusted; or there is no room."""
    try:
        with zipfile.ZipFile(archive) as packed:
            members = packed.infolist()
            for member in members:
                kind = stat.S_IFMT(member.external_attr >> 16)
                steps = member.filename.replace("\\", "/").split("/")
                if ".." in steps or not steps[0] or ":" in steps[0] or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                    raise InputError(f"the archive '{archive}' holds {member.filename!r}, which would lie outside the data folder or "
                                     "is a link: it isn't the public one, and nothing of it was unpacked. Delete it")
            need_room(archive.parent, sum(member.file_size for member in members))
            for member in tqdm(members, desc="Unpacking", unit="photo", leave=False, disable=None):
                packed.extract(member, target)
    except (InputError, OSError):
        raise
    except Exception as error:  # zipfile raises nearly anything: BadZipFile, zlib.error, EOFError, NotImplementedError
        archive.unlink()
        raise InputError(f"the archive was damaged ({error}) and is deleted: --download fetches it again") from None
    getattr(os, "sync", lambda: None)()  # so that a folder in its place is whole even after a power cut


def need_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InputError(f"the data set needs {size / 1e9:.1f} GB in '{folder}', where {free / 1e9:.1f} GB are free: make room, or "
                         "give a --data DIR elsewhere")


# -- The command ------------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """An argument parser that answers a mistake in one line, an InputError, and a typo with what was meant."""

    def parse_args(self, args=None, namespace=None):
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            name = "--" + unknown[0].lstrip("-").split("=")[0]
            meant = difflib.get_close_matches(name, self._option_string_actions, 1)
            self.error((f"no option {unknown[0]!r}" if unknown[0].startswith("-") else f"{unknown[0]!r} belongs to no option")
                       + (f": did you mean {meant[0]}?" if meant else ""))
        return args

    def error(self, message):
        raise InputError(f"{message} (all options: python {self.prog} --help)")


def number(kind: type, low: float, high: float, open_low: bool = False, open_high: bool = False):
    """An argparse type: a number of that kind inside an interval, whose ends belong to it unless they are open."""
    interval = f"{'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not {'a whole number' if kind is int else 'a number'}") from None
        inside = (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
        if not inside:
            raise argparse.ArgumentTypeError(f"{text} is outside {interval}")
        return value

    return parse


def add_split_options(group, fraction: float) -> None:
    """The options that both commands share: with the same values they make the same split."""
    group.add_argument("--fraction", type=number(float, 0, 1, open_low=True), default=fraction, metavar="F",
                       help=f"part of each class's training photos to use, in (0, 1] (default: {fraction})")
    group.add_argument("--val-fraction", type=number(float, 0, 1, open_low=True, open_high=True), default=0.2,
                       metavar="V", help="part of these that is held out for validation, in (0, 1) (default: 0.2)")
    group.add_argument("--test-fraction", type=number(float, 0, 1, open_low=True, open_high=True), metavar="T",
                       help="part of each class that is set aside as test photos where there is no val/, in (0, 1), before the other "
                            f"two fractions are taken of the rest (default: {TEST_FRACTION})")
    group.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, metavar="N",
                       help="another seed draws other photos and, in training, other batches (default: 0)")


def get_args_parser() -> Parser:
    parser = Parser(prog="dataset_split.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
                    description=__doc__)
    group = parser.add_argument_group("the split")
    group.add_argument("--data", type=Path, default=Path("inaturalist_12k"), metavar="DIR",
                       help="data folder; its train/ is split, or itself if it has class folders only (default: inaturalist_12k)")
    add_split_options(group, fraction=1.0)
    group = parser.add_argument_group("what is written")
    group.add_argument("--out", type=Path, metavar="FILE",
                       help="the manifest (default: splits/<fraction>-<val-fraction>-<seed>.json)")
    group.add_argument("--materialize", type=Path, metavar="DIR",
                       help="also make the split as folders DIR/train/<Class>, DIR/val/<Class> and, where test photos were set aside, "
                            "DIR/test/<Class>, for other tools")
    group.add_argument("--mode", choices=("symlink", "hardlink", "copy"),
                       help="how --materialize puts photos there (default: symlink)")
    return parser


def print_table(manifest: dict, photos: dict[str, list[str]]) -> None:
    parts = {title: Counter(path.split("/", 1)[0] for path in manifest[part])
             for part, title in (("train", "Training"), ("val", "Validation"), ("test", "Test")) if part in manifest}
    width = max(map(len, ("Class", *photos)))
    print(f"{'Class':{width}} | Photos | " + " | ".join(parts))
    for name, paths in photos.items():
        print(f"{name:{width}} | {len(paths):6} | " + " | ".join(f"{used[name]:{len(title)}}" for title, used in parts.items()))
    print("-" * (width + 9 + sum(len(title) + 3 for title in parts)))
    print(f"{'Total':{width}} | {sum(map(len, photos.values())):6} | "
          + " | ".join(f"{used.total():{len(title)}}" for title, used in parts.items()))


def main(argv: list[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.mode and not args.materialize:
        parser.error("--mode says how --materialize DIR places the photos: give that too")
    manifest, photos = choose(args)
    source = train_folder(args.data)
    if args.materialize:
        refuse_occupied(args.materialize, source)
    out = args.out or Path("splits", f"{args.fraction}-{args.val_fraction}-{args.seed}.json")
    write_manifest(manifest, out)
    print_table(manifest, photos)
    print(f"\nManifest: {out}")
    if args.materialize:
        mode = args.mode or "symlink"
        materialize(manifest, source, args.materialize, mode)
        folders = " and ".join(f"{args.materialize}/{part}" for part in ("train", "val", "test") if part in manifest)
        print(f"Folders:  {folders} (mode: {mode})")


@contextmanager
def exit_codes(unsaid=()):
    """Leave with exit code 2 after unusable input and 130 after an interruption, with one line on stderr.

    Args:
        unsaid: kinds of exceptions that another process speaks about.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a name that the terminal can't show is no reason to lose a run
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except (InputError, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        words = f"interrupted: {error}".removesuffix(": ") if interrupted else str(error)
        with suppress(OSError):  # the terminal may be gone
            if not isinstance(error, unsaid):
                print(f"{Path(sys.argv[0]).name}: {words}".replace("\n", "\\n"), file=sys.stderr)
        sys.exit(130 if interrupted else 2)
    except BrokenPipeError:  # head, or a pager that was left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(130)


if __name__ == "__main__":
    with exit_codes():
        main()
