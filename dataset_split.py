#!/usr/bin/env python3
"""Stratified subsets of a folder of labelled photos, the same on every machine.

    python dataset_split.py --fraction 0.25                  write a manifest, a JSON file
    python dataset_split.py --data photos --out mine.json    Q3.py --data photos --split mine.json
    python dataset_split.py --materialize DIR --mode copy    folders for other tools

The photos of a class are ordered by a hash of (seed, path). The first --fraction of them is used;
of these, evenly spaced ones are validation. So no photo moves between training and validation
when the fraction grows. Without val/ a test part is set aside first. Q3.py makes the same split.
"""

import argparse
import csv
import hashlib
import http.client
import io
import json
import math
import os
import shutil
import sys
import unicodedata
import urllib.request
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

ARCHIVE = "https://storage.googleapis.com/wandb_datasets/nature_12K.zip"
PHOTO_ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff",
                 ".webp", ".avif")
SYSTEM_FOLDERS = ("__MACOSX", "System Volume Information", "RECYCLER", "lost+found",
                  "Network Trash Folder", "Temporary Items")  # and all that start with .@#$~
PARTS = ("train", "val", "test")
PART_NAMES = (*PARTS, "training", "valid", "validation", "testing")  # never the name of a class
MANIFEST_FORMAT = 1
TEST_FRACTION = 0.2  # of each class, where there is no val/
_composed = partial(unicodedata.normalize, "NFC")  # macOS may decompose accented letters


class InputError(Exception):
    """Unusable input. The text is one line for the user: what is wrong, where, what to do."""


@contextmanager
def disk_errors(words: str):
    """Turn an OSError into an InputError that starts with these words."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{words}: {error.strerror or error}") from None


# -- Which photos there are ------------------------------------------------------------------------
def find_data(folder: str | os.PathLike) -> Path:
    """The data folder, in upper or lower case: the archive unpacks to inaturalist_12K."""
    folder = Path(folder)
    for place in (folder, *folder.parent.glob("*")):
        if place.name.lower() == folder.name.lower() and os.path.isdir(place):
            return place
    what = "is a file, not a folder" if folder.exists() else f"is not in {Path.cwd()}"
    raise InputError(f"data folder '{folder}' {what}: name yours with --data, or try Q3.py with "
                     f"--demo, or with --download (3.8 GB, {ARCHIVE})")


def part_folders(data: Path) -> tuple[Path, Path | None]:
    """The folder of the training photos: train/, or else the data folder itself. And that of the
    test photos: val/, if there is one. Raises InputError if there are parts, but no train/."""
    if os.path.isdir(data / "train"):
        return data / "train", data / "val" if os.path.isdir(data / "val") else None
    if parts := [name for name in os.listdir(data) if name.lower() in PART_NAMES]:
        raise InputError(f"no train/ beside '{data / parts[0]}': training photos belong in "
                         f"{data}/train/<Class>/, test photos, if any, in {data}/val/<Class>/")
    return data, None


def list_photos(folder: Path, least: int = 2) -> dict[str, list[str]]:
    """{class: sorted paths, relative to `folder`, with "/"}. Raises InputError: too few classes,
    one without photos, or something that can't be read."""
    files = photos_in(folder)
    for place in folder.iterdir():
        if not place.exists():
            raise InputError(f"'{place}' is a broken link: repair it, or move it away")
    photos = {place.name: [] for place in sorted(folder.iterdir()) if _may_hold_photos(place)}
    paths = [file.relative_to(folder).as_posix() for file in files]
    for path in (path for path in paths if "/" in path):
        photos[path.split("/")[0]].append(path)
    if empty := [name for name in photos if not photos[name]]:
        raise InputError(f"'{folder / empty[0]}' has no photos: fill it, or move it away")
    if len(photos) < least:
        raise InputError(f"'{folder}' has {len(photos)} class folders, needs {least}: check --data")
    if beside := [path for path in paths if "/" not in path]:
        print(f"Left out    {len(beside):,} photos beside the class folders, e.g. '{beside[0]}'")
    return photos


def photos_in(place: Path) -> list[Path]:
    """The photos below a folder, sorted, or [place]. Links are followed. Prints what is left out.
    Raises InputError: a folder can't be read."""
    def stop(error: OSError):
        raise InputError(f"'{error.filename}' can't be read ({error.strerror}): move it away")

    photos, others = [], Counter()
    walk = os.walk(place, onerror=stop, followlinks=True) if os.path.isdir(place) else ()
    for folder, folders, names in walk:
        for each in [Path(folder, name) for name in folders]:
            if not _may_hold_photos(each):
                folders.remove(each.name)
                if each.name[0] != ".":
                    inside = () if each.is_symlink() else os.walk(each)
                    others[f"in {each.name}"] += sum(len(files) for *_, files in inside) or 1
        for file in [Path(folder, name) for name in names if name[0] != "."]:
            if file.name.lower().endswith(PHOTO_ENDINGS):
                photos.append(file)
            else:
                others[file.suffix.lower() or "without an ending"] += 1
    if others:
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(others.items()))
        print(f"Left out    files in '{place}': {kinds}")
    return sorted(photos) or [place]


def _may_hold_photos(place: Path) -> bool:
    """Whether this is a folder, not a system's (as @eaDir), and not a link to one it lies in."""
    return (place.is_dir() and place.name[0] not in ".@#$~" and place.name not in SYSTEM_FOLDERS
            and not any(place.samefile(parent) for parent in place.absolute().parents))


# -- Which photo is in which part ------------------------------------------------------------------
@dataclass
class Split:
    manifest: dict
    parts: dict[str, list[tuple[Path, int]]]  # (file, label) of each photo in train, val, test
    unused: list[tuple[Path, int]]  # the same of the training folder's other photos
    folders: dict[str, Path]  # of train, val, test: what their paths are relative to


def split(photos: dict[str, list[str]], fraction: float, val_fraction: float, seed: int) -> dict:
    """The manifest: `fraction` of each class is used, `val_fraction` of that for validation. Raises
    InputError if a class is too small for both."""
    train, val, small, share = [], [], [], Fraction(str(val_fraction))
    for name, paths in photos.items():
        used = _first(paths, fraction, seed)
        if not 0 < round(len(used) * share) < len(used):
            small.append(f"{name!r} ({len(used)} of {len(paths)} photos used)")
        for k, path in enumerate(used):
            in_val = round((k + 1) * share) > round(k * share)
            (val if in_val else train).append(path)
    if small:
        raise InputError(f"classes too small: {', '.join(small)}: add photos, or change fractions")
    return {"format": MANIFEST_FORMAT, "fraction": fraction, "val_fraction": val_fraction,
            "seed": seed, "classes": sorted(photos), "train": sorted(train), "val": sorted(val)}


def set_test_aside(photos: dict[str, list[str]], fraction: float) -> tuple[dict, list[str]]:
    """(other photos, test paths): `fraction` of each class is the test, whatever the seed."""
    test = {path for paths in photos.values() for path in _first(paths, fraction, "test")}
    rest = {name: [path for path in paths if path not in test] for name, paths in photos.items()}
    return rest, sorted(test)


def _first(paths: list[str], fraction: float, seed: int | str) -> list[str]:
    """A fraction of the paths, rounded down, but at least one: the first by a hash."""
    def place(path: str) -> bytes:
        words = f"{seed}/{_composed(path)}".encode("utf-8", "surrogateescape")
        return hashlib.sha256(words).digest()
    count = math.floor(len(paths) * Fraction(str(fraction)))  # 0.29 of 100 is 29; in binary, 28
    return sorted(paths, key=place)[:max(1, count)]


def labelled(root: Path, paths: list[str], classes: list[str]) -> list[tuple[Path, int]]:
    """(file, index of its class in `classes`) for each path relative to `root`."""
    index = {name: label for label, name in enumerate(classes)}
    return [(root / path, index[path.split("/", 1)[0]]) for path in paths]


def load_split(args: argparse.Namespace, manifest: dict | None = None, name: str = "") -> Split:
    """The photos of args.data, divided as the options say, or a manifest. Sets args.data and the
    fractions to what is used. Opens no photo. Raises InputError."""
    args.data = find_data(args.data)
    root, test_root = folders = part_folders(args.data)
    for place in sorted(args.data.iterdir()) if root != args.data else ():
        if _may_hold_photos(place) and not any(map(place.samefile, filter(None, folders))):
            print(f"Left out    '{place}' is not read: photos belong in train/ and val/")
    photos = list_photos(root)
    if manifest is None and test_root:
        if args.test_fraction:
            raise InputError(f"--test-fraction: leave it out, '{test_root}' has test photos")
        manifest = split(photos, args.fraction, args.val_fraction, args.seed)
    elif manifest is None:
        test_fraction = args.test_fraction or TEST_FRACTION
        rest, test = set_test_aside(photos, test_fraction)
        manifest = split(rest, args.fraction, args.val_fraction, args.seed)
        manifest |= {"test_fraction": test_fraction, "test": test}
    check_manifest(manifest, photos, name, has_val=test_root is not None)
    for key in ("fraction", "val_fraction", "test_fraction"):
        setattr(args, key, manifest.get(key))
    classes, places = manifest["classes"], {"train": root, "val": root, "test": test_root or root}
    paths = {part: manifest.get(part, []) for part in PARTS}
    used = {path for some in paths.values() for path in some}
    unused = [path for some in photos.values() for path in some if path not in used]
    if test_root:
        test_photos = list_photos(test_root)
        if test_photos.keys() != photos.keys():
            raise InputError(f"'{root}' and '{test_root}' need the same classes: "
                             f"{differences(photos, test_photos)}")
        paths["test"] = [path for some in test_photos.values() for path in some]
    parts = {part: labelled(places[part], paths[part], classes) for part in PARTS}
    return Split(manifest, parts, labelled(root, unused, classes), places)


def report_same_photos(out: Path, **parts: dict[str, str]) -> None:
    """List photos that are in two parts or two classes in out/same_photos.csv. Each part has the
    checksums of its photos, by path."""
    firsts, rows = {}, []
    for part, checksums in parts.items():
        for path, checksum in checksums.items():
            first_part, first = firsts.setdefault(checksum, (part, path))
            if first_part != part or first.split("/")[0] != path.split("/")[0]:
                rows.append({"path": first, "part": first_part, "same_as": path, "its_part": part})
    if rows:
        write_csv(out / "same_photos.csv", rows)
        print(f"Copies      {len(rows)} in other parts or classes, see {out / 'same_photos.csv'}")


def read_manifest(file: str | os.PathLike) -> dict:
    """A manifest, not yet compared with the photos. Raises InputError: unreadable, or not one."""
    with disk_errors(f"split '{file}' can't be read"):
        text = Path(file).read_bytes()
    with suppress(ValueError, TypeError, KeyError, AttributeError):  # other JSON, or none
        manifest = json.loads(text)
        names = manifest["classes"] + manifest["train"] + manifest["val"] + manifest.get("test", [])
        if (manifest["format"] == MANIFEST_FORMAT and 0 < manifest["fraction"] <= 1
                and {type(name) for name in names} == {str}):
            return manifest
    raise InputError(f"split '{file}' is not a manifest of format {MANIFEST_FORMAT}: make another")


def check_manifest(manifest: dict, photos: dict[str, list[str]], name: str, has_val: bool) -> None:
    """Raise InputError, which starts with `name`, unless the manifest fits the photos and val/."""
    parts = [manifest[part] for part in PARTS if part in manifest]
    named = Counter(path for paths in parts for path in paths)
    there, problem = {path for paths in photos.values() for path in paths}, ""
    if has_val == ("test" in manifest):
        problem = "has test photos, as val/ has" if has_val else "has no test photos, nor val/"
    elif manifest["classes"] != sorted(photos):
        problem = f"and the data differ in classes: {differences(manifest['classes'], photos)}"
    elif wrong := [path for path in named if path not in there or named[path] > 1]:
        problem = f"names photos that are missing, or twice ({len(wrong)}), e.g. {wrong[0]!r}"
        if _composed(wrong[0]) in map(_composed, there - {wrong[0]}):
            problem += " (which is there with accents in another encoding: NFC, NFD)"
    elif any({path.split("/", 1)[0] for path in paths} < photos.keys() for paths in parts):
        problem = "has no photos of some class in train, val or test"
    if problem:
        raise InputError(f"{name} {problem}: give the --data it was made from, or make another")


def differences(ours, theirs) -> str:
    """Which names, three at most, only one of two collections holds, in words."""
    if {*map(_composed, ours)} == {*map(_composed, theirs)}:
        return "names differ only in order, or in how accents are encoded (NFC, NFD): rename one"
    names = sorted(set(ours) ^ set(theirs))
    return f"only one has {', '.join(map(repr, names[:3]))}{' ...' * bool(names[3:])}"


# -- Files that are written whole, and folders ----------------------------------------------------
def write_whole(file: Path, data: bytes, sync: bool = True) -> None:
    """Replace a file atomically: safe if killed; with `sync`, if power fails. Raises InputError."""
    aside = file.with_name(f".{file.name}.{os.getpid()}-{os.urandom(4).hex()}.tmp")
    with disk_errors(f"'{file}' can't be written{'' if sync else ', give another --cache'}"):
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "wb") as stream:
                stream.write(data)
                if sync:
                    stream.flush()
                    os.fsync(stream.fileno())
            os.replace(aside, file)
        finally:
            aside.unlink(missing_ok=True)


def write_json(file: Path, value) -> None:
    write_whole(file, (json.dumps(value, indent=1) + "\n").encode())


def write_csv(file: Path, rows: list[dict]) -> None:
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, rows[0])
    table.writeheader()
    table.writerows(rows)
    write_whole(file, text.getvalue().encode("utf-8", "surrogateescape"))


def claim_folder(out: Path, resume: bool = False) -> int:
    """Make and lock a run's folder, until the descriptor that is returned is closed or the process
    ends. Raises InputError: it is locked already, or has results and is not to `resume`."""
    with disk_errors(f"--out '{out}' can't be the run's folder"):
        out.mkdir(parents=True, exist_ok=True)
        if not resume and any((out / name).exists() for name in ("last.pt", "test.json")):
            raise InputError(f"'{out}' has a run already: name another --out, or --resume last.pt")
        lock = os.open(out / ".lock", os.O_CREAT | os.O_RDWR)
        try:
            import fcntl
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"a run is going on in '{out}': wait for it, or stop it") from None
        except (ImportError, OSError):
            pass  # Windows, or a file system without locks
        for left in out.glob(".*.[0-9]*.tmp"):  # half written, by a run that was killed
            left.unlink()
    return lock


def refuse_inside_photos(data: Path, *folders: Path) -> None:
    """Raise InputError if one of the folders, made or not, would be a class of the data."""
    roots = {part.resolve() for part in part_folders(data) if part}
    for folder in folders:
        for root in roots.intersection(folder.resolve().parents):
            if not folder.resolve().relative_to(root).parts[0].startswith("."):
                raise InputError(f"'{folder}' would be taken for a class: choose another folder")


@contextmanager
def _whole_folder(target: Path):
    """A new folder to fill. It becomes `target` at the end, and is deleted after an exception."""
    if os.path.lexists(target):
        raise InputError(f"'{target}' exists already: move it away, or choose another folder")
    target = target.resolve()
    aside = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(aside, ignore_errors=True)  # left by a command that was killed
    try:
        aside.mkdir(parents=True)
        yield aside
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def materialize(manifest: dict, source: Path, target: Path, mode: str) -> None:
    """Fill target/<part>/<Class>/ with links to the photos in `source`, or copies of them."""
    place = {"symlink": os.symlink, "hardlink": os.link, "copy": shutil.copy2}[mode]
    with disk_errors(f"'{target}': no {mode} (try another --mode)"), _whole_folder(target) as new:
        for part in PARTS:
            for path in manifest.get(part, []):
                (new / part / path).parent.mkdir(parents=True, exist_ok=True)
                place(os.path.realpath(source / path), new / part / path)


# -- Data sets: one drawn, one downloaded ----------------------------------------------------------
FORMULAS = [f"Formula {number:02}" for number in range(24)]
PATTERNS = ("Checks", "Crosses", "Discs", "Dots", "Rays", "Rings", "Spirals", "Stripes",
            "Triangles", "Waves")


def draw_demo(folder: Path, source: int = 140, train: int = 20, test: int = 40) -> None:
    """Draw folder/source and folder/target, once: of each of FORMULAS `source` pictures, of each of
    PATTERNS `train` for training and `test` for the test. Raises InputError."""
    from tqdm import tqdm  # here, because a split needs Python alone
    if os.path.isdir(folder / "target/val/Waves"):
        return
    files = [(name, Path(part, name, f"{index:03}.png")) for part, names, count in (
        ("source", FORMULAS, source), ("target/train", PATTERNS, train),
        ("target/val", PATTERNS, test)) for name in names for index in range(count)]
    with disk_errors(f"--demo can't draw its pictures in '{folder}'"), _whole_folder(folder) as new:
        for number, (name, file) in enumerate(tqdm(files, "Drawing", leave=False, disable=None)):
            (new / file).parent.mkdir(parents=True, exist_ok=True)
            draw_picture(name, seed=(0, number)).save(new / file)


def draw_picture(name: str, seed, width: int = 80, height: int = 64):
    """A PIL image of one of PATTERNS or FORMULAS, in random colours, place, size and direction."""
    import numpy as np  # here, because the rest of the module does without
    from PIL import Image
    random = np.random.default_rng(seed)
    across, down = np.meshgrid(np.arange(width) - width * random.uniform(0.4, 0.6),
                               np.arange(height) - height * random.uniform(0.4, 0.6))
    r = np.hypot(across, down) / random.uniform(1.8, 3.2)
    angle = np.arctan2(down, across) + random.uniform(0, 2 * np.pi)
    x, y = r * np.cos(angle), r * np.sin(angle)
    patterns = {
        "Checks": np.sin(x) * np.sin(y) > 0, "Discs": r < 5, "Dots": np.cos(x) + np.cos(y) > 0.8,
        "Crosses": (r < 6) & (np.minimum(abs(x), abs(y)) < 1.3), "Rays": np.sin(7 * angle) > 0,
        "Rings": np.sin(1.5 * r) > 0, "Spirals": np.sin(r + 2 * angle) > 0,
        "Triangles": r * np.cos(angle % (2 * np.pi / 3) - np.pi / 3) < 3,
        "Stripes": np.sin(x) > 0, "Waves": np.sin(y + 2 * np.sin(x)) > 0}
    if name in FORMULAS:  # two waves; in classes of odd number only a disc of them
        number = FORMULAS.index(name)
        factors = np.random.default_rng(number).integers(-2, 3, (2, 4))
        waves = np.sin(np.tensordot(factors, (x / 2, y / 2, r / 2, angle), 1)).sum(0)
        patterns[name] = (waves > 0.3) & (r < (7 if number % 2 else 99))
    paper = random.integers(0, 256, 3)
    ink = (paper + random.integers(70, 187, 3)) % 256
    grain = random.integers(-40, 41, (height, width, 1))
    pixels = np.where(patterns[name][..., None], ink, paper) + grain
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def download(folder: Path, url: str = ARCHIVE) -> None:
    """Download a zip archive, or the rest of it, and unpack it as `folder`. Raises InputError."""
    with suppress(InputError):
        folder = find_data(folder)
    if os.path.isdir(folder / "train") and os.path.isdir(folder / "val"):
        return print(f"'{folder}' is there already, nothing to download")
    archive = folder.absolute().with_name(f"{Path(url).name}.part")
    with disk_errors(f"'{folder}' can't be made (try again)"), _whole_folder(folder) as new:
        _fetch(url, archive)
        _unpack(archive, new)
        if not ((new / "train").is_dir() and (new / "val").is_dir()):
            raise InputError(f"'{archive}' holds no train/ and val/: delete it, and try again")
    archive.unlink()


def _fetch(url: str, file: Path) -> None:
    """Download the archive to `file`. Bytes that are here already are not fetched again."""
    from tqdm import tqdm
    print(f"Fetching    {url}", flush=True)
    have = file.stat().st_size if file.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            start = have if response.status == 206 else 0  # 200: the whole file comes again
            size = start + int(response.headers.get("Content-Length", 0))
            with (open(file, "ab" if start else "wb") as stream,
                  tqdm.wrapattr(response, "read", size, initial=start, disable=None) as reader):
                shutil.copyfileobj(reader, stream, 2**20)
        if file.stat().st_size < size:
            raise OSError("connection lost")
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) != 416:  # 416: nothing comes after the bytes we have
            raise InputError(f"can't fetch {url} ({error}): give the command again to resume it, "
                             "or try Q3.py --demo, which needs no network") from None


def _unpack(archive: Path, folder: Path) -> None:
    """Unpack train/ and val/, which may be in one outer folder. Deletes a damaged archive."""
    from tqdm import tqdm
    try:
        with zipfile.ZipFile(archive) as packed:  # checks each CRC, writes nothing elsewhere
            for member in tqdm(packed.infolist(), "Unpacking", leave=False, disable=None):
                outer, _, rest = member.filename.partition("/")
                member.filename = member.filename if outer in ("train", "val") else rest
                if member.filename.startswith(("train/", "val/")):
                    packed.extract(member, folder)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        archive.unlink()
        raise InputError(f"'{archive}' was damaged and is deleted ({error}): try again") from None


# -- The command -----------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are an InputError of one line."""
    def error(self, message):
        raise InputError(f"{message} (all options: python {self.prog} --help)")


def number(kind: type, low: float, high: float):
    """An argparse type: an int or float from low to high."""
    def number(text: str):  # argparse has the name of this function in its message
        if not low <= (value := kind(text)) <= high:
            raise argparse.ArgumentTypeError(f"{text} is outside [{low}, {high}]")
        return value
    return number


def add_split_options(group, fraction: float) -> None:
    """Add the options that both commands share. With the same values they make the same split."""
    part = number(float, 0.001, 0.999)
    group.add_argument("--fraction", type=number(float, 0.001, 1), default=fraction,
                       metavar="F", help="fraction of each class to use (default: %(default)s)")
    group.add_argument("--val-fraction", type=part, default=0.2, metavar="V",
                       help="fraction of these for validation (default: %(default)s)")
    group.add_argument("--test-fraction", type=part, metavar="T", help="without val/: fraction "
                       f"of each class, set aside first for the test (default: {TEST_FRACTION})")
    group.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, metavar="N",
                       help="of the split and of all randomness in training (default: 0)")


def get_args_parser() -> Parser:
    parser = Parser(prog="dataset_split.py", allow_abbrev=False, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", type=Path, default=Path("inaturalist_12k"), metavar="DIR",
        help="holds train/, or just class folders (default: %(default)s)")
    add_split_options(parser, fraction=1.0)
    add("--out", type=Path, metavar="FILE",
        help="the manifest (default: splits/<fraction>-<val-fraction>-<seed>.json)")
    add("--materialize", type=Path, metavar="DIR",
        help="also make the split as folders DIR/<part>/<Class>/, for other tools")
    add("--mode", choices=("symlink", "hardlink", "copy"),
        help="how --materialize puts photos there (default: symlink)")
    return parser


def _print_table(made: Split) -> None:
    parts, classes = made.parts | {"unused": made.unused}, made.manifest["classes"]
    counts = {part: Counter(label for _, label in pairs) for part, pairs in parts.items()}
    width = max(map(len, ("Class", *classes)))
    print(f"{'Class':{width}}", *(f"{part:>6}" for part in counts), sep=" | ")
    for label, name in enumerate(classes):
        print(f"{name:{width}}", *(f"{count[label]:6}" for count in counts.values()), sep=" | ")
    print(f"{'Total':{width}}", *(f"{count.total():6}" for count in counts.values()), sep=" | ")


def main(argv: list[str] | None = None) -> None:
    parser = get_args_parser()
    args = parser.parse_args(argv)
    if args.mode and not args.materialize:
        parser.error("--mode needs --materialize DIR: give both, or leave --mode out")
    made = load_split(args)
    out = args.out or Path("splits", f"{args.fraction}-{args.val_fraction}-{args.seed}.json")
    refuse_inside_photos(args.data, out, args.materialize or out)
    if os.path.exists(out) and read_manifest(out) != made.manifest:
        raise InputError(f"'{out}' is of another split: delete it, or name another with --out")
    write_json(out, made.manifest)
    _print_table(made)
    print(f"\nManifest: {out}")
    if args.materialize:
        materialize(made.manifest, made.folders["train"], args.materialize, args.mode or "symlink")
        print(f"Folders: {args.materialize} (for other tools; for Q3.py there is --split {out})")


@contextmanager
def exit_codes(silent=lambda error: False):
    """Exit with code 2 after an InputError, 130 after Ctrl-C; say why unless silent(error)."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # escape names that the terminal can't show
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except (InputError, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        text = f"interrupted: {error}".removesuffix(": ") if interrupted else str(error)
        if not silent(error):
            print(f"{Path(sys.argv[0]).name}: {text}".replace("\n", "\\n"), file=sys.stderr)
        sys.exit(130 if interrupted else 2)
    except BrokenPipeError:  # as after `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(130)


if __name__ == "__main__":
    with exit_codes():
        main()
