"""Q3.py: weights and checkpoints, interrupted runs, several processes, trained networks in use."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path
from urllib.error import URLError

import benchmark_kills
import numpy as np
import pytest
import torch
import torchvision
from conftest import (
    COLOURS,
    QUICK,
    ROOT,
    call,
    draw_data,
    draw_photo,
    forked,
    load,
    read_csv,
    small_resnet,
    type_command,
)
from PIL import Image

import dataset_split
import Q3


def cut_off(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[:-200])
    return file


def saved(value, name: str = "w.pth") -> Path:
    torch.save(value, name)
    return Path(name)


def flipped(file: Path, found: bytes) -> Path:
    """Change one bit in the first place where the file holds these bytes."""
    content = bytearray(file.read_bytes())
    content[content.index(found)] ^= 4
    file.write_bytes(content)
    return file


class Malicious:
    def __reduce__(self):
        return exec, ("open('executed', 'w')",)


# -- Weights ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("make, words", [
    (lambda: "nowhere.pth", "is not a file, nor one of IMAGENET1K_V1, IMAGENET1K_V2"),
    (lambda: ".", "is not a file"),
    (lambda: cut_off(saved({"a": torch.zeros(99)})), "a file of tensors"),
    (lambda: (Path("w.pth").write_text("a poem"), "w.pth")[1], "a file of tensors"),
    (lambda: saved(Malicious()), "exec"),
    (lambda: flipped(saved({"a": torch.ones(99)}), b"\0\0\x80\x3f" * 9), "damaged in its part 'w/"),
    (lambda: saved(torch.zeros(3)), "of a resnet50"), (lambda: saved({}), "of a resnet50"),
    (lambda: saved({5: "x"}), "of a resnet50"), (lambda: saved([1]), "of a resnet50"),
    (lambda: saved(torchvision.models.mobilenet_v3_small().state_dict()), "of a resnet50"),
    (lambda: saved(torchvision.models.wide_resnet50_2().state_dict()), "size mismatch for layer1")])
def test_weights_that_are_none_of_a_resnet50(shared_data, refused, make, words):
    line = refused("Q3.py", "--data", shared_data, "--weights", make(), "--fraction", 1.0)
    assert words in line and not Path("executed").exists() and not Path("runs").exists()


def test_weights_come_from_a_file_in_whatever_it_is_wrapped(small_network):
    state = load("small.pth")
    for value in (state, {"model": state, "epoch": 3}, {"state_dict": state}):
        network = Q3.build_network(*Q3.read_weights(str(saved(value))), 7)
        assert network.fc.weight.shape == (7, 512) and network.fc.weight.abs().max() <= 512 ** -0.5
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items()
                   if not name.startswith("fc."))
    noise = Q3.build_network("resnet50", None, 7).state_dict()
    assert not torch.equal(noise["conv1.weight"], state["conv1.weight"])


def test_weights_by_name_are_fetched_once_and_then_read_like_a_file(small_network, monkeypatch,
                                                                    refused, shared_data):
    asked, place = [], Path("hub/checkpoints/resnet50-0676ba61.pth")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: "hub")
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, file, start: (
        asked.append((url[-12:], start)), shutil.copy("small.pth", file)))
    assert Q3.get_args([]).weights == "IMAGENET1K_V2"
    for _ in range(2):
        state = Q3.build_network(*Q3.read_weights("IMAGENET1K_V1"), 3).state_dict()
        assert torch.equal(state["conv1.weight"], load("small.pth")["conv1.weight"])
    assert asked == [("0676ba61.pth", "0676ba61")]
    for spoil in (lambda: cut_off(place), lambda: saved(Malicious(), place)):
        spoil()
        with pytest.raises(dataset_split.InputError, match=r"0676ba61\.pth' can't be used"):
            Q3.read_weights("IMAGENET1K_V1")
    assert not Path("executed").exists()

    def offline(*_):
        raise URLError("Name or service not known")
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    line = refused("Q3.py", "--data", shared_data, "--fraction", 1.0)
    assert "https://download.pytorch.org/models/resnet50-11ad3fa6.pth and give --weights" in line


@pytest.mark.parametrize("wrap", [
    lambda state: {f"module.{name}": value for name, value in state.items()},
    lambda state: {"model": "resnet50", "state_dict": {f"net.{k}": state[k] for k in state}},
    lambda state: {"model": {f"_orig_mod.module.{k}": v for k, v in state.items()}},
    lambda state: {"model_state_dict": state, "optimizer": {"state": {}}}])
def test_weights_that_other_tools_wrapped(small_network, wrap):
    saved(wrap(state := load("small.pth")), Path("wrapped.pth"))
    network = Q3.build_network(*Q3.read_weights("wrapped.pth"), 3)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items()
               if not name.startswith("fc."))


# -- Photos that are damaged, or twice there -------------------------------------------------------

def split_of(data: Path) -> dict:
    return dataset_split.split(dataset_split.list_photos(data / "train"), 1.0, 0.2, 0)


def test_damaged_photos_are_left_out_and_listed(quick_run, data, capsys):
    split = split_of(data)
    cut_off(data / "train" / (in_train := split["train"][3]))
    (data / "train" / (in_val := split["val"][1])).write_text("a poem")
    out = quick_run("out", data=data)
    rows = {row["path"]: row["problem"] for row in read_csv(out / "damaged.csv")}
    assert rows.keys() == {str(data / "train" / path) for path in (in_train, in_val)}
    assert all("photo" in problem for problem in rows.values())
    assert re.search(r"LEFT OUT    2 damaged, e.g. .*: out.damaged.csv", capsys.readouterr().out)
    assert load(out / "last.pt")["checksums"].keys() == (
        {*split["train"], *split["val"]} - {in_train, in_val})
    before = benchmark_kills.result(out)
    assert call("Q3.py", "--resume", out / "last.pt") == 0
    assert benchmark_kills.equal(benchmark_kills.result(out), before)


@pytest.mark.parametrize("spoil, words", [
    (lambda data: (data / "val/Aves/01.jpg").write_text("a poem"), "1 damaged test photos"),
    (lambda data: [file.write_bytes(b"") for file in data.glob("train/Fungi/*")], "damaged train"),
    (lambda data: [cut_off(data / "train" / path) for path in split_of(data)["val"]
                   if path.startswith("Fungi")], "replace 2 damaged val photos"),
    (lambda data: shutil.rmtree(data), dataset_split.ARCHIVE),
    (lambda data: shutil.rmtree(data / "val/Fungi"), "only one has 'Fungi'")])
def test_photos_without_which_there_is_no_run(small_network, data, refused, spoil, words):
    spoil(data)
    assert words in refused("Q3.py", "--data", data, *QUICK, "--out", "out")
    assert not Path("out/last.pt").exists()


def test_photos_of_one_colour_are_counted_and_the_first_is_named(quick_run, data, capsys):
    split = split_of(data)
    for path in (split["train"][3], split["train"][9]):
        Image.new("RGB", (48, 36), (7, 8, 9)).save(data / "train" / path)
    quick_run("out", data=data)
    said = capsys.readouterr().out
    assert f"\nONE COLOUR  2 photos in train, e.g. '{split['train'][3]}': check them\n" in said


def test_same_photos_in_two_parts_or_classes_are_reported(quick_run, data, capsys):
    split = split_of(data)
    aves, fungi, held_out = ([path for path in split[part] if path.startswith(name)] for part, name
                             in (("train", "Aves"), ("train", "Fungi"), ("val", "Aves")))
    for source, copy in ((aves[0], held_out[0]), (aves[1], fungi[0]), (aves[2], aves[3])):
        shutil.copy(data / "train" / source, data / "train" / copy)
    shutil.copy(data / "train" / aves[4], data / "val/Aves/02.jpg")
    rows = read_csv(quick_run("out", data=data) / "same_photos.csv")
    assert {tuple(row.values()) for row in rows} == {
        (aves[0], "train", held_out[0], "val"), (aves[1], "train", fungi[0], "train"),
        (aves[4], "train", "Aves/02.jpg", "test")}
    assert "Copies      3 in other parts or classes" in capsys.readouterr().out


# -- Interrupted and resumed runs ------------------------------------------------------------------

def interrupt(monkeypatch, owner, name: str, number: int) -> None:
    """Send this process SIGINT when the function is called for the so-manieth time, not counting
    calls for files of the cache."""
    function, calls = getattr(owner, name), iter(range(1, 1000))
    def interrupted(*args, **options):
        if not str(args[:1]).startswith("(PosixPath('.cache") and next(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return function(*args, **options)
    monkeypatch.setattr(owner, name, interrupted)


@pytest.fixture(scope="module")
def left_alone(shared_data, small_weights, tmp_path_factory):
    """What a run of two epochs ends with that nobody interrupts."""
    ends = {}
    def left_alone(recipe: str) -> dict:
        if recipe not in ends:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Q3, "resnet50", small_resnet)
                patch.chdir(tmp_path_factory.mktemp("alone"))
                assert call("Q3.py", "--data", shared_data, "--weights", small_weights, *QUICK[2:],
                            "--epochs", 2, "--recipe", recipe, "--out", "out") == 0
                ends[recipe] = benchmark_kills.result(Path("out"))
        return ends[recipe]
    return left_alone


def ends_like(out: str | Path, expected: dict) -> bool:
    """Whether a run ended with these bits. (The weights may be named by another path.)"""
    found = benchmark_kills.result(Path(out))
    for name in ("best.pt", "last.pt"):
        found[name]["options"]["weights"] = expected[name]["options"]["weights"]
    return benchmark_kills.equal(found, expected)


SCALER = torch.amp.GradScaler


@pytest.mark.parametrize("recipe", ["tuned", "reference"])
@pytest.mark.parametrize("owner, name, number", [
    (Q3, "read_photo", 5), (Q3, "fit_head", 1), (SCALER, "step", 2), (SCALER, "step", 5),
    (Q3, "fit_temperature", 1), (Q3, "best_epoch", 2), (os, "replace", 1), (os, "replace", 3),
    (os, "replace", 5), (os, "fsync", 1), (os, "fsync", 3), (Q3, "write_csv", 2),
    (Q3, "score", 1)])
def test_interrupted_run_ends_as_one_left_alone(small_network, shared_data, left_alone, monkeypatch,
                                                capsys, recipe, owner, name, number):
    words = ("--data", shared_data, *QUICK, "--epochs", 2, "--recipe", recipe)
    with monkeypatch.context() as patch:
        interrupt(patch, owner, name, number)
        code = call("Q3.py", *words, "--out", "out")
    if code == 0:
        assert recipe == "reference" and name == "fit_head"
    else:
        said, going = capsys.readouterr().err, Path("out/last.pt").exists()
        assert code == 130 and said.count("\n") == 1 and not list(Path().glob("out/*.tmp"))
        assert re.search(r"resume with: python \S+ --resume out\n$" if going else
                         r"nothing was saved, run the command again\n$", said)
        assert call("Q3.py", *(("--resume", "out") if going else (*words, "--out", "out"))) == 0
    assert ends_like("out", left_alone(recipe))


def test_resumed_run_may_move_and_use_another_cache_and_precision(small_network, data, monkeypatch,
                                                                  left_alone, refused):
    words = ("--data", data, *QUICK, "--epochs", 2)
    with monkeypatch.context() as patch:
        interrupt(patch, SCALER, "step", 5)
        assert call("Q3.py", *words, "--out", "out") == 130
    data.rename("moved")
    Path("small.pth").unlink()
    Path("out").rename("elsewhere")
    options = load("elsewhere/last.pt")["options"] | {"amp": "fp16"}  # as on a GPU
    changed(Path("elsewhere/last.pt"), options=options)
    assert "give --amp bf16 or off" in refused("Q3.py", "--resume", "elsewhere", "--data", "moved")
    Path("sub").mkdir()
    monkeypatch.chdir("sub")
    assert call("Q3.py", "--resume", "../elsewhere", "--data", "../moved", "--cache", "new",
                "--workers", 2, "--amp", "off") == 0
    assert ends_like("../elsewhere", left_alone("tuned"))


def test_finished_run_is_resumed_to_the_same_end(quick_run):
    before = benchmark_kills.result(out := quick_run("out"))
    (out / "test.json").unlink()
    (out / "split.json").rename("split.json")
    (out / "config.json").write_text("for people: nothing reads it back")
    for name in (".last.pt.12.tmp", ".best.pt.12.tmp", ".history.csv.12.tmp", "notes.tmp"):
        (out / name).touch()
    assert call("Q3.py", "--resume", out) == 0
    assert [file.name for file in out.glob("*.tmp")] == ["notes.tmp"], "a kill's leftovers are gone"
    Path("split.json").rename(out / "split.json")
    assert benchmark_kills.equal(benchmark_kills.result(out), before)


def changed(file: Path, **values) -> None:
    torch.save(load(file) | values, file)


@pytest.mark.parametrize("spoil, words", [
    (lambda data, out: draw_photo(data / "train/Aves/03.jpg", (0, 0, 0), 77),
     "1 photos or Pillow changed since the start, e.g. 'Aves/03.jpg'"),
    (lambda data, out: (data / "train/Aves/03.jpg").unlink(), "'Aves/03.jpg'"),
    (lambda data, out: shutil.rmtree(out), "last.pt' can't be read"),
    (lambda data, out: (out / "last.pt").unlink(), "last.pt' can't be read"),
    (lambda data, out: cut_off(out / "last.pt"), "a file of tensors"),
    (lambda data, out: changed(out / "last.pt", format=6), "has no optimizer that this version"),
    (lambda data, out: saved(load(out / "last.pt")["model"], out / "last.pt"),
     "has no optimizer that this version can use"),
    (lambda data, out: saved([1], out / "last.pt"), "has no optimizer that this version"),
    (lambda data, out: shutil.copy(out / "best.pt", out / "last.pt"), "has no optimizer that"),
    (lambda data, out: saved(Malicious(), out / "last.pt"), "a file of tensors"),
    (lambda data, out: flipped(out / "last.pt", load(out / "last.pt")["model"]["fc.weight"]
                               .numpy().tobytes()[:64]), "damaged in its part ")])
def test_run_that_cannot_be_resumed(quick_run, data, refused, monkeypatch, spoil, words):
    with monkeypatch.context() as patch:
        interrupt(patch, Q3, "train_epoch", 2)
        with suppress(AssertionError):
            quick_run("out", "--epochs", 2, data=data)
    spoil(data, Path("out"))
    line = refused("Q3.py", "--resume", "out", "--data", data)
    assert words in line and not Path("executed").exists()


def test_best_pt_of_another_epoch_is_not_tested(quick_run, shared_data, refused, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, Q3, "score", 1)
        with suppress(AssertionError):
            quick_run("out")
    changed(Path("out/best.pt"), epoch=9)
    assert "best.pt' is not of the best epoch" in refused(
        "Q3.py", "--resume", "out", "--data", shared_data)
    assert not Path("out/test.json").exists()


@pytest.mark.parametrize("name", ["last.pt", "test.json"])
def test_out_that_holds_a_run_or_can_be_no_folder(small_network, shared_data, refused, name):
    Path("out").mkdir()
    Path("out", name).write_text("earlier")
    flags = ("--data", shared_data, *QUICK, "--out")
    assert "'out' has a run already" in refused("Q3.py", *flags, "out")
    assert os.listdir("out") == [name] and Path("out", name).read_text() == "earlier"
    for out in (Path("out", name), Path("out", name, "inside")):
        assert "can't be the run's folder" in refused("Q3.py", *flags, out)


def test_a_run_that_is_going_on_is_left_alone(quick_run, shared_data, refused):
    out = quick_run("out")
    lock = dataset_split.claim_folder(out, resume=True)  # as another process would
    before = sorted(out.iterdir())
    assert "a run is going on in 'out'" in refused("Q3.py", "--resume", "out")
    assert sorted(out.iterdir()) == before
    os.close(lock)
    assert call("Q3.py", "--resume", "out") == 0 and not (out / ".lock").exists()


@pytest.mark.parametrize("name, number", [("replace", 5 + 2), ("fsync", 5 + 3)])
def test_full_disk_while_saving_keeps_the_last_good_checkpoint(
        small_network, shared_data, left_alone, refused, monkeypatch, name, number):
    function, calls = getattr(os, name), iter(range(1, 99))
    def full(*args):
        if not str(args[0]).startswith(".cache") and next(calls) == number:
            raise OSError(28, "No space left on device")
        return function(*args)
    words = ("--data", shared_data, *QUICK, "--epochs", 2)
    with monkeypatch.context() as patch:
        patch.setattr(os, name, full)
        line = refused("Q3.py", *words, "--out", "out")
    assert re.search("can't be written: .*No space left on device", line)
    assert load("out/last.pt")["epoch"] in (0, 1) and not list(Path("out").glob("*.tmp"))
    assert call("Q3.py", "--resume", "out") == 0 and ends_like("out", left_alone("tuned"))


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("2 GiB"), MemoryError(), RuntimeError("can't start new thread")])
def test_out_of_memory_says_what_to_try(small_network, shared_data, monkeypatch, refused, error):
    def full(*_):
        raise error
    monkeypatch.setattr(Q3, "train_epoch", full)
    line = refused("Q3.py", "--data", shared_data, *QUICK, "--out", "out")
    assert f"too little memory or threads ({error}): lower --workers, or in a" in line
    error = RuntimeError("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        call("Q3.py", "--data", shared_data, *QUICK)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_as_a_scheduler_sends_them(shared_data, tmp_path, number):
    running = type_command("Q3.py", "--data", shared_data, *QUICK[2:], "--from-scratch", "--epochs",
                           4000, "--out", "a run", cwd=tmp_path, start=subprocess.Popen)
    while "    1 |" not in (line := running.stdout.readline()):
        assert line, running.stderr.read()
    running.send_signal(number)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130 and errors == (
        f"Q3.py: interrupted: resume with: python {ROOT / 'Q3.py'} --resume 'a run'\n")
    assert load("a run/last.pt")["epoch"] >= 1


def test_two_runs_at_once_share_a_cache(small_network, shared_data):
    words = ("--data", shared_data, *QUICK, "--epochs", 2)
    both = [forked(*words, "--out", name) for name in ("one", "two")]
    assert [running.wait() for running in both] == [0, 0]
    assert forked(*words, "--cache", "own", "--out", "alone").wait() == 0
    alone = benchmark_kills.result(Path("alone"))
    assert all(benchmark_kills.equal(benchmark_kills.result(Path(name)), alone)
               for name in ("one", "two"))


# -- Several processes -----------------------------------------------------------------------------

@pytest.mark.parametrize("processes, precision", [(2, "off"), (2, "bf16"), (4, "off")])
def test_several_processes_give_the_result_of_one(quick_run, data, processes, precision):
    """Four of them with 3 validation photos, so that one has none."""
    if processes == 4:
        for file in data.glob("train/*/0[5-9].jpg"):
            file.unlink()
    flags = ("--epochs", 2, "--amp", precision, "--lr-head", 1e-5, "--lr-backbone", 1e-7)
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    cache = "none" if processes == 4 else "other"
    running = [forked("--data", data, *QUICK, *flags, "--out", "both", "--cache", cache,
                      rank=rank, of=processes, port=port) for rank in range(processes)]
    alone, said = quick_run("alone", *flags, data=data), Path("output.txt").read_text
    assert [each.wait() for each in running] == [0] * processes, said()
    assert f"processes: {processes}" in said() and "Warning" not in said()
    assert said().count("Epoch |") == said().count("Test of epoch") == 1
    tolerance = 1e-3 if precision == "off" else 5e-2
    for one, two in zip(read_csv(alone / "history.csv"), read_csv("both/history.csv"), strict=True):
        for key in ("train_loss", "train_acc", "val_loss", "val_acc"):
            assert float(one[key]) == pytest.approx(float(two[key]), rel=tolerance, abs=3e-4), key
    one, two = ({row["path"]: float(row["confidence"]) for row in read_csv(out / "predictions.csv")}
                for out in (alone, Path("both")))
    assert one == pytest.approx(two, abs=tolerance)
    one, two = (load(out / "last.pt")["optimizer"]["state"] for out in (alone, Path("both")))
    for key in one:  # the mean gradient: Adam's steps are the same for any multiple of it
        mean = one[key]["exp_avg"]
        assert (mean - two[key]["exp_avg"]).norm() < 100 * tolerance * mean.norm()


def test_error_of_one_process_is_said_once(data, weights, tmp_path):
    """As torchrun starts them; its own report comes after that line."""
    (data / "val/Fungi/01.jpg").write_text("a poem")
    done = type_command("-m torch.distributed.run --standalone", "--nproc-per-node=2",
                        ROOT / "Q3.py", "--data", data, "--weights", weights, *QUICK[2:], "--out",
                        "out", cwd=tmp_path)
    assert done.returncode != 0 and done.stderr.count("damaged test photos") == 1
    assert re.search(r"^Q3.py: .*Fungi/01.jpg' can't be read", done.stderr, re.MULTILINE)


def test_what_several_processes_cannot_do(small_network, shared_data, monkeypatch, refused):
    monkeypatch.setattr(Q3, "WORLD_SIZE", 2)
    monkeypatch.setattr(Q3, "from_rank_0", lambda function, *args: function(*args))
    args = Q3.get_args([*map(str, ("--data", shared_data, *QUICK, "--recipe", "reference"))])
    with pytest.raises(dataset_split.InputError, match="start it without torchrun"):
        Q3.fine_tune(args)


# -- A trained network in use ----------------------------------------------------------------------

@pytest.fixture
def trained(quick_run):
    return quick_run("first")


@pytest.fixture
def predicted(capsys):
    """The rows that --predict prints."""
    def predicted(*words) -> list[list[str]]:
        capsys.readouterr()
        assert call("Q3.py", "--predict", *words) == 0
        rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
        assert rows[0][:3] == ["path", "class", "confidence"]
        return rows[1:]
    return predicted


@pytest.mark.parametrize("flags", [(), ("--recipe", "reference"), ("--from-scratch",)])
def test_evaluate_gives_what_training_gave_to_the_digit(flags, small_network, shared_data, capsys):
    quick = QUICK[2:] if flags == ("--from-scratch",) else QUICK
    assert call("Q3.py", "--data", shared_data, *quick, *flags, "--out", "first") == 0
    report = capsys.readouterr().out.split("\nTest of epoch")[1].split("\n\nResults")[0]
    for out, *more in (["again"], ["third", "--data", shared_data / "val", "--cache", "none"]):
        assert call("Q3.py", "--evaluate", "first/best.pt", "--out", out, *more) == 0
        assert report in capsys.readouterr().out
        assert sorted(os.listdir(out)) == ["predictions.csv", "test.json"]
        for name in os.listdir(out):
            assert Path(out, name).read_bytes() == Path("first", name).read_bytes()


def test_evaluate_on_other_photos(trained, shared_data, data, refused, capsys):
    best, other = trained / "best.pt", ("--data", data, "--out", "other")
    assert call("Q3.py", "--evaluate", best, "--data", shared_data / "train", "--out", "own") == 0
    said = capsys.readouterr().out
    assert f"Photos      30 of 30 in '{shared_data / 'train'}'" in said
    assert "Note        30 of the photos were in training" in said
    shutil.rmtree(data / "val/Fungi")
    assert call("Q3.py", "--evaluate", best, "--data", data, "--out", "some") == 0
    assert "were in training" not in capsys.readouterr().out
    assert read_csv("some/predictions.csv") == [
        row for row in read_csv(trained / "predictions.csv") if row["label"] != "Fungi"]
    assert json.loads(Path("some/test.json").read_text())["classes"] == list(COLOURS)
    (data / "val/Aves").rename(data / "val/Vögel")
    line = refused("Q3.py", "--evaluate", best, *other)
    assert "classes that the network has not learnt, e.g. 'V" in line
    shutil.rmtree(data / "val/Vögel")
    (data / "val/Insecta/01.jpg").write_bytes(b"no photo")
    assert "01.jpg' can't be read" in refused("Q3.py", "--evaluate", best, *other)
    assert "has a run already" in refused("Q3.py", "--evaluate", best, "--out", "first")
    assert "'nothing.pt' can't be read" in refused("Q3.py", "--evaluate", "nothing.pt")
    assert "try it as --weights" in refused("Q3.py", "--evaluate", "small.pth")


def test_predict_agrees_with_predictions_csv(trained, shared_data, predicted):
    rows, known = predicted(trained / "best.pt", shared_data / "val"), read_csv(
        trained / "predictions.csv")
    for (path, *cells), row in zip(rows, known, strict=True):
        assert path == str(shared_data / "val" / row["path"]) and cells[0] == row["predicted"]
        assert float(cells[1]) == pytest.approx(float(row["confidence"]), abs=1e-4)
        shares = list(map(float, cells[1::2]))
        assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1, abs=2e-4)
        assert set(cells[::2]) == COLOURS.keys()


def test_predict_walks_folders_and_goes_on_after_damaged_photos(trained, predicted, refused,
                                                                capsys):
    """And needs nothing but the checkpoint, and leaves nothing behind."""
    for name in ("deep/er/b.jpg", "deep/c.png", "deep/.hidden.jpg", "odd\tname.jpg", "-x.jpg"):
        draw_photo(Path(name), (200, 60, 40), 3)
    os.rename("odd\tname.jpg", odd := os.fsdecode(b"caf\xe9\t.jpg"))
    Path("deep/d.jpg").write_bytes(b"no photo")
    Path("deep/notes.txt").write_text("no photo either")
    Path("empty").mkdir()
    Path("small.pth").unlink()
    (trained / "best.pt").rename("best.pt")
    before = sorted(Path().rglob("*"))
    places = ["deep", odd, "missing.jpg", "empty", "deep/notes.txt"]
    rows = predicted("best.pt", *places)
    assert [(row[0], row[1] == "error") for row in rows] == [
        ("deep/c.png", False), ("deep/d.jpg", True), ("deep/er/b.jpg", False),
        ("caf\\udce9 .jpg", False), ("missing.jpg", True), ("empty", True),
        ("deep/notes.txt", True)]
    assert predicted("best.pt", *places, "--batch-size", 2) == rows
    names = ["-x.jpg", str(Path("-x.jpg").resolve())]
    assert [row[0] for row in predicted("best.pt", "--", *names)] == names
    assert call("Q3.py", "--predict", "best.pt", "deep") == 0
    assert capsys.readouterr().err == "Left out    files in 'deep': 1 .txt\n"
    for photos in (("empty", "x.jpg"), ()):
        assert "no photo given or readable" in refused("Q3.py", "--predict", "best.pt", *photos)
    assert sorted(Path().rglob("*")) == before


def test_network_that_was_trained_on_a_gpu_is_used_without_one(trained, shared_data, predicted,
                                                               refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    checkpoint, photo = load(trained / "best.pt"), next(shared_data.rglob("*.jpg"))
    changed(trained / "best.pt", options=checkpoint["options"] | {"device": "cuda", "amp": "fp16"})
    assert "on cpu give --amp bf16 or off" in refused("Q3.py", "--predict", trained / "best.pt",
                                                      photo)
    assert len(predicted(trained / "best.pt", photo, "--amp", "off")) == 1
    words = ("--predict", trained / "best.pt", photo)
    assert "--device cuda: 0 of 1 found, try cpu" in refused("Q3.py", *words, "--device", "cuda")
    assert "a file of tensors" in refused("Q3.py", "--predict", photo, photo)


def of_ones_own(folder: Path, classes, count: int = 6) -> Path:
    """Class folders and nothing else."""
    data = draw_data(folder, train=count, val=0, classes=classes)
    for place in (data / "train").iterdir():
        place.rename(data / place.name)
    (data / "train").rmdir()
    return data


def test_class_folders_alone_are_enough(quick_run, tmp_path, capsys, refused):
    """A test part is set aside, whatever the seed; --evaluate finds it; the folder stays as is."""
    data = of_ones_own(tmp_path / "mine", ["cat", "dog", "émeu"], 10)
    before = sorted(data.rglob("*"))
    first = quick_run("mine-1", data=data)
    assert "18 train, 6 val, 6 test" in capsys.readouterr().out
    tested, split = read_csv(first / "predictions.csv"), load(first / "best.pt")["split"]
    assert sorted(row["path"] for row in tested) == split["test"]
    assert not set(split["test"]) & {*split["train"], *split["val"]}
    second = quick_run("mine-2", "--seed", 1, "--fraction", 0.5, data=data)
    assert load(second / "best.pt")["split"]["test"] == split["test"]
    assert call("Q3.py", "--evaluate", first / "best.pt", "--out", "again") == 0
    assert read_csv("again/predictions.csv") == tested
    capsys.readouterr()
    other = of_ones_own(tmp_path / "other", ["cat", "dog", "émeu"], 9)  # of the same names
    assert call("Q3.py", "--evaluate", first / "best.pt", "--data", other, "--out", "others") == 0
    assert f"Photos      27 of 27 in '{other}'" in capsys.readouterr().out
    assert call("Q3.py", "--data", data, *QUICK[:2], *QUICK[4:], "--split", first / "split.json",
                "--out", "mine-3") == 0
    assert read_csv("mine-3/predictions.csv") == tested and sorted(data.rglob("*")) == before
    capsys.readouterr()
    quick_run("mine-4", "--test-fraction", 0.5, data=data)
    assert "12 train, 3 val, 15 test" in capsys.readouterr().out
    for flags in (("--out", "mine/runs/first"), ("--cache", "mine/cache", "--out", "out")):
        assert "would be taken for a class" in refused("Q3.py", "--data", data, *QUICK, *flags)
        assert sorted(data.rglob("*")) == before
    quick_run("mine-5", "--cache", "mine/.cache", data=data)
    two = of_ones_own(tmp_path / "two", ["cat", "dog"])
    assert len(predictions := read_csv(quick_run("two-classes", data=two) / "predictions.csv")) == 2
    assert {row["predicted"] for row in predictions} <= {"cat", "dog"}


# -- The test's figures, and pictures --------------------------------------------------------------

def test_report_counts_by_hand():
    labels, predicted = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 0, 1, 1, 0, 1])
    logits = torch.nn.functional.one_hot(predicted, 3).float() * 9
    report = Q3.test_report(logits, labels, ["a", "b", "c"], 1.0)
    assert report["confusion"] == [[2, 1, 0], [1, 1, 0], [0, 1, 0]] and report["accuracy"] == 0.5
    for row, counts in zip(report["per_class"].values(), ((2, 3), (1, 2), (0, 1))):
        assert row.pop("recall_interval_95") == Q3.wilson_interval(*counts)
    assert list(report["per_class"].values()) == [
        pytest.approx({"photos": 3, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3}),
        pytest.approx({"photos": 2, "precision": 1 / 3, "recall": 1 / 2, "f1": 0.4}),
        {"photos": 1, "precision": 0, "recall": 0, "f1": 0}]
    assert Q3.wilson_interval(80, 100) == pytest.approx((0.7112, 0.8666), abs=1e-4)
    assert Q3.wilson_interval(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    # Two photos at 0.9, one of them right, and two at 0.6, both right: off by 0.4 and by 0.4
    logits, labels = torch.tensor([[9.0, 1], [9, 1], [6, 4], [4, 6]]).log(), torch.arange(4) % 2
    for temperature in (1.0, 2.0):
        report = Q3.test_report(logits * temperature, labels, ["a", "b"], temperature)
        assert report["calibration_error"] == pytest.approx(0.4, abs=1e-6)
        loss = torch.nn.functional.cross_entropy(logits * temperature, labels)
        assert report["loss"] == pytest.approx(loss.item()), "that of the network as it is"


def test_pictures_are_drawn(quick_run, shared_data, pictures, monkeypatch, capsys):
    sizes = {file.name: Image.open(file).size for file in quick_run("first").glob("*.png")}
    assert sizes.keys() == {"confusion.png", "curves.png", "mistakes.png", "reliability.png"}
    assert min(min(size) for size in sizes.values()) > 200
    assert call("Q3.py", "--evaluate", "first/best.pt", "--out", "again") == 0
    assert {file.name for file in Path("again").glob("*.png")} == sizes.keys() - {"curves.png"}
    captured = capsys.readouterr()
    assert not captured.err and "matplotlib" not in captured.out
    monkeypatch.setattr(Q3, "HAS_MATPLOTLIB", False)
    out = quick_run("second")
    assert capsys.readouterr().out.count("(pictures: pip install matplotlib)") == 1
    assert not list(out.glob("*.png")) and (out / "test.json").exists()


@pytest.mark.parametrize("classes, right", [
    (["a", "b"], True), (["$a$", "$\\frac{", "漢字", "x" * 200, "caf\udce9"], False),
    ([f"{index}" for index in range(150)], False)])
def test_pictures_of_odd_tests(shared_data, pictures, capsys, classes, right):
    """No mistakes at all, class names that are no plain words, and too many classes to name."""
    labels = torch.arange(2 * len(classes)) % len(classes)
    logits = torch.nn.functional.one_hot(labels if right else labels.flip(0), len(classes)).float()
    cache = Q3.Cache(Path("cache"), ["x"] * len(labels), (64, 64, 3), torch.uint8)
    Path("cache/x").write_bytes(bytes(64 * 64 * 3))
    photos = Q3.Photos([f"{classes[label]}/x.jpg" for label in labels], labels, cache, {})
    report = {"epoch": 1, **Q3.test_report(logits, labels, classes, 1.0)}
    Q3.draw_pictures(Path("."), report, photos, *logits.softmax(1).max(1), [])
    assert all(len(np.unique(np.asarray(Image.open(name)))) > 5 for name in (
        "confusion.png", "mistakes.png", "reliability.png"))
    assert not capsys.readouterr().err


def test_demo_compares_and_goes_on(monkeypatch, capsys, pictures, refused):
    monkeypatch.setattr(dataset_split, "FORMULAS", dataset_split.FORMULAS[:3])
    monkeypatch.setattr(dataset_split.draw_demo, "__defaults__", (20, 10, 5))
    monkeypatch.setattr(Q3, "DEMO", {name: words.replace("--epochs 12", "--epochs 2").replace(
        "--data demo/target --from-scratch", "--data demo/target --from-scratch --epochs 2")
        for name, words in Q3.DEMO.items()})
    for function, number, begun in (("train_epoch", 2, ["pre-trained"]), (
            "fit_head", 1, ["pre-trained"]), ("score", 3, sorted(Q3.DEMO))):
        with monkeypatch.context() as patch:
            interrupt(patch, Q3, function, number)
            assert call("Q3.py", "--demo") == 130
        assert sorted(os.listdir("runs/demo")) == begun and load("runs/demo/pre-trained/last.pt")
    capsys.readouterr()
    assert call("Q3.py", "--demo") == 0
    out = capsys.readouterr().out
    assert out.count("Q3.py --resume runs/demo/") == 3 and "Epoch 0 fits fc alone" in out
    table = out.split("Parameters that learn")[1].splitlines()[1:]
    for line, name in zip(table[:2], ("fine-tuned", "from-scratch"), strict=True):
        report = json.loads(Path("runs/demo", name, "test.json").read_text())
        assert report["classes"] == list(dataset_split.PATTERNS) and report["photos"] == 50
        assert line.startswith(name) and f"| {report['accuracy']:.4f} (" in line
    assert [int(line.split("|")[-1].replace(",", "")) for line in table[:2]] == [297994, 395674]
    source, tuned = (load(f"runs/demo/{name}/best.pt") for name in ("pre-trained", "fine-tuned"))
    assert all(torch.equal(tuned["model"][name], value) for name, value in source["model"].items()
               if name.startswith(("block1", "block2", "block3", "block4")))
    assert tuned["options"]["architecture"] == "small_cnn" and len(tuned["classes"]) == 10
    assert Path("runs/demo/comparison.png").exists()
    assert len(list(Path("runs/demo/fine-tuned").glob("*.png"))) == 4
    assert call("Q3.py", "--demo") == 0 and table[0] in capsys.readouterr().out
    Path("demo").rename("elsewhere")
    Path("demo").touch()
    assert "'demo' exists already" in refused("Q3.py", "--demo")
    assert "can't be given with --demo" in refused("Q3.py", "--demo", "--epochs", 3)
