"""What people do with it: a trained network used (--evaluate, --predict), and classes of their own."""

import csv
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import dataset_split
import Q3
from conftest import QUICK, ROOT, call, draw_data, draw_photo


@pytest.fixture
def trained(small_network, shared_data, tmp_path):
    """A run's folder."""
    assert call("Q3.py", "--data", shared_data, *QUICK, "--out", "first") == 0
    return tmp_path / "first"


@pytest.fixture
def predicted(capsys, monkeypatch):
    """The rows that --predict prints."""
    def predicted(*words, listed: str = "") -> list[dict]:
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", io.StringIO(listed))
        assert call("Q3.py", "--predict", *words) == 0
        return list(csv.DictReader(io.StringIO(capsys.readouterr().out), delimiter="\t", quoting=csv.QUOTE_NONE))
    return predicted


def read_csv(file: Path) -> list[dict]:
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("flags", [(), ("--recipe", "reference"), ("--from-scratch",)])
def test_evaluate_gives_what_training_gave_to_the_last_digit(flags, small_network, shared_data, capsys):
    quick = QUICK[2:] if flags == ("--from-scratch",) else QUICK
    assert call("Q3.py", "--data", shared_data, *quick, *flags, "--out", "first") == 0
    report = capsys.readouterr().out.split(" photos: accuracy")[1].split("\n\nCheckpoints")[0]
    for out, more in (("again", ()), ("third", ("--data", shared_data / "val", "--no-cache", "--batch-size", 5))):
        assert call("Q3.py", "--evaluate", "first/best.pt", "--out", out, *more) == 0
        assert capsys.readouterr().out.rstrip().endswith(report)
        assert Path(out, "predictions.csv").read_bytes() == Path("first/predictions.csv").read_bytes()
        assert json.loads(Path(out, "test.json").read_text()) | {"same_photos": 0} == json.loads(Path("first/test.json").read_text())
        assert sorted(file.name for file in Path(out).iterdir()) == ["predictions.csv", "test.json"]


def test_evaluate_on_some_of_the_classes(trained, shared_data, data, capsys):
    shutil.rmtree(data / "val" / "Fungi")
    assert call("Q3.py", "--evaluate", trained / "best.pt", "--data", data, "--out", "some") == 0
    assert "Note        only the checkpoint has 'Fungi'" in capsys.readouterr().out
    kept = {row["path"]: row for row in read_csv(trained / "predictions.csv") if row["label"] != "Fungi"}
    assert {row["path"]: row["predicted"] for row in read_csv(Path("some/predictions.csv"))} == {path: row["predicted"] for path, row in kept.items()}
    assert json.loads(Path("some/test.json").read_text())["classes"] == ["Aves", "Fungi", "Insecta"], "the order is the checkpoint's"


def test_evaluate_says_what_it_cannot_use(trained, data, refused, tmp_path, monkeypatch):
    best = trained / "best.pt"
    assert "--out 'first' already holds a run" in refused("Q3.py", "--evaluate", best, "--out", "first")
    (data / "val" / "Aves").rename(data / "val" / "Vögel")
    line = refused("Q3.py", "--evaluate", best, "--data", data, "--out", "other")
    assert "has classes that" in line and "only the checkpoint has 'Aves'; only the folder has 'Vögel'" in line and not Path("other").exists()
    assert "no data folder 'nowhere'" in refused("Q3.py", "--evaluate", best, "--data", "nowhere")
    assert "--evaluate 'nothing.pt': no such file" in refused("Q3.py", "--evaluate", "nothing.pt")
    with monkeypatch.context() as moved:
        moved.setattr("os.path.isdir", lambda place, isdir=os.path.isdir: str(place) != str(torch.load(best, weights_only=True)["options"]["data"]) and isdir(place))
        assert "its photos were in" in (line := refused("Q3.py", "--evaluate", best, "--out", "other")) and "with --data" in line
    assert "a state dict, which --weights takes" in refused("Q3.py", "--evaluate", "small.pth")
    assert "leave --epochs out" in refused("Q3.py", "--evaluate", best, "--epochs", 3)
    draw_photo(data / "val" / "Vögel" / "00.jpg", (1, 2, 3), 1)
    (data / "val" / "Vögel").rename(data / "val" / "Aves")
    (data / "val" / "Aves" / "01.jpg").write_bytes(b"no photo")
    assert "01.jpg' is no photo" in refused("Q3.py", "--evaluate", best, "--data", data, "--out", "other")
    checkpoint = torch.load(best, weights_only=True)
    for key, value, words in (("preprocessing", {}, "prepared in another way"), ("options", {"zeal": 3}, "'zeal'"), ("classes", ["Aves"], "damaged")):
        torch.save({**checkpoint, key: value}, "spoilt.pt")
        assert words in refused("Q3.py", "--evaluate", "spoilt.pt")


def test_evaluate_with_a_spoilt_list_of_test_photos_or_without_a_number_of_workers(trained, shared_data, refused):
    checkpoint = torch.load(trained / "best.pt", weights_only=True)
    torch.save({**checkpoint, "test": 5}, "spoilt.pt")
    assert "damaged" in refused("Q3.py", "--evaluate", "spoilt.pt", "--data", shared_data / "train")
    del checkpoint["options"]["workers"]
    torch.save(checkpoint, "other.pt")
    assert call("Q3.py", "--evaluate", "other.pt", "--no-cache", "--out", "other") == 0


def test_predict_agrees_with_predictions_csv(trained, shared_data, predicted):
    rows = predicted(trained / "best.pt", shared_data / "val")
    assert list(rows[0]) == ["path", "class", "confidence", "class_2", "confidence_2", "class_3", "confidence_3"]
    assert len(rows) == 12
    for row, known in zip(rows, read_csv(trained / "predictions.csv"), strict=True):
        assert row["path"] == str(shared_data / "val" / known["path"]) and row["class"] == known["predicted"]
        assert float(row["confidence"]) == pytest.approx(float(known["confidence"]), abs=1e-4)
        shares = [float(row[key]) for key in ("confidence", "confidence_2", "confidence_3")]
        assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1, abs=2e-4)
        assert {row["class"], row["class_2"], row["class_3"]} == {"Aves", "Fungi", "Insecta"}


def test_predict_needs_nothing_but_the_checkpoint(trained, shared_data, predicted, monkeypatch, tmp_path):
    """Neither the data set nor the weights nor the cache; and it leaves nothing behind."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(trained / "best.pt", elsewhere)
    shutil.copy(next((shared_data / "val").rglob("*.jpg")), elsewhere / "a.jpg")
    monkeypatch.chdir(elsewhere)
    (tmp_path / "small.pth").unlink()
    monkeypatch.setattr(Q3, "find_data", None)
    assert len(predicted("best.pt", "a.jpg")) == 1
    assert sorted(file.name for file in elsewhere.iterdir()) == ["a.jpg", "best.pt"]


def test_network_that_was_trained_on_a_gpu_is_used_without_one(trained, shared_data, predicted, refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    checkpoint = torch.load(trained / "best.pt", weights_only=True)
    torch.save({**checkpoint, "options": {**checkpoint["options"], "device": "cuda"}}, "cuda.pt")
    photo = next(shared_data.rglob("*.jpg"))
    assert predicted("cuda.pt", photo) == predicted(trained / "best.pt", photo)
    assert "--device cuda: this machine" in refused("Q3.py", "--predict", "cuda.pt", photo, "--device", "cuda")


def test_predict_walks_folders_and_reads_lists_and_goes_on_after_damaged_photos(trained, predicted):
    for name in ("deep/er/b.jpg", "deep/c.png", "deep/.hidden.jpg", "odd\tname.jpg"):
        draw_photo(Path(name), (200, 60, 40), 3)
    Path("deep/d.jpg").write_bytes(b"no photo")
    Path("deep/notes.txt").write_text("no photo either")
    Path("empty").mkdir()
    best = trained / "best.pt"
    Path("empty/locked").mkdir()
    rows = predicted(best, "deep", "odd\tname.jpg", "missing.jpg", "empty", "deep/notes.txt")
    assert [(row["path"], row["class"] == "error") for row in rows] == [
        ("deep/c.png", False), ("deep/d.jpg", True), ("deep/er/b.jpg", False), ("odd\\tname.jpg", False), ("missing.jpg", True), ("empty", True), ("deep/notes.txt", True)]
    assert "not there" in rows[4]["confidence"] and "a folder that holds no photos" in rows[5]["confidence"]
    listed = "deep\nodd\tname.jpg\n\nmissing.jpg\nempty\ndeep/notes.txt\n"
    assert predicted(best, listed=listed) == predicted(best, "-", listed=listed) == predicted(best, "--batch-size", 2, listed=listed) == rows
    assert predicted(best, listed="") == []


def test_predict_takes_names_of_any_bytes(trained, predicted, capsys):
    odd = os.fsdecode(b"caf\xe9.jpg")
    draw_photo(Path("plain.jpg"), (200, 60, 40), 3)
    os.rename("plain.jpg", odd)
    rows = predicted(trained / "best.pt", listed=f"{odd}\r\nzero\0byte.jpg\n")
    assert [row["class"] == "error" for row in rows] == [False, True]


def test_predict_says_what_it_cannot_use(trained, refused, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True)
    assert "name photos or folders" in refused("Q3.py", "--predict", trained / "best.pt")
    assert "--predict 'nothing.pt': no such file" in refused("Q3.py", "--predict", "nothing.pt", "a.jpg")
    assert "a folder, not a checkpoint" in refused("Q3.py", "--predict", trained, "a.jpg")
    assert "leave --freeze out" in refused("Q3.py", "--predict", trained / "best.pt", "a.jpg", "--freeze", 3)
    monkeypatch.setattr(Q3, "PROCESSES", 2)
    assert "--predict is for a single process" in refused("Q3.py", "--predict", trained / "best.pt", "a.jpg")


def test_predict_of_two_classes_and_of_a_large_photo(small_network, predicted, tmp_path):
    data = draw_data(tmp_path / "two", classes={"cat": (200, 60, 40), "dog": (60, 80, 210)})
    assert call("Q3.py", "--data", data, *QUICK, "--recipe", "reference", "--out", "two-classes") == 0
    Image.new("L", (900, 300)).save("grey.png")
    row, = predicted("two-classes/best.pt", "grey.png")
    assert list(row) == ["path", "class", "confidence", "class_2", "confidence_2"] and {row["class"], row["class_2"]} == {"cat", "dog"}


# -- photos of one's own ----------------------------------------------------------------------------------------------

def of_ones_own(folder: Path, classes: list[str], count: int = 6) -> Path:
    """Class folders and nothing else."""
    data = draw_data(folder, train=count, val=0, classes=classes)
    for name in classes:
        (data / "train" / name).rename(data / name)
    (data / "train").rmdir()
    return data


def test_class_folders_alone_are_enough(small_network, tmp_path, capsys):
    """A test part is set aside, whatever --fraction and --seed; --evaluate finds the same one; nothing is written into the folder."""
    data = of_ones_own(tmp_path / "mine", ["cat", "dog", "émeu"], 10)
    before = sorted(data.rglob("*"))
    assert call("Q3.py", "--data", data, *QUICK, "--out", "mine-1") == 0
    out = capsys.readouterr().out
    assert "18 training, 6 validation, 6 test; 3 classes" in out and "Test        0.2 of each class, set aside first" in out
    tested = [row["path"] for row in read_csv(Path("mine-1/predictions.csv"))]
    split = json.loads(Path("mine-1/split.json").read_text())
    assert tested == split["test"] and not set(tested) & {*split["train"], *split["val"]}
    assert call("Q3.py", "--data", data, *QUICK, "--seed", 1, "--fraction", 0.5, "--out", "mine-2") == 0
    assert [row["path"] for row in read_csv(Path("mine-2/predictions.csv"))] == tested
    assert call("Q3.py", "--evaluate", "mine-1/best.pt", "--out", "again") == 0
    assert Path("again/predictions.csv").read_bytes() == Path("mine-1/predictions.csv").read_bytes()
    assert call("Q3.py", "--data", data, *QUICK[:2], *QUICK[4:], "--split", "mine-1/split.json", "--out", "mine-3") == 0
    assert Path("mine-3/predictions.csv").read_bytes() == Path("mine-1/predictions.csv").read_bytes()
    assert call("Q3.py", "--resume", "mine-1") == 0 and sorted(data.rglob("*")) == before
    capsys.readouterr()
    assert call("Q3.py", "--data", data, *QUICK, "--test-fraction", 0.5, "--out", "mine-4") == 0
    assert "12 training, 3 validation, 15 test" in capsys.readouterr().out


def test_part_of_the_data_that_is_not_read_is_named(small_network, tmp_path, capsys):
    for part in ("train", "val", "test"):
        of_ones_own(tmp_path / "mine" / part, ["cat", "dog"], 5)
    assert call("Q3.py", "--data", "mine", *QUICK) == 0
    assert f"Note        '{Path('mine/test')}' is not read: test photos belong in val/" in capsys.readouterr().out
    (tmp_path / "mine/test").rename(tmp_path / "mine/notes")
    (tmp_path / "mine/test").touch()
    assert dataset_split.unread_part(tmp_path / "mine") is None
    (tmp_path / "mine/val").rename(tmp_path / "mine/Val")
    found = dataset_split.unread_part(tmp_path / "mine")
    assert found == tmp_path / "mine/Val" if dataset_split.test_folder(tmp_path / "mine") is None else found is None


def test_evaluate_on_other_photos_of_the_same_names_tests_them_all(small_network, tmp_path, capsys, refused):
    """Only where all test photos that were set aside are there is it these photos that are meant."""
    assert call("Q3.py", "--data", of_ones_own(tmp_path / "mine", ["cat", "dog"], 10), *QUICK, "--out", "first") == 0
    others = of_ones_own(tmp_path / "others", ["cat", "dog"], 5)
    for file in others.glob("*/*"):
        ImageOps.mirror(Image.open(file)).save(file)
    capsys.readouterr()
    assert call("Q3.py", "--evaluate", "first/best.pt", "--data", others, "--out", "again") == 0
    assert "Photos      10 test; 2 classes" in capsys.readouterr().out
    assert call("Q3.py", "--evaluate", "first/best.pt", "--out", "third") == 0
    assert "Photos      4 test; 2 classes" in (out := capsys.readouterr().out) and "those set aside before training" in out
    (tmp_path / "mine" / json.loads(Path("first/split.json").read_text())["test"][0]).unlink()
    assert "16 of the photos in" in (line := refused("Q3.py", "--evaluate", "first/best.pt", "--out", "fourth")) and "put these back" in line


def test_run_of_a_version_without_these_options_goes_on(trained, shared_data):
    for name in ("best.pt", "last.pt"):
        checkpoint = torch.load(trained / name, weights_only=True)
        for key in ("demo", "test_fraction"):
            del checkpoint["options"][key]
        del checkpoint["test"]
        torch.save(checkpoint, trained / name)
    config = json.loads((trained / "config.json").read_text())
    del config["options"]["demo"], config["options"]["test_fraction"]
    dataset_split.write_json(trained / "config.json", config)
    assert call("Q3.py", "--evaluate", trained / "best.pt", "--out", "again") == 0
    assert call("Q3.py", "--resume", trained) == 0 and call("Q3.py", "--resume", trained) == 0


@pytest.mark.parametrize("flags, words", [(("--out", "mine/runs/1"), "--out 'mine/runs/1' lies among the class folders"),
                                          (("--out", "mine"), None), (("--cache", "mine/cache"), "--cache 'mine/cache' lies among"), (("--cache", "mine/.cache"), None)])
def test_nothing_is_written_where_it_would_become_a_class(flags, words, small_network, tmp_path, refused):
    of_ones_own(tmp_path / "mine", ["cat", "dog"], 5)
    if words:
        assert words in refused("Q3.py", "--data", "mine", *QUICK, *flags)
        assert sorted(path.name for path in Path("mine").iterdir()) == ["cat", "dog"]
    else:
        assert call("Q3.py", "--data", "mine", *QUICK, *flags) == 0


def test_no_cache_leaves_a_cache_alone_that_is_not_its_own(trained, shared_data):
    Path("here/.cache").mkdir(parents=True)
    Path("here/.cache/precious").touch()
    assert call("Q3.py", "--evaluate", trained / "best.pt", "--no-cache", "--out", "here") == 0
    assert sorted(path.name for path in Path("here").iterdir()) == [".cache", "predictions.csv", "test.json"] and Path("here/.cache/precious").exists()


def test_evaluate_on_what_was_learnt_says_so(trained, shared_data, capsys):
    assert call("Q3.py", "--evaluate", trained / "best.pt", "--data", shared_data / "train", "--out", "flattered") == 0
    assert "Note        30 of the photos are such as the network learnt from or was chosen by" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [(), ("--freeze", 9), ("--from-scratch",)])
def test_two_classes_and_many(flags, small_network, tmp_path):
    quick = QUICK[2:] if flags == ("--from-scratch",) else QUICK
    for count in (2, 40):
        data = of_ones_own(tmp_path / f"{count}", [f"{index:03}" for index in range(count)], 5)
        assert call("Q3.py", "--data", data, *quick, *flags, "--out", f"run-{count}") == 0
        report = json.loads(Path(f"run-{count}/test.json").read_text())
        assert len(report["classes"]) == len(report["confusion"]) == report["photos"] == count


def test_damaged_photo_of_a_test_part_is_not_left_out(small_network, tmp_path, refused):
    data = of_ones_own(tmp_path / "mine", ["cat", "dog"], 10)
    path = dataset_split.set_test_aside(dataset_split.list_photos(data), 0.2)[1][0]
    (data / path).write_bytes(b"no photo")
    line = refused("Q3.py", "--data", data, *QUICK, "--skip-damaged", "--out", "first")
    assert path in line and "Training is done" in line and "--skip-damaged" not in line
    draw_photo(data / path, (200, 60, 40), 3)
    assert call("Q3.py", "--resume", "first") == 0


# -- pictures ---------------------------------------------------------------------------------------------------------

def drawn(out: Path) -> dict[str, Image.Image]:
    return {file.name: Image.open(file) for file in sorted(out.glob("*.png"))}


def has(image: Image.Image, colour: str) -> bool:
    pixels = np.asarray(image.convert("RGB")).astype(int)
    return bool((abs(pixels - np.array([int(colour[place:place + 2], 16) for place in (1, 3, 5)])).sum(-1) < 8).any())


def test_pictures_of_a_run_and_of_an_evaluation(small_network, shared_data, pictures, capsys):
    assert call("Q3.py", "--data", shared_data, *QUICK, "--out", "first") == 0
    images = drawn(Path("first"))
    assert list(images) == ["confusion.png", "curves.png", "mistakes.png", "reliability.png"]
    assert has(images["curves.png"], Q3.BLUE) and has(images["curves.png"], Q3.ORANGE) and has(images["reliability.png"], Q3.BLUE)
    assert call("Q3.py", "--evaluate", "first/best.pt", "--out", "again") == 0
    assert list(drawn(Path("again"))) == ["confusion.png", "mistakes.png", "reliability.png"]
    for name, image in drawn(Path("again")).items():
        assert image.tobytes() == images[name].tobytes(), name
    captured = capsys.readouterr()
    assert not captured.err and "Pictures" not in captured.out


def test_run_without_matplotlib(small_network, shared_data, pictures, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert call("Q3.py", "--data", shared_data, *QUICK, "--out", "first") == 0
    assert "Pictures    none, for want of matplotlib: pip install matplotlib" in capsys.readouterr().out
    assert not list(Path("first").glob("*.png")) and Path("first/predictions.csv").exists()


@pytest.mark.parametrize("classes, right", [(["a", "b"], True), (["$a$", "$\\frac{", "漢字", "x" * 200, "caf\udce9"], False), ([f"{index}" for index in range(150)], False)])
def test_pictures_of_odd_tests(classes, right, pictures, capsys):
    """No mistakes at all, class names that are no plain words, and so many classes that none can be named."""
    count = 2 * len(classes)
    pixels = Q3.Store(Path("stores"), "pixels", ("facts",), count, (8, 8, 3), torch.uint8)
    pixels.write(torch.arange(count), torch.zeros(count, 8, 8, 3, dtype=torch.uint8))
    labels = torch.arange(count) % len(classes)
    photos = Q3.Photos(Q3.FineTuned(Q3.small_cnn(2), 0), pixels, torch.arange(count), labels)
    logits = 9.0 * torch.nn.functional.one_hot(labels if right else labels.flip(0), len(classes)).float()
    Path("out").mkdir()
    Q3.draw_pictures(Path("out"), {"epoch": 1, **Q3.test_report(logits, labels, classes)}, logits, photos)
    assert all(min(image.size) > 200 and len(image.convert("RGB").getcolors(2**24)) > 5 for image in drawn(Path("out")).values())
    assert not capsys.readouterr().err


# -- the demo ---------------------------------------------------------------------------------------------------------

def test_demo_is_learnt(pictures):
    dataset_split.draw_demo(Path("demo"), train=60, test=10)
    assert call("Q3.py", "--demo", "--epochs", 12, "--image-size", 48, "--out", "first") == 0
    report = json.loads(Path("first/test.json").read_text())
    assert report["classes"] == list(dataset_split.PATTERNS) and report["photos"] == 100 and report["accuracy"] > 0.35
    assert len(list(Path("first").glob("*.png"))) == 4
    assert call("Q3.py", "--resume", "first") == 0 and json.loads(Path("first/test.json").read_text()) == report


def test_demo_draws_its_data_once_and_the_same_everywhere(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(Q3, "draw_demo", lambda folder: dataset_split.draw_demo(folder, train=5, test=1))
    assert call("Q3.py", "--demo", "--epochs", 1, "--image-size", 32, "--out", "first") == 0
    pixels = {file.relative_to("demo"): np.asarray(Image.open(file)) for file in sorted(Path("demo").rglob("*.png"))}
    assert len(pixels) == 60 and len({value.tobytes() for value in pixels.values()}) == 60
    made = {file: file.stat().st_mtime_ns for file in Path("demo").rglob("*.png")}
    dataset_split.draw_demo(Path("demo"), train=5, test=1)
    assert made == {file: file.stat().st_mtime_ns for file in Path("demo").rglob("*.png")}
    dataset_split.draw_demo(Path("other"), train=5, test=1)
    assert all((np.asarray(Image.open("other" / name)) == value).all() for name, value in pixels.items())
    assert sum(int(value.astype(int).sum()) for value in pixels.values()) == pytest.approx(114453780, rel=1e-4)
    with monkeypatch.context() as patched:
        patched.setattr(Q3, "PROCESSES", 2)
        assert "--demo is for a single process" in refused("Q3.py", "--resume", "first")
        assert "--download is for a single process" in refused("Q3.py", "--download")
    shutil.rmtree("demo")
    Path("demo").touch()
    assert "'demo' is in the way" in refused("Q3.py", "--demo", "--out", "second")
    assert "leave --data out" in refused("Q3.py", "--demo", "--data", "photos")
    assert "leave --weights out" in refused("Q3.py", "--demo", "--weights", "none")


def test_demo_that_cannot_be_drawn_leaves_nothing(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(dataset_split, "draw_picture", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert "--demo can't draw its pictures in 'demo': No space left" in refused("Q3.py", "--demo")
    assert not list(tmp_path.iterdir())


# -- the README's tour ------------------------------------------------------------------------------------------------

def test_commands_of_the_tour_do_what_it_says(small_network, monkeypatch, capsys):
    """From the demo to a network of one's own, typed in its order; with few pictures and a small network."""
    monkeypatch.setattr(Q3, "draw_demo", lambda folder: dataset_split.draw_demo(folder, train=5, test=1))
    monkeypatch.setattr(Q3, "initial_state", lambda spec: load("small.pth") if spec != "none" else None)
    for name in ("inaturalist_12k", "other_photos"):
        draw_data(Path(name), train=30)
    Path("other_photos/val").rename("test")
    shutil.rmtree("other_photos")
    Path("test").rename("other_photos")
    of_ones_own(Path("my_photos"), ["cat", "dog"])
    for name in ("frog.jpg", "holiday/1.jpg", "new_photos/2.jpg"):
        draw_photo(Path(name), (200, 60, 40), 3)
    os.utime("frog.jpg", (0, 0))
    text = (ROOT / "README.md").read_text()
    lines = re.findall(r"^    (.*python .*)$", text[text.index("## A tour"):text.index("## The data")], re.MULTILINE)
    assert len(lines) == 11
    for line in lines:
        listing, _, command = line.rpartition(" | ")
        monkeypatch.setattr("sys.stdin", io.StringIO(subprocess.check_output(listing, shell=True, text=True) if listing else ""))
        script, *words = shlex.split(command.split(" > ")[0])[1:]
        quick = () if script != "Q3.py" or {"--predict", "--evaluate"} & set(words) else ("--image-size", 32, "--epochs", 1, "--device", "cpu", "--amp", "off")
        capsys.readouterr()
        assert call(script, *words, *quick) == 0, line
        out = capsys.readouterr().out
        if "--predict" in words:
            assert out.startswith("path\tclass\tconfidence") and "error" not in out and len(out.splitlines()) == 1 + {"demo/val/Rings": 1, "holiday": 2}.get(words[-1], 1)
    assert sorted(folder.name for folder in Path("runs").iterdir()) == ["again", "demo", "first", "mine", "other", "quick"]
    assert Path("runs/again/predictions.csv").read_bytes() == Path("runs/first/predictions.csv").read_bytes()


def load(file: str) -> dict:
    return torch.load(file, weights_only=True)
