"""dataset_split.py: the split itself, the manifest, the folders for other tools, and what is said about bad input."""

import http.server
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest

import dataset_split as ds
from conftest import QUICK, ROOT, call, draw_photo, type_command

CLASSES = ("Amphibia", "Animalia", "Arachnida", "Aves", "Fungi", "Insecta", "Mammalia", "Mollusca", "Plantae", "Reptilia")


def names(counts: dict[str, int]) -> dict[str, list[str]]:
    return {name: [f"{name}/{index:04}.jpg" for index in range(count)] for name, count in counts.items()}


def inaturalist() -> dict[str, list[str]]:
    return names({name: 999 if name == "Insecta" else 1000 for name in CLASSES})


def touch(folder: Path, counts: dict[str, int]) -> Path:
    for name, count in counts.items():
        (folder / "train" / name).mkdir(parents=True)
        for index in range(count):
            (folder / "train" / name / f"{index}.jpg").touch()
    (folder / "val").mkdir()
    return folder


def untested(folder: Path, counts: dict[str, int]) -> Path:
    """The same without a val/ and a train/, as most folders of photos are."""
    touch(folder, counts)
    (folder / "val").rmdir()
    for name in counts:
        (folder / "train" / name).rename(folder / name)
    (folder / "train").rmdir()
    return folder


# -- the split --------------------------------------------------------------------------------------------------------

def test_defaults_give_the_published_sizes():
    manifest = ds.split(inaturalist(), 0.25, 0.2, seed=0)
    assert (len(manifest["train"]), len(manifest["val"])) == (1999, 500)


def test_split_is_the_same_on_every_machine():
    """Written down once: a change here would move photos between the parts of everybody's earlier runs."""
    manifest = ds.split(names({"Aves": 12, "Été": 8}), 0.75, 0.3, seed=3)
    assert manifest["train"] == ["Aves/0001.jpg", "Aves/0003.jpg", "Aves/0004.jpg", "Aves/0006.jpg", "Aves/0007.jpg",
                                 "Aves/0008.jpg", "Été/0001.jpg", "Été/0002.jpg", "Été/0005.jpg", "Été/0007.jpg"]
    assert manifest["val"] == ["Aves/0005.jpg", "Aves/0010.jpg", "Aves/0011.jpg", "Été/0003.jpg", "Été/0006.jpg"]


def test_split_does_not_depend_on_the_order_of_the_listing_nor_on_other_classes():
    photos = inaturalist()
    shuffled = {name: paths[::-1] for name, paths in reversed(photos.items())}
    assert ds.split(photos, 0.25, 0.2, 0) == ds.split(shuffled, 0.25, 0.2, 0)
    alone = ds.split({"Aves": photos["Aves"]}, 0.25, 0.2, 0)
    assert alone["val"] == [path for path in ds.split(photos, 0.25, 0.2, 0)["val"] if path.startswith("Aves/")]


def test_accented_names_split_alike_composed_and_decomposed():
    composed, decomposed = "\u00e9", "e\u0301"
    def positions(letter):
        paths = [f"C/{letter}{index}.jpg" for index in range(50)]
        held_out = ds.split({"C": paths}, 1.0, 0.2, 0)["val"]
        return [paths.index(path) for path in paths if path in held_out]
    assert positions(composed) == positions(decomposed)


@pytest.mark.parametrize("val_fraction", [0.05, 0.2, 0.5, 0.8])
def test_parts_share_no_photo_and_subsets_nest(val_fraction):
    photos = names({"Aves": 400, "Fungi": 333})
    earlier_train, earlier_val = set(), set()
    for fraction in (0.1, 0.25, 0.5, 0.77, 1.0):
        manifest = ds.split(photos, fraction, val_fraction, seed=5)
        train, val = set(manifest["train"]), set(manifest["val"])
        assert not train & val
        assert earlier_train <= train and earlier_val <= val
        assert len(train) + len(val) == sum(math.floor(len(paths) * fraction) for paths in photos.values())
        earlier_train, earlier_val = train, val
    assert train | val == {path for paths in photos.values() for path in paths}


def test_validation_takes_its_share_of_every_class():
    manifest = ds.split(inaturalist(), 0.25, 0.2, 0)
    for name in CLASSES:
        used = 249 if name == "Insecta" else 250
        assert sum(path.startswith(name) for path in manifest["val"]) == round(used * 0.2)


def test_seed_draws_other_photos():
    assert ds.split(inaturalist(), 0.25, 0.2, 0)["train"] != ds.split(inaturalist(), 0.25, 0.2, 1)["train"]


def test_fraction_means_the_decimal_that_was_typed():
    """In floating point 100 * 0.29 is 28.999999999999996."""
    manifest = ds.split(names({"Aves": 100}), 0.29, 0.2, 0)
    assert len(manifest["train"]) + len(manifest["val"]) == 29


@pytest.mark.parametrize("photos, fraction, val_fraction, part", [
    (2, 1.0, 0.2, "validation"), (20, 0.1, 0.2, "validation"), (1, 1.0, 0.9, "training"), (3, 0.01, 0.5, "validation")])
def test_class_too_small_for_both_parts_is_named(photos, fraction, val_fraction, part):
    with pytest.raises(ds.InputError, match=f"'Aves' is too small: .* {part}"):
        ds.split(names({"Aves": photos, "Fungi": 500}), fraction, val_fraction, 0)


# -- which photos there are -------------------------------------------------------------------------------------------

def test_hidden_files_and_other_files_are_no_photos(data, capsys):
    before = ds.list_photos(data / "train")
    for name in (".DS_Store", "Aves/.DS_Store", "Aves/._00.jpg", ".cache/x.jpg", "Aves/.thumbs/x.jpg", "list.txt", "Aves/notes.txt"):
        (data / "train" / name).parent.mkdir(exist_ok=True)
        (data / "train" / name).write_bytes(b"?")
    assert ds.list_photos(data / "train") == before
    assert ": 1 in" in (output := capsys.readouterr().out) and "Aves/notes.txt" in output


def test_photos_may_lie_deeper_and_end_in_capitals(data):
    draw_photo(data / "train" / "Aves" / "2019" / "may" / "IMG.JPG", (1, 2, 3), 0)
    assert "Aves/2019/may/IMG.JPG" in ds.list_photos(data / "train")["Aves"]


def test_either_spelling_of_the_archive_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(touch(tmp_path / "inaturalist_12K", {"A": 5, "B": 5}).parent)
    assert ds.find_data("inaturalist_12k").samefile("inaturalist_12K")
    assert call("dataset_split.py") == 0


def test_labels_follow_the_sorted_class_names():
    assert ds.labelled(Path("t"), ["B/1.jpg", "A/x/2.jpg"], ["A", "B"]) == [(Path("t/B/1.jpg"), 1), (Path("t/A/x/2.jpg"), 0)]


# -- the command ------------------------------------------------------------------------------------------------------

def test_command_writes_the_manifest_and_says_what_and_where(data):
    done = type_command("dataset_split.py", "--data", data, "--fraction", 0.5, cwd=data.parent)
    assert done.returncode == 0 and not done.stderr
    manifest = json.loads((data.parent / "splits" / "0.5-0.2-0.json").read_text())
    assert manifest == ds.split(ds.list_photos(data / "train"), 0.5, 0.2, 0)
    assert list(manifest) == ["format", "fraction", "val_fraction", "seed", "classes", "train", "val"]
    assert all(manifest[part] == sorted(manifest[part]) for part in ("classes", "train", "val"))
    rows = [line.replace("|", " ").split() for line in done.stdout.splitlines()]
    assert ["Aves", "10", "4", "1"] in rows and ["Total", "30", "12", "3"] in rows
    assert str(Path("splits", "0.5-0.2-0.json")) in done.stdout


@pytest.mark.parametrize("flags, changed", [
    (["--fraction", "0.5"], ("fraction", 0.5)), (["--val-fraction", "0.5"], ("val_fraction", 0.5)), (["--seed", "9"], ("seed", 9))])
def test_each_option_of_the_split_changes_it(data, monkeypatch, flags, changed):
    monkeypatch.chdir(data.parent)
    assert call("dataset_split.py", "--data", data, "--out", "plain.json") == 0
    assert call("dataset_split.py", "--data", data, "--out", "other.json", *flags) == 0
    plain, other = json.loads(Path("plain.json").read_text()), json.loads(Path("other.json").read_text())
    assert other[changed[0]] == changed[1] != plain[changed[0]]
    assert (other["train"], other["val"]) != (plain["train"], plain["val"])


def test_a_manifest_is_never_overwritten_by_another(data, tmp_path, refused):
    out = tmp_path / "split.json"
    assert call("dataset_split.py", "--data", data, "--out", out) == 0
    text = out.read_text()
    assert call("dataset_split.py", "--data", data, "--out", out) == 0, "the same split again is no harm"
    assert "delete it" in refused("dataset_split.py", "--data", data, "--out", out, "--seed", 1)
    assert out.read_text() == text


def test_atomic_write_keeps_the_old_content_until_the_new_is_complete(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    with pytest.raises(ZeroDivisionError), ds.atomic_write(file) as stream:
        stream.write(b"ne")
        stream.flush()
        assert file.read_text() == "old"
        1 / 0
    assert file.read_text() == "old" and os.listdir(tmp_path) == ["file"]
    with ds.atomic_write(file) as stream:
        stream.write(b"new")
    assert file.read_text() == "new" and os.listdir(tmp_path) == ["file"]


def test_twelve_thousand_photos_take_under_two_seconds_and_no_torch(tmp_path):
    touch(tmp_path, {name: 1200 for name in CLASSES})
    start = time.perf_counter()
    done = type_command("dataset_split.py", "--data", tmp_path, cwd=tmp_path)
    assert done.returncode == 0 and time.perf_counter() - start < 2
    code = "import sys, dataset_split; sys.exit(any(name in sys.modules for name in ('torch', 'torchvision', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# -- the folders for other tools --------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["symlink", "hardlink", "copy"])
def test_materialize_makes_the_split_as_folders(data, tmp_path, monkeypatch, mode):
    monkeypatch.chdir(tmp_path)
    assert call("dataset_split.py", "--data", "photos", "--fraction", 0.5, "--materialize", "tree", "--mode", mode) == 0
    manifest = json.loads(Path("splits/0.5-0.2-0.json").read_text())
    for part in ("train", "val"):
        made = sorted(path.relative_to(f"tree/{part}").as_posix() for path in Path("tree", part).rglob("*.jpg"))
        assert made == manifest[part]
    photo, source = Path("tree", "train", manifest["train"][0]), data / "train" / manifest["train"][0]
    assert photo.read_bytes() == source.read_bytes()
    assert photo.is_symlink() == (mode == "symlink")
    assert (not photo.is_symlink() and photo.samefile(source)) == (mode == "hardlink")
    assert sorted(os.listdir()) == ["photos", "splits", "tree"], "nothing else is left lying about"


def test_materialize_links_by_default_and_accepts_an_empty_folder(data, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "tree").symlink_to("elsewhere")
    assert call("dataset_split.py", "--data", data, "--out", tmp_path / "s.json", "--materialize", tmp_path / "tree") == 0
    photos = list((tmp_path / "elsewhere").rglob("*.jpg"))
    assert len(photos) == 30 and all(path.is_symlink() and path.exists() for path in photos)


def test_materialize_refuses_a_folder_in_use(data, tmp_path, refused):
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "thesis.txt").write_text("mine")
    line = refused("dataset_split.py", "--data", data, "--out", tmp_path / "s.json", "--materialize", tmp_path / "tree")
    assert "not an empty folder" in line and os.listdir(tmp_path / "tree") == ["thesis.txt"]
    assert not (tmp_path / "s.json").exists(), "refused before anything is written"


def test_materialize_refuses_to_write_among_the_photos(data, tmp_path, refused):
    line = refused("dataset_split.py", "--data", data, "--out", tmp_path / "s.json", "--materialize", data / "train" / "sub")
    assert "inside the photos" in line and "sub" not in os.listdir(data / "train")


def test_materialize_leaves_nothing_behind_when_it_fails(data, tmp_path, monkeypatch, refused):
    def full(source, target):
        if "Fungi" in str(target):
            raise OSError(28, "No space left on device")
        Path(target).touch()
    monkeypatch.setattr(ds.shutil, "copy2", full)
    line = refused("dataset_split.py", "--data", data, "--out", tmp_path / "s.json", "--materialize", tmp_path / "tree", "--mode", "copy")
    assert "No space left" in line and sorted(os.listdir(tmp_path)) == ["photos", "s.json"]


# -- bad input --------------------------------------------------------------------------------------------------------

def test_missing_data_folder_says_how_to_get_it(tmp_path, refused):
    line = refused("dataset_split.py", "--data", tmp_path / "nowhere")
    assert "nowhere" in line and ds.ARCHIVE in line and "--data" in line


def test_name_that_no_disk_allows(refused):
    assert "no data folder" in refused("dataset_split.py", "--data", "x" * 300)


def test_class_named_total_is_a_class(tmp_path, capsys):
    assert call("dataset_split.py", "--data", touch(tmp_path, {"Aves": 9, "Total": 9}), "--out", tmp_path / "s.json") == 0
    assert capsys.readouterr().out.splitlines()[1:5] == [
        "Aves  |      9 |        7 |          2", "Total |      9 |        7 |          2", "-" * 38, "Total |     18 |       14 |          4"]


def test_data_folder_with_val_and_without_train_is_named(tmp_path, refused):
    (tmp_path / "val" / "Aves").mkdir(parents=True)
    assert "no train/ beside val/" in refused("dataset_split.py", "--data", tmp_path)


def test_train_without_class_folders(tmp_path, refused):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "1.jpg").touch()
    assert "no class folders" in refused("dataset_split.py", "--data", tmp_path)


def test_one_class_only(tmp_path, refused):
    assert "one class folder only ('Aves')" in refused("dataset_split.py", "--data", touch(tmp_path, {"Aves": 9}))


def test_empty_class_folder_is_named(tmp_path, refused):
    assert os.path.join("train", "Fungi") in refused("dataset_split.py", "--data", touch(tmp_path, {"Aves": 9, "Fungi": 0}))


def test_class_that_is_too_small_is_named(tmp_path, refused):
    assert "'Fungi' is too small" in refused("dataset_split.py", "--data", touch(tmp_path, {"Aves": 9, "Fungi": 2}))


@pytest.mark.skipif(os.name == "nt" or getattr(os, "geteuid", lambda: 1)() == 0, reason="needs a user whom permissions bind")
def test_unreadable_class_folder_is_named(tmp_path, refused):
    touch(tmp_path, {"Aves": 9, "Fungi": 9})
    (tmp_path / "train" / "Fungi").chmod(0)
    assert "Fungi" in refused("dataset_split.py", "--data", tmp_path)
    (tmp_path / "train" / "Fungi").chmod(0o755)


@pytest.mark.parametrize("flags, part", [
    (["--fraction", "0"], "outside (0, 1]"), (["--fraction", "1.01"], "outside (0, 1]"), (["--fraction", "nan"], "outside (0, 1]"),
    (["--fraction", "half"], "not a number"), (["--val-fraction", "0"], "outside (0, 1)"), (["--val-fraction", "1"], "outside (0, 1)"),
    (["--seed", "-1"], "outside"), (["--seed", "1.5"], "not a whole number"), (["--mode", "copy"], "--materialize"),
    (["--frac", "0.5"], "--frac"), (["--mode", "move"], "'move'")])
def test_wrong_options(data, refused, flags, part):
    line = refused("dataset_split.py", "--data", data, *flags)
    assert part in line and "--help" in line


def test_manifest_that_cannot_be_written(data, tmp_path, refused):
    (tmp_path / "file").touch()
    assert "can't be written" in refused("dataset_split.py", "--data", data, "--out", tmp_path / "file" / "s.json")


def good_manifest(photos):
    return ds.split(photos, 1.0, 0.2, 0)


@pytest.mark.parametrize("spoil, part", [
    (lambda m: m["train"].append("Aves/gone.jpg"), "'Aves/gone.jpg'"),
    (lambda m: m["train"].append("../../etc/passwd"), "not there"),
    (lambda m: m["val"].append(m["train"][0]), "more than once"),
    (lambda m: m["classes"].append("Zebra"), "'Zebra'"),
    (lambda m: m["classes"].remove("Fungi"), "only the data has 'Fungi'"),
    (lambda m: m["classes"].reverse(), "another order"),
    (lambda m: m.update(format=99), "format 99"),
    (lambda m: m.update(train="all"), "not a manifest"),
    (lambda m: m["val"].append(5), "something else than names"),
    (lambda m: m["val"].clear(), "no validation photos"),
    (lambda m: m.update(train=[p for p in m["train"] if "Fungi" not in p]), "no training photos of 'Fungi'"),
    (lambda m: m.pop("seed"), "seed")])
def test_manifest_that_does_not_fit_the_data(data, tmp_path, spoil, part):
    photos = ds.list_photos(data / "train")
    manifest = good_manifest(photos)
    (tmp_path / "good.json").write_text(json.dumps(manifest))
    assert ds.read_manifest(tmp_path / "good.json", photos) == manifest
    spoil(manifest)
    (tmp_path / "bad.json").write_text(json.dumps(manifest))
    with pytest.raises(ds.InputError) as caught:
        ds.read_manifest(tmp_path / "bad.json", photos)
    assert part in str(caught.value) and "bad.json" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"[1, 2]", b"{", b"[" * 100_000, b"null"])
def test_file_that_is_no_manifest(data, tmp_path, content):
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ds.InputError, match="is not"):
        ds.read_manifest(tmp_path / "bad.json", ds.list_photos(data / "train"))


def test_missing_manifest(data, tmp_path):
    with pytest.raises(ds.InputError, match="can't be read"):
        ds.read_manifest(tmp_path / "none.json", ds.list_photos(data / "train"))


def test_interruption_has_its_own_exit_code(capsys):
    with pytest.raises(SystemExit, match="130"), ds.exit_codes():
        raise KeyboardInterrupt("go on")
    assert "interrupted: go on" in capsys.readouterr().err


# -- fetching the data set --------------------------------------------------------------------------------------------

def archive(data: Path, members: dict[str, bytes] = {}) -> bytes:
    """A zip archive of a data folder under its public name, and of other members."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as packed:
        for file in sorted(data.rglob("*.jpg")):
            packed.write(file, f"inaturalist_12K/{file.relative_to(data).as_posix()}")
        for name, content in members.items():
            packed.writestr(name, content)
    return stream.getvalue()


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `content` as a person's network does: breaks off, ignores ranges, is busy."""
    content, breaks, takes_ranges, busy, says_length, asked = b"", [], True, 0, True, []

    def do_GET(self):
        Server.asked.append(self.headers.get("Range"))
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers["Range"])[1]) if self.headers.get("Range") and Server.takes_ranges else 0
        if Server.busy or start >= len(Server.content):
            Server.busy -= bool(Server.busy)
            self.send_response(416 if start >= len(Server.content) else 503)
            self.send_header("Content-Range", f"bytes */{len(Server.content)}")
            return self.end_headers()
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(Server.content) - 1}/{len(Server.content)}")
        if Server.says_length:
            self.send_header("Content-Length", str(len(Server.content) - start))
        self.end_headers()
        self.wfile.write(Server.content[start:][:Server.breaks.pop(0) if Server.breaks else None])

    def log_message(self, *_):
        pass


@pytest.fixture
def served(data, monkeypatch):
    """Serve an archive of the drawn photos; gives its address."""
    for name, value in (("content", archive(data)), ("breaks", []), ("takes_ranges", True), ("busy", 0), ("says_length", True), ("asked", [])):
        monkeypatch.setattr(Server, name, value)
    monkeypatch.setattr(ds.time, "sleep", lambda seconds: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/nature_12K.zip"
        server.shutdown()


def is_whole(folder: Path, data: Path) -> bool:
    left = [path.name for path in folder.parent.iterdir() if path.name.endswith((".part", ".unpacking"))]
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.jpg")} == {
        path.relative_to(data): path.read_bytes() for path in data.rglob("*.jpg")} and not left


@pytest.mark.parametrize("server, requests", [
    ({}, 1), ({"breaks": [1000, 5000]}, 3), ({"breaks": [1000], "takes_ranges": False}, 2), ({"busy": 2}, 3), ({"breaks": [0, 0, 0]}, 4), ({"says_length": False}, 1)])
def test_download_ends_with_the_whole_data_set(data, served, tmp_path, monkeypatch, server, requests):
    for name, value in server.items():
        monkeypatch.setattr(Server, name, value)
    ds.download(tmp_path / "fetched", served)
    assert is_whole(tmp_path / "fetched", data) and len(Server.asked) == requests
    if len(server.get("breaks", [])) == 2:
        assert Server.asked == [None, "bytes=1000-", "bytes=6000-"], "nothing is fetched twice"
    ds.download(tmp_path / "fetched", served)
    assert len(Server.asked) == requests, "what is there is not fetched again"


@pytest.mark.parametrize("have", [1000, None])
def test_download_goes_on_with_what_an_earlier_command_fetched(data, served, tmp_path, have):
    (tmp_path / "nature_12K.zip.part").write_bytes(Server.content[:have])
    (tmp_path / ".fetched.unpacking" / "train").mkdir(parents=True)
    ds.download(tmp_path / "fetched", served)
    assert is_whole(tmp_path / "fetched", data) and Server.asked == [f"bytes={have or len(Server.content)}-"]


def test_server_that_always_breaks_off(data, served, tmp_path):
    Server.breaks = [1000, *[0] * 99]
    with pytest.raises(ds.InputError, match="broke off after 1,000 of .* goes on with what was fetched"):
        ds.download(tmp_path / "fetched", served)
    assert (tmp_path / "nature_12K.zip.part").read_bytes() == Server.content[:1000] and not (tmp_path / "fetched").exists()
    Server.breaks = []
    ds.download(tmp_path / "fetched", served)
    assert is_whole(tmp_path / "fetched", data)


@pytest.mark.parametrize("url, part", [("http://127.0.0.1:1/x.zip", "failed"), ("http://no.such.host.invalid/x.zip", "failed")])
def test_download_without_network(tmp_path, monkeypatch, url, part):
    monkeypatch.setattr(ds.time, "sleep", lambda seconds: None)
    with pytest.raises(ds.InputError, match=part):
        ds.download(tmp_path / "fetched", url)
    assert os.listdir(tmp_path) == ["photos"] if (tmp_path / "photos").exists() else not os.listdir(tmp_path)


def test_archive_that_is_not_there(served, tmp_path, monkeypatch):
    monkeypatch.setattr(Server, "do_GET", lambda self: self.send_error(404))
    with pytest.raises(ds.InputError, match="404"):
        ds.download(tmp_path / "fetched", served)


@pytest.mark.parametrize("name", ["../outside.jpg", "/etc/outside.jpg", "inaturalist_12K/../../outside.jpg", "C:/outside.jpg", "..\\outside.jpg"])
def test_archive_whose_members_would_leave_the_folder(data, served, tmp_path, name):
    Server.content = archive(data, {name: b"x"})
    with pytest.raises(ds.InputError, match="would lie outside the data folder"):
        ds.download(tmp_path / "in" / "fetched", served)
    assert not (tmp_path / "in" / "fetched").exists() and not list(tmp_path.rglob("outside*")) and not list(tmp_path.rglob(".*unpacking"))


def test_archive_with_a_link(data, served, tmp_path):
    link = zipfile.ZipInfo("inaturalist_12K/train/Aves/link.jpg")
    link.external_attr = 0o120777 << 16
    Server.content = archive(data, {link: b"/etc/passwd"})
    with pytest.raises(ds.InputError, match="or is a link"):
        ds.download(tmp_path / "fetched", served)


@pytest.mark.parametrize("spoil", [lambda content: content[:3000] + bytes([content[3000] ^ 1]) + content[3001:], lambda content: content[:-50], lambda content: b"<html>" * 99])
def test_damaged_archive_is_fetched_again(data, served, tmp_path, spoil):
    good, Server.content = Server.content, spoil(Server.content)
    with pytest.raises(ds.InputError, match="was damaged .* fetches it again"):
        ds.download(tmp_path / "fetched", served)
    assert sorted(os.listdir(tmp_path)) == ["photos"], "half a data set never looks like a whole one"
    Server.content = good
    ds.download(tmp_path / "fetched", served)
    assert is_whole(tmp_path / "fetched", data)


def test_archive_of_something_else(served, tmp_path):
    Server.content = archive(tmp_path / "nothing", {"readme.txt": b"hello"})
    with pytest.raises(ds.InputError, match="no folder with train/ and val/"):
        ds.download(tmp_path / "fetched", served)


@pytest.mark.parametrize("free", [3000, 2 * 40_000])
def test_room_is_checked_before_it_is_used(data, served, tmp_path, monkeypatch, free):
    Server.content = archive(data, {"inaturalist_12K/notes.txt": b"x" * 200_000})
    monkeypatch.setattr(ds.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, free))
    with pytest.raises(ds.InputError, match="GB are free: make room"):
        ds.download(tmp_path / "fetched", served)
    assert sum(path.stat().st_size for path in tmp_path.glob("*.part")) == 0


def test_folder_in_the_way_of_a_download(served, tmp_path):
    (tmp_path / "fetched").mkdir()
    (tmp_path / "fetched" / "thesis.txt").write_text("mine")
    with pytest.raises(ds.InputError, match="is in the way"):
        ds.download(tmp_path / "fetched", served)
    assert not Server.asked and os.listdir(tmp_path / "fetched") == ["thesis.txt"]


def test_download_that_is_killed_while_unpacking_leaves_no_half_data_set(data, served, tmp_path, monkeypatch):
    def killed(self, member, target, extract=zipfile.ZipFile.extract):
        extract(self, member, target)
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "extract", killed)
        with pytest.raises(KeyboardInterrupt):
            ds.download(tmp_path / "fetched", served)
    assert not (tmp_path / "fetched").exists()
    ds.download(tmp_path / "fetched", served)
    assert is_whole(tmp_path / "fetched", data) and Server.asked[-1] == f"bytes={len(Server.content)}-"


def test_q3_downloads_first_and_then_trains(served, tmp_path, monkeypatch, small_network):
    monkeypatch.setattr(ds.download, "__defaults__", (served,))
    assert call("Q3.py", "--download", "--data", tmp_path / "fetched", *QUICK, "--out", "out") == 0
    assert Path("out/test.json").exists() and (tmp_path / "fetched" / "train").is_dir()


def test_files_of_the_same_bytes_are_found_whatever_their_names(tmp_path):
    for name, content in (("a", b"one"), ("b", b"two"), ("c", b"one"), ("d", b"other"), ("e", b"one")):
        (tmp_path / name).write_bytes(content)
    assert ds.same_photos([tmp_path / name for name in "edcbax"]) == [(tmp_path / "e", tmp_path / "c"), (tmp_path / "e", tmp_path / "a")]


# -- data without test photos -----------------------------------------------------------------------------------------

def test_test_part_is_a_stratified_part_of_the_photos_and_always_the_same():
    photos = inaturalist()
    rest, test = ds.set_test_aside(photos, 0.2)
    for name, paths in photos.items():
        mine = [path for path in test if path.startswith(f"{name}/")]
        assert len(mine) == len(paths) // 5 and sorted(mine + rest[name]) == sorted(paths)
    assert set(ds.set_test_aside(photos, 0.1)[1]) < set(test), "a smaller test part is inside a larger one"
    more, _ = ds.set_test_aside({**photos, "Aves": photos["Aves"] + ["Aves/new.jpg"]}, 0.2)
    assert len(set(more["Aves"]) ^ set(rest["Aves"])) <= 2, "an added photo moves no other one, but for the one at the edge"
    assert ds.set_test_aside({"a": ["a/1", "a/2", "a/3"], "b": ["b/1", "b/2", "b/3"]}, 0.01)[1][0].startswith("a/"), "at least one"


def test_photos_without_val_give_the_same_test_part_for_every_fraction_and_seed(tmp_path, capsys):
    data = untested(tmp_path / "mine", {"cat": 10, "dog": 20})
    manifests = []
    for number, flags in enumerate(((), ("--fraction", 0.5), ("--seed", 3), ("--test-fraction", 0.5))):
        assert call("dataset_split.py", "--data", data, *flags, "--out", f"{number}.json") == 0
        manifests.append(json.loads(Path(f"{number}.json").read_text()))
        named = manifests[-1]["train"] + manifests[-1]["val"] + manifests[-1]["test"]
        assert len(set(named)) == len(named)
    assert capsys.readouterr().out.splitlines()[:3] == ["Class | Photos | Training | Validation | Test",
                                                        "cat   |     10 |        6 |          2 |    2", "dog   |     20 |       13 |          3 |    4"]
    assert manifests[0]["test"] == manifests[1]["test"] == manifests[2]["test"] and set(manifests[2]["test"]) < set(manifests[3]["test"])
    assert manifests[0]["train"] != manifests[2]["train"] and manifests[3]["test_fraction"] == 0.5 and len(manifests[3]["test"]) == 15


def test_test_part_as_folders(tmp_path, capsys):
    data = untested(tmp_path / "mine", {"cat": 10, "dog": 20})
    assert call("dataset_split.py", "--data", data, "--materialize", "tree") == 0
    assert {part: len(list(Path("tree", part).rglob("*.jpg"))) for part in ("train", "val", "test")} == {"train": 19, "val": 5, "test": 6}
    assert "tree/train and tree/val and tree/test" in capsys.readouterr().out


def test_test_part_that_cannot_be(tmp_path, refused):
    data = untested(tmp_path / "mine", {"cat": 2, "dog": 20})
    assert "'cat' is too small: training, validation and test need a photo each, and it has 2" in refused("dataset_split.py", "--data", data)
    assert "has test photos of its own, in val/" in refused("dataset_split.py", "--data", touch(tmp_path / "other", {"cat": 9, "dog": 9}), "--test-fraction", 0.3)


def test_manifest_and_data_have_to_agree_about_the_test_part(tmp_path):
    photos = {"cat": [f"cat/{index}.jpg" for index in range(9)], "dog": [f"dog/{index}.jpg" for index in range(9)]}
    rest, test = ds.set_test_aside(photos, 0.2)
    plain = ds.split(rest, 1.0, 0.2, 0)
    whole = plain | {"test_fraction": 0.2, "test": test}
    for manifest, has_val, words in ((whole, False, None), (plain, True, None), (whole, True, "test photos of its own"), (plain, False, "no test photos, and the data has no val/"),
                                     (whole | {"test": []}, False, "no test photos"), (whole | {"test": plain["val"]}, False, "more than once")):
        ds.write_json(tmp_path / "m.json", manifest)
        if words is None:
            assert ds.read_manifest(tmp_path / "m.json", photos, test=not has_val) == manifest
        else:
            with pytest.raises(ds.InputError, match=words):
                ds.read_manifest(tmp_path / "m.json", photos, test=not has_val)


@pytest.mark.parametrize("name", ["training", "Test", "validation"])
def test_part_of_the_data_is_not_taken_for_a_class(tmp_path, refused, name):
    data = untested(tmp_path / "mine", {"cat": 9, "dog": 9})
    (data / name).mkdir()
    assert f"{name}' is called like a part of the data" in refused("dataset_split.py", "--data", data)


@pytest.mark.parametrize("change", [{"test_fraction": None}, {"test_fraction": "x"}, {"test_fraction": 0.3}, {"test": 5}])
def test_manifest_with_half_a_test_part(tmp_path, change):
    photos = {"cat": [f"cat/{index}.jpg" for index in range(9)], "dog": [f"dog/{index}.jpg" for index in range(9)]}
    rest, test = ds.set_test_aside(photos, 0.2)
    plain = ds.split(rest, 1.0, 0.2, 0)
    for manifest, has_val in ((plain | change, True), (plain | {"test_fraction": 0.2, "test": test} | change, False)):
        ds.write_json(tmp_path / "m.json", manifest)
        if change != {"test_fraction": 0.3} or has_val:
            with pytest.raises(ds.InputError):
                ds.read_manifest(tmp_path / "m.json", photos, test=not has_val)
