"""dataset_split.py: the split, the manifest, files and folders, the demo, and the download."""

import argparse
import fcntl
import http.server
import io
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from conftest import QUICK, call, type_command
from PIL import Image

import dataset_split as ds


def names(counts: dict[str, int]) -> dict[str, list[str]]:
    return {name: [f"{name}/{index:04}.jpg" for index in range(count)]
            for name, count in counts.items()}


INATURALIST = names({f"Class{k}": 999 if k == 5 else 1000 for k in range(10)})


def tree(folder: Path) -> dict[str, bytes]:
    return {file.relative_to(folder).as_posix(): file.read_bytes()
            for file in folder.rglob("*") if file.is_file()}


def options(data: Path, **others) -> argparse.Namespace:
    values = {"fraction": 1.0, "val_fraction": 0.2, "test_fraction": None, "seed": 0}
    return argparse.Namespace(data=data, **(values | others))


# -- The split -------------------------------------------------------------------------------------
def test_split_is_the_same_on_every_machine():
    """A change here would move photos between the parts of everybody's earlier runs."""
    manifest = ds.split(names({"Aves": 12, "Été": 8}), 0.75, 0.3, seed=3)
    assert [path[-8:-4] for path in manifest["val"]] == ["0005", "0010", "0011", "0003", "0006"]
    assert "".join(path[-5] for path in manifest["train"]) == "1346781257"
    test = ds.set_test_aside(names({"Aves": 12}), 0.25)[1]
    assert [path[-6:-4] for path in test] == ["00", "01", "10"]


def test_defaults_give_the_published_sizes_in_any_order_of_the_listing():
    manifest = ds.split(INATURALIST, 0.25, 0.2, seed=0)
    assert (len(manifest["train"]), len(manifest["val"])) == (1999, 500)
    assert all(sum(path.startswith(name) for path in manifest["val"]) == 50 for name in INATURALIST)
    assert manifest["train"] != ds.split(INATURALIST, 0.25, 0.2, seed=1)["train"]
    shuffled = {name: paths[::-1] for name, paths in reversed(INATURALIST.items())}
    assert manifest == ds.split(shuffled, 0.25, 0.2, 0)
    alone = ds.split({"Class3": INATURALIST["Class3"]}, 0.25, 0.2, 0)
    assert alone["val"] == [path for path in manifest["val"] if path.startswith("Class3/")]
    decimal = ds.split(names({"Aves": 100}), 0.29, 0.2, 0)  # 100 * 0.29 is 28.999999999999996
    assert len(decimal["train"]) + len(decimal["val"]) == 29


def test_accented_names_split_alike_composed_and_decomposed():
    for letter in ("\u00e9", "e\u0301"):
        paths = [f"C/{letter}{index}.jpg" for index in range(20)]
        held_out = ds.split({"C": paths}, 1.0, 0.2, 0)["val"]
        assert [k for k, path in enumerate(paths) if path in held_out] == [1, 11, 15, 19]


@pytest.mark.parametrize("val_fraction", [0.05, 0.2, 0.5, 0.8])
def test_parts_share_no_photo_and_subsets_nest(val_fraction):
    earlier_train, earlier_val = set(), set()
    for fraction in (0.1, 0.25, 0.5, 0.77, 1.0):
        manifest = ds.split(names({"Aves": 400, "Fungi": 333}), fraction, val_fraction, seed=5)
        train, val = set(manifest["train"]), set(manifest["val"])
        assert not train & val and earlier_train <= train and earlier_val <= val
        assert len(train | val) == math.floor(400 * fraction) + math.floor(333 * fraction)
        earlier_train, earlier_val = train, val


def test_class_too_small_for_both_parts_is_named():
    for photos, fraction, val_fraction in ((20, 0.1, 0.2), (1, 1.0, 0.9), (0, 1.0, 0.2)):
        with pytest.raises(ds.InputError, match="too small: 'Aves' "):
            ds.split(names({"Aves": photos, "Fungi": 500}), fraction, val_fraction, 0)


def test_test_part_is_stratified_and_nests():
    rest, test = ds.set_test_aside(INATURALIST, 0.2)
    for name, paths in INATURALIST.items():
        mine = [path for path in test if path.startswith(f"{name}/")]
        assert len(mine) == len(paths) // 5 and sorted(mine + rest[name]) == sorted(paths)
    assert set(ds.set_test_aside(INATURALIST, 0.1)[1]) < set(test)
    assert len(ds.set_test_aside(names({"a": 3, "b": 3}), 0.01)[1]) == 2, "at least one a class"


# -- Which photos there are ------------------------------------------------------------------------
def test_photos_may_lie_deeper_and_hidden_or_other_files_are_none(data):
    before = ds.list_photos(data / "train")
    others = (".DS_Store", "Aves/._00.jpg", ".cache/x.jpg", "Aves/.thumbs/x.jpg", "Aves/notes.txt")
    for name in (*others, "Aves/2019/may/IMG.JPG"):
        (data / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (data / "train" / name).write_bytes(b"?")
    aves = sorted([*before["Aves"], "Aves/2019/may/IMG.JPG"])
    assert ds.list_photos(data / "train") == before | {"Aves": aves}
    assert ds.photos_in(data / "train/Aves") == sorted(data / "train" / path for path in aves)
    (data / "empty").mkdir()
    for place in (data / "train/Aves/00.jpg", data / "missing", data / "empty", Path("a\0b")):
        assert ds.photos_in(place) == [place]
    (data / "train/Fungi").chmod(0)
    if not os.access(data / "train/Fungi", os.R_OK):  # root may read everything
        with pytest.raises(ds.InputError, match=r"Fungi' can't be read"):
            ds.photos_in(data / "train")


def test_what_systems_leave_behind_is_left_out_and_counted(data, capsys):
    """What Synology, macOS, Windows, QNAP and Linux put beside photos, some of it photos."""
    before = ds.list_photos(data / "train")
    for name in ("@eaDir/x.jpg", "Aves/@eaDir/00.jpg/SYNOPHOTO_THUMB_M.jpg", "__MACOSX/Aves/1.jpg",
                 "$RECYCLE.BIN/1.jpg", "#recycle/1.jpg", ".@__thumb/1.jpg", "Aves/.Trash-0/1.jpg",
                 "lost+found/1.jpg", "Aves/x.HEIC", "Aves/y.heic", "Aves/README", "beside.jpg"):
        (data / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (data / "train" / name).touch()
    capsys.readouterr()
    assert ds.list_photos(data / "train") == before
    assert capsys.readouterr().out == (
        f"Left out    files in '{data / 'train'}': 2 .heic, 1 in #recycle, 1 in $RECYCLE.BIN, "
        "2 in @eaDir, 1 in __MACOSX, 1 in lost+found, 1 without an ending\n"
        "Left out    1 photos beside the class folders, e.g. 'beside.jpg'\n")


def test_links_are_followed_but_not_in_circles(data, tmp_path):
    before, root = ds.list_photos(data / "train"), data / "train"
    (more := tmp_path / "more").mkdir()
    (root / "Aves/00.jpg").rename(more / "far.jfif")
    (root / "Aves/linked").symlink_to(more)
    (root / "Aves/again").symlink_to(root)
    (more / "up").symlink_to(more)
    (root / "Plantae").symlink_to(root / "Fungi")
    found = ds.list_photos(root)
    assert found["Aves"] == sorted([*before["Aves"][1:], "Aves/linked/far.jfif"])
    assert len(found["Plantae"]) == len(found["Fungi"]) == len(before["Fungi"])
    manifest = ds.split(found, 1.0, 0.2, 0)
    ds.materialize(manifest, root, Path("out"), "hardlink")
    copy = next(Path("out").rglob("far.jfif"))
    assert not copy.is_symlink() and copy.samefile(more / "far.jfif")
    (root / "Reptilia").symlink_to("nowhere")
    (root / "Aves/notes.txt").symlink_to("nowhere")  # is no photo, and no harm
    with pytest.raises(ds.InputError, match=r"Reptilia' is a broken link"):
        ds.list_photos(root)


def test_data_folder_in_either_spelling_and_a_part_that_is_not_read(data, capsys):
    data.rename("inaturalist_12K")
    assert ds.find_data("inaturalist_12k").samefile("inaturalist_12K")
    assert call("dataset_split.py") == 0 and "not read" not in capsys.readouterr().out
    for name in ("Test", "Plantae", ".hidden"):
        Path("inaturalist_12K", name).mkdir()
    assert call("dataset_split.py") == 0
    assert capsys.readouterr().out.startswith("".join(
        f"Left out    '{Path('inaturalist_12K', name)}' is not read: photos belong in train/ and "
        "val/\n" for name in ("Plantae", "Test")))


@pytest.mark.parametrize("folders, words", [
    ({}, ds.ARCHIVE), ({"val/Aves": 9}, "no train/ beside"), ({"Aves": 9, "Test": 9}, "no train/"),
    ({"train/Aves": 9}, "has 1 class folders, needs 2"), ({"train": 9}, "has 0 class"),
    ({"train/Aves": 9, "train/Fungi": 0}, os.path.join("train", "Fungi")),
    ({"train/Aves": 2, "train/Fungi": 1, "val/Aves": 1, "val/Fungi": 1},
     "too small: 'Aves' (2 of 2 photos used), 'Fungi' (1 of 1 photos used): add photos"),
    ({"Aves": 9, "Fungi": 2}, "too small: 'Fungi'")])
def test_unusable_data_folders(refused, folders, words):
    for name, count in folders.items():
        Path("mine", name).mkdir(parents=True)
        for index in range(count):
            Path("mine", name, f"{index}.jpg").touch()
    assert words in refused("dataset_split.py", "--data", "mine")


# -- The command -----------------------------------------------------------------------------------
def test_command_writes_the_manifest(data):
    done = type_command("dataset_split.py", "--data", data, "--fraction", 0.5, cwd=data.parent)
    assert done.returncode == 0 and not done.stderr
    manifest = ds.split(ds.list_photos(data / "train"), 0.5, 0.2, 0)
    written = (data.parent / "splits/0.5-0.2-0.json").read_bytes()
    assert written == (json.dumps(manifest, indent=1) + "\n").encode()
    assert done.stdout.splitlines() == [
        "Class   |  train |    val |   test | unused",
        *(f"{name:7} |      4 |      1 |      4 |      5" for name in ("Aves", "Fungi", "Insecta")),
        "Total   |     12 |      3 |     12 |     15", "",
        f"Manifest: {Path('splits/0.5-0.2-0.json')}"]


def test_test_part_is_the_same_for_every_fraction_and_seed(data, refused):
    manifests = []
    for k, flags in enumerate(((), ("--fraction", 0.75), ("--seed", 3), ("--val-fraction", 0.5),
                               ("--test-fraction", 0.5))):
        assert call("dataset_split.py", "--data", data / "train", *flags, "--out", f"{k}.json") == 0
        manifests.append(ds.read_manifest(f"{k}.json"))
        named = [path for part in ds.PARTS for path in manifests[-1][part]]
        assert len(set(named)) == len(named)
    plain, part, seed, val, more = manifests
    assert plain["test"] == part["test"] == seed["test"] and set(seed["test"]) < set(more["test"])
    assert plain["test_fraction"] == 0.2 and len(plain["test"]) == 6 and len(more["test"]) == 15
    assert plain["train"] != seed["train"] and len(val["val"]) > len(plain["val"])
    assert "leave it out" in refused("dataset_split.py", "--data", data, "--test-fraction", 0.3)


@pytest.mark.parametrize("flags, words", [
    (["--fraction", 0], "outside [0.001"), (["--fraction", "nan"], "outside [0.001"),
    (["--fraction", "half"], "invalid number"), (["--val-fraction", 1], "outside [0.001, 0.999]"),
    (["--seed", -1], "outside [0, 4294967295]"), (["--seed", 1.5], "invalid number"),
    (["--mode", "move"], "'move'"), (["--fractoin=1"], "unrecognized arguments: --fractoin=1"),
    (["--out", "file/s.json"], "can't be written"), (["--frac", 0.5], "arguments: --frac 0.5")])
def test_wrong_options(data, refused, flags, words):
    Path("file").touch()
    assert words in refused("dataset_split.py", "--data", data, *flags)


def test_a_manifest_is_not_written_among_the_classes(data, refused, monkeypatch):
    monkeypatch.chdir(data / "train")
    assert "would be taken for a class" in refused("dataset_split.py", "--data", ".")
    assert not Path("splits").exists()
    Path(data.parent, "file").touch()
    assert "is a file, not a folder" in refused("dataset_split.py", "--data", data.parent / "file")


def test_names_that_differ_in_encoding_only_are_called_so(data):
    (data / "train/Aves").rename(data / "train/V\u00f6gel")
    (data / "val/Aves").rename(data / "val/Vo\u0308gel")
    with pytest.raises(ds.InputError, match=r"how accents are encoded \(NFC, NFD\)"):
        ds.load_split(options(data))


def test_a_manifest_is_never_overwritten_by_another(data, refused):
    assert call("dataset_split.py", "--data", data, "--out", "s.json") == 0
    text = Path("s.json").read_text()
    assert call("dataset_split.py", "--data", data, "--out", "s.json") == 0, "the same is no harm"
    line = refused("dataset_split.py", "--data", data, "--out", "s.json", "--seed", 1)
    assert "of another split" in line and Path("s.json").read_text() == text


@pytest.mark.parametrize("error, code, words", [
    (ds.InputError("a\nb"), 2, "a\\nb"), (KeyboardInterrupt("go on"), 130, "interrupted: go on"),
    (KeyboardInterrupt(), 130, "interrupted")])
def test_errors_have_exit_codes_and_one_line(capsys, error, code, words):
    for silent, text in ((lambda error: True, ""),
                         (lambda error: False, f"{Path(sys.argv[0]).name}: {words}\n")):
        with pytest.raises(SystemExit, match=str(code)), ds.exit_codes(silent):
            raise error
        assert capsys.readouterr().err == text


@pytest.mark.parametrize("code, status", [
    ("import sys, dataset_split; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)", 0),
    ("import dataset_split as ds\nwith ds.exit_codes(): raise BrokenPipeError", 130)])
def test_module_loads_without_torch_and_a_closed_pipe_is_no_error(code, status):
    folder = Path(ds.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True)
    assert (done.returncode, done.stderr) == (status, b"")


# -- Manifests that are read -----------------------------------------------------------------------
@pytest.mark.parametrize("spoil, words", [
    (lambda m: m["train"].append("Aves/gone.jpg"), "missing, or twice (1), e.g. 'Aves/gone.jpg'"),
    (lambda m: m["val"].append(m["train"][0]), "missing, or twice (1)"),
    (lambda m: Path("photos/train", m["train"][0]).rename("photos/train/Aves/e\u0301.jpg")
     and m["train"].__setitem__(0, "Aves/\u00e9.jpg"), "accents in another encoding: NFC, NFD)"),
    (lambda m: m["classes"].append("Zebra"), "classes: only one has 'Zebra'"),
    (lambda m: m["classes"].remove("Fungi"), "classes: only one has 'Fungi'"),
    (lambda m: m["val"].clear(), "no photos of some class in train"),
    (lambda m: m.update(test=[], test_fraction=0.2), "has test photos, as val/ has"),
    (lambda m: shutil.rmtree("photos/val"), "has no test photos, nor val/")])
def test_manifest_that_does_not_fit_the_data(data, spoil, words):
    manifest = ds.load_split(options(data)).manifest
    spoil(manifest)
    with pytest.raises(ds.InputError) as caught:
        ds.load_split(options(data), manifest, "split 'x'")
    assert str(caught.value).startswith("split 'x' ") and words in str(caught.value)


@pytest.mark.parametrize("content", [
    b"\xff\xfe\x00", b"{", b"[1, 2]", b'{"format": 1}',
    b'{"format": 99, "classes": [], "train": [], "val": []}'])
def test_file_that_is_no_manifest(content):
    with pytest.raises(ds.InputError, match=r"'bad.json' can't be read"):
        ds.read_manifest("bad.json")
    Path("bad.json").write_bytes(content)
    with pytest.raises(ds.InputError, match=r"'bad.json' (can't be read as|is not a manifest)"):
        ds.read_manifest("bad.json")


def test_load_split_finds_the_photos_of_a_manifest(data):
    made = ds.load_split(options(data, fraction=0.5))
    assert made.parts["train"][0] == (data / "train" / made.manifest["train"][0], 0)
    assert [file for file, _ in made.parts["test"]] == sorted((data / "val").rglob("*.jpg"))
    rest = [pair for part in ("train", "val") for pair in made.parts[part]] + made.unused
    assert sorted(file for file, _ in rest) == sorted((data / "train").rglob("*.jpg"))
    assert {made.manifest["classes"][label] == file.parent.name for file, label in rest} == {True}
    assert made.folders == {"train": data / "train", "val": data / "train", "test": data / "val"}
    again = ds.load_split(args := options(data), made.manifest)
    assert again.parts == made.parts and args.fraction == 0.5
    made = ds.load_split(args := options(data / "train"))  # without val/
    assert args.test_fraction == 0.2 and {*made.folders.values()} == {data / "train"}
    assert [len(made.parts[part]) for part in ds.PARTS] == [18, 6, 6]
    shutil.rmtree(data / "val/Fungi")
    with pytest.raises(ds.InputError, match="only one has 'Fungi'"):
        ds.load_split(options(data))


def test_same_photos_in_two_parts_or_classes_are_reported(capsys):
    train = {"Aves/1.jpg": "a", "Aves/2.jpg": "a", "Fungi/1.jpg": "a", "Fungi/2.jpg": "b"}
    ds.report_same_photos(Path(), train={"Aves/1.jpg": "a", "Aves/2.jpg": "a"}, val={"x/y": "c"})
    assert not Path("same_photos.csv").exists() and not capsys.readouterr().out
    ds.report_same_photos(Path(), train=train, val={"Fungi/3.jpg": "b"})
    assert "Copies      2 in other parts" in capsys.readouterr().out
    assert Path("same_photos.csv").read_text().splitlines() == [
        "path,part,same_as,its_part", "Aves/1.jpg,train,Fungi/1.jpg,train",
        "Fungi/2.jpg,train,Fungi/3.jpg,val"]


# -- Files and folders -----------------------------------------------------------------------------
def test_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    ds.write_whole(Path("file"), b"old")
    ds.write_whole(Path("file"), b"new")
    monkeypatch.setattr(os, "fsync", lambda stream: os.stat("gone"))
    with pytest.raises(ds.InputError, match=r"'file' can't be written: No such file"):
        ds.write_whole(Path("file"), b"newer")
    assert tree(tmp_path) == {"file": b"new"}


def test_folder_of_a_run(monkeypatch):
    out = Path("runs/first")
    out.mkdir(parents=True)
    for name in (".best.pt.123-ab.tmp", "notes.txt.123.tmp"):
        (out / name).touch()
    first = ds.claim_folder(out)
    assert sorted(os.listdir(out)) == [".lock", "notes.txt.123.tmp"]
    for resume in (False, True):
        with pytest.raises(ds.InputError, match=r"a run is going on in 'runs.first': wait"):
            ds.claim_folder(out, resume)
    os.close(first)
    (out / "last.pt").touch()
    with pytest.raises(ds.InputError, match=r"'runs.first' has a run already: .* or --resume"):
        ds.claim_folder(out)
    os.close(ds.claim_folder(out, resume=True))
    with pytest.raises(ds.InputError, match=r"--out 'runs.*' can't be the run's folder"):
        ds.claim_folder(out / "last.pt")

    def flock(*_):
        raise OSError(37, "No locks available")
    monkeypatch.setattr(fcntl, "flock", flock)
    os.close(ds.claim_folder(Path("out")))  # on a file system without locks


def test_lock_ends_with_the_process_that_has_it(tmp_path):
    code = "import dataset_split as ds, os, sys; ds.claim_folder(ds.Path(sys.argv[1])); "
    for last in ("os.kill(os.getpid(), 9)", "sys.exit()"):
        subprocess.run([sys.executable, "-c", code + last, tmp_path / "out"],
                       cwd=Path(ds.__file__).parent)
        assert (tmp_path / "out/.lock").exists()
        os.close(ds.claim_folder(tmp_path / "out"))


def test_folders_of_a_run_may_not_be_classes(data, monkeypatch):
    ds.refuse_inside_photos(data, data / "train/.run", data / "cache", data / "run")
    monkeypatch.chdir(data / "train")
    for folder in (data / "train/run", Path("runs"), data / "val/x/y"):
        with pytest.raises(ds.InputError, match="would be taken for a class"):
            ds.refuse_inside_photos(data, data / "run", folder)


@pytest.mark.parametrize("mode", ["symlink", "hardlink", "copy"])
def test_materialize_makes_the_split_as_folders(data, mode):
    Path(".out.unfinished/left").mkdir(parents=True)  # by a command that was killed
    assert call("dataset_split.py", "--data=photos/train", "--materialize=out", "--mode", mode) == 0
    manifest, source = ds.read_manifest("splits/1.0-0.2-0.json"), data / "train"
    assert tree(Path("out")) == {f"{part}/{path}": (source / path).read_bytes()
                                  for part in ds.PARTS for path in manifest[part]}
    photo = Path("out/train", manifest["train"][0])
    assert photo.is_symlink() == (mode == "symlink")
    assert photo.samefile(source / manifest["train"][0]) == (mode != "copy")
    assert sorted(os.listdir()) == ["out", "photos", "splits"], "nothing else is left"
    assert sorted(os.listdir("out")) == ["test", "train", "val"]


def test_materialize_refuses_folders_in_use(data, refused):
    Path("tree").mkdir()
    for target, words in (("tree", "exists already"), (data / "train/sub", "taken for a class")):
        assert words in refused("dataset_split.py", "--data", data, "--materialize", target)
    assert sorted(os.listdir()) == ["photos", "splits", "tree"] and not os.listdir("tree")
    assert "sub" not in os.listdir(data / "train")


def test_materialize_leaves_nothing_behind_when_it_fails(data, monkeypatch, refused):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(shutil, "copy2", full)
    assert "space" in refused("dataset_split.py", "--data=photos", "--materialize=x", "--mode=copy")
    assert sorted(os.listdir()) == ["photos", "splits"]


def test_demo_is_drawn_once_and_the_same_everywhere():
    ds.draw_demo(Path("demo"), source=2, train=2, test=1)
    pixels = [np.asarray(Image.open(file), int) for file in Path("demo").rglob("*.png")]
    assert len(pixels) == 78 == len({picture.tobytes() for picture in pixels})
    assert sum(picture.sum() for picture in pixels) == pytest.approx(149710183, rel=1e-4)
    Path("demo/target/val/Rings/000.png").write_bytes(b"mine")
    ds.draw_demo(Path("demo"), source=2, train=2, test=1)
    assert Path("demo/target/val/Rings/000.png").read_bytes() == b"mine", "left as it is"
    for make in (ds.draw_demo, ds.download):
        with pytest.raises(ds.InputError, match="'demo/source' exists already"):
            make(Path("demo/source"))


# -- The download ----------------------------------------------------------------------------------
def archive(data: Path) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as packed:
        for name, content in tree(data).items():
            packed.writestr(f"inaturalist_12K/{name}", content)
        packed.writestr("../out.jpg", b"which must not be written")
    return stream.getvalue()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content`; may break off after some bytes, or answer a range with the whole file."""

    def do_GET(self):
        start, size = int(self.headers["Range"][6:-1]), len(self.content)
        self.asked.append(start)
        if start >= size:
            return self.send_error(416)
        start = start if self.ranges else 0
        self.send_response(206 if self.ranges else 200)
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        self.wfile.write(self.content[start:][:self.breaks.pop(0) if self.breaks else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def serve(data):
    """Serve an archive of the drawn photos, with these settings; gives its address."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def serve(content=None, breaks=(), ranges=True):
            Server.content, Server.ranges = content or archive(data), ranges
            Server.breaks, Server.asked = list(breaks), []
            return f"http://127.0.0.1:{server.server_port}/nature_12K.zip"
        yield serve
        server.shutdown()


@pytest.mark.parametrize("have, breaks, ranges, asked", [
    (0, [], True, [0]), (0, [1000, 5000], True, [0, 1000, 6000]), (1000, [], True, [1000]),
    (0, [1000], False, [0, 1000]), (1000, [], False, [1000]), (None, [], True, None)])
def test_download_ends_with_the_whole_data_set(data, serve, have, breaks, ranges, asked):
    url = serve(breaks=breaks, ranges=ranges)
    Path("nature_12K.zip.part").write_bytes(Server.content[:have])
    Path(".fetched.unfinished/train").mkdir(parents=True)  # of a command that was killed
    for _ in breaks:
        with pytest.raises(ds.InputError, match=r"connection lost.* again to resume it"):
            ds.download(Path("fetched"), url)
    ds.download(Path("fetched"), url)
    assert tree(Path("fetched")) == tree(data) and sorted(os.listdir()) == ["fetched", "photos"]
    ds.download(Path("Fetched"), url)
    assert Server.asked == (asked or [len(Server.content)]), "what is there is not fetched again"


def test_transfer_that_breaks_off_keeps_what_came(serve):
    with pytest.raises(ds.InputError, match=r"connection lost.* again to resume it"):
        ds.download(Path("fetched"), serve(breaks=[1000]))
    assert sorted(os.listdir()) == ["nature_12K.zip.part", "photos"]
    assert Path("nature_12K.zip.part").read_bytes() == Server.content[:1000]
    with pytest.raises(ds.InputError, match=r"refused.* again to resume it"):
        ds.download(Path("fetched"), "http://127.0.0.1:1/x.zip")


@pytest.mark.parametrize("spoil", [
    lambda content: content[:3000] + bytes([content[3000] ^ 1]) + content[3001:],
    lambda content: content[:-50], lambda content: b"<html>" * 99])
def test_damaged_archive_is_deleted(data, serve, spoil):
    with pytest.raises(ds.InputError, match="was damaged and is deleted"):
        ds.download(Path("fetched"), serve(spoil(archive(data))))
    assert os.listdir() == ["photos"], "half a data set never looks like a whole one"


def test_q3_downloads_first_and_then_trains(serve, monkeypatch, small_network):
    monkeypatch.setattr(ds.download, "__defaults__", (serve(),))
    assert call("Q3.py", "--download", "--data", "fetched", *QUICK, "--out", "out") == 0
    assert Path("out/test.json").exists() and Path("fetched/train").is_dir()
