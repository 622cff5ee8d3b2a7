"""Q3.py, section by section: the whole job, options, photos, network, feature maps, epochs."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import benchmark_kills
import numpy as np
import pytest
import torch
import torchvision
from conftest import QUICK, ROOT, call, draw_photo, load, read_csv, type_command
from PIL import Image, ImageOps, PngImagePlugin
from torch import nn
from torch.nn import functional as F
from torchvision import transforms

import dataset_split
import Q3

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def a_model(freeze: int = 6, **options) -> Q3.FineTuned:
    torch.manual_seed(0)
    return Q3.FineTuned(Q3.build_network("resnet50", None, 4), freeze, CPU, **options)


def photos_of(pixels: torch.Tensor, labels: torch.Tensor | None = None) -> Q3.Photos:
    everything = range(len(pixels))
    cache = Q3.Cache(Path("made"), [Q3.fingerprint(pixels, row) for row in everything],
                     pixels.shape[1:], torch.uint8)
    cache.fill("Making", 8, lambda rows: pixels[rows])
    labels = torch.tensor(everything) % 4 if labels is None else labels
    return Q3.Photos([f"{row}.jpg" for row in everything], labels, cache, {})


def random_pixels(count: int, size: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(count))


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(rgb).view(3, 1, 1) for rgb in (Q3.MEAN, Q3.STD))
    return (pixels.permute(0, 3, 1, 2) / 255 - mean) / std


def record(monkeypatch, name: str, owner=Q3) -> list[tuple]:
    """The positional arguments of all calls of a function from here on."""
    function, calls = getattr(owner, name), []
    def recorded(*args, **options):
        calls.append(args)
        return function(*args, **options)
    monkeypatch.setattr(owner, name, recorded)
    return calls


def computed(text: str) -> list[str]:
    """What a run decoded and computed, as it says on the screen."""
    return re.findall(r"^((?:Decoding|Trunk maps) +\d+) photos", text, re.MULTILINE)


# -- The whole job ---------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def run(shared_data, weights, tmp_path_factory):
    """One job, typed as a user would: what it printed, and its folder."""
    out = tmp_path_factory.mktemp("run") / "first"
    done = type_command("Q3.py", "--data", shared_data, "--weights", weights, "--fraction", 1.0,
                        "--image-size", 64, "--epochs", 2, "--batch-size", 10, "--seed", 1,
                        "--device", "cpu", "--amp", "off", "--out", out, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return done, out


def test_job_prints_what_its_files_hold(run, shared_data):
    done, out = run
    assert not done.stderr, "progress bars are for terminals"
    for words in ("24 train, 6 val, 12 test", "22,069,251 parameters learn", "float32", str(out),
                  "1,444,928 are frozen", "processes: 1", "Classes     3: Aves, Fungi, Insecta\n",
                  "--fraction 1 leaves out 0)"):
        assert words in done.stdout
    assert sorted(os.listdir(out)) == [
        "best.pt", "config.json", "confusion.png", "curves.png", "history.csv", "last.pt",
        "mistakes.png", "predictions.csv", "reliability.png", "split.json", "test.json"]
    keys = ("train_loss", "train_acc", "val_loss", "val_acc", "calibrated_loss")
    history = read_csv(out / "history.csv")
    assert [line for line in done.stdout.splitlines() if re.match(r" +\d+ \|", line)] == [
        Q3.ROW.format(epoch=epoch, **{key: float(history[epoch][key]) for key in keys})
        for epoch in (0, 1, 2)]
    photos = dataset_split.list_photos(shared_data / "train")
    assert json.loads((out / "split.json").read_text()) == dataset_split.split(photos, 1.0, 0.2, 1)
    config = json.loads((out / "config.json").read_text())
    assert config["options"]["seed"] == 1 and config["machine"]["torch"] == torch.__version__
    assert "optimizer" not in load(out / "best.pt") and (out / "best.pt").stat().st_size < 95e6

    rows, report = read_csv(out / "predictions.csv"), json.loads((out / "test.json").read_text())
    low, high = report["accuracy_interval_95"]
    assert (f"accuracy {report['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f})"
            in done.stdout)
    assert len(re.findall(r"^(?:Aves|Fungi|Insecta) +\|      4 \|", done.stdout, re.MULTILINE)) == 3
    assert [row["path"] for row in rows] == sorted(
        path.relative_to(shared_data / "val").as_posix() for path in shared_data.glob("val/*/*"))
    pairs = [(row["path"].split("/")[0], row["predicted"]) for row in rows]
    assert report["accuracy"] == sum(label == guess for label, guess in pairs) / 12
    assert report["confusion"] == [[pairs.count((label, guess)) for guess in report["classes"]]
                                   for label in report["classes"]]


def test_best_pt_is_used_with_torchvision_and_pillow_alone(run, shared_data):
    """And gives the rows of predictions.csv and the validation loss of its epoch."""
    checkpoint, out = load(run[1] / "best.pt"), run[1]
    network, use = torchvision.models.resnet50(num_classes=3).eval(), checkpoint["preprocessing"]
    network.load_state_dict(checkpoint["model"])

    @torch.no_grad()
    def logits(folder, paths):
        images = [ImageOps.fit(Image.open(shared_data / folder / path), (use["image_size"],) * 2,
                               Image.Resampling.BILINEAR, use["border"]) for path in paths]
        images = torch.stack(list(map(transforms.functional.to_tensor, images)))
        return network(transforms.functional.normalize(images, use["mean"], use["std"]))
    rows = read_csv(out / "predictions.csv")
    shares = (logits("val", [row["path"] for row in rows]) / checkpoint["temperature"]).softmax(1)
    for row, share in zip(rows, shares, strict=True):
        assert checkpoint["classes"][int(share.argmax())] == row["predicted"]
        assert float(share.max()) == pytest.approx(float(row["confidence"]), abs=2e-3)
    best = min(load(out / "last.pt")["history"], key=lambda row: row["calibrated_loss"])
    report, paths = json.loads((out / "test.json").read_text()), checkpoint["split"]["val"]
    assert report["epoch"] == checkpoint["epoch"] == best["epoch"]
    labels = torch.tensor([checkpoint["classes"].index(path.split("/")[0]) for path in paths])
    loss = F.cross_entropy(logits("train", paths), labels).item()
    assert loss == pytest.approx(best["val_loss"], rel=1e-3)


@pytest.mark.parametrize("recipe", ["tuned", "reference"])
def test_the_readme_tells_how_to_use_a_checkpoint(weights, shared_data, capsys, monkeypatch,
                                                  recipe):
    monkeypatch.setattr(Q3, "fit_temperature", lambda *_: (3.0, 0.5))
    code, = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert call("Q3.py", "--data", shared_data, *QUICK[2:], "--weights", weights, "--recipe",
                recipe, "--out", "runs/first") == 0
    row = read_csv("runs/first/predictions.csv")[5]
    shutil.copy(shared_data / "val" / row["path"], "frog.jpg")
    capsys.readouterr()
    exec(code, {})
    name, confidence = capsys.readouterr().out.split()
    assert name == row["predicted"]
    assert float(confidence) == pytest.approx(float(row["confidence"]), abs=2e-3)


def test_frozen_children_stay_bit_identical_and_all_others_move(run, weights, quick_run):
    for file in ("best.pt", "last.pt"):
        moves_are_right(load(weights), load(run[1] / file), held=True)
    for recipe, freeze, held in (("tuned", 4, True), ("tuned", 7, True), ("reference", 6, False),
                                 ("scratch", 6, False)):
        out = quick_run(f"{recipe}-{freeze}", "--recipe", recipe, "--freeze", freeze)
        moves_are_right(load("small.pth"), load(out / "last.pt"), held)


def moves_are_right(before: dict, checkpoint: dict, held: bool) -> None:
    after, freeze = checkpoint["model"], checkpoint["options"]["freeze"]
    assert before.keys() == after.keys()
    children = ["conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4"]
    for name in before:
        still = name.split(".")[0] in children[:freeze]
        still |= held and ("running_" in name or "num_batches" in name)
        still |= checkpoint["epoch"] == 0 and not name.startswith("fc.")
        assert still == torch.equal(before[name], after[name]), name


def test_job_learns_from_training_photos_alone_in_another_order_each_epoch(quick_run, monkeypatch):
    passes, batches = [], Q3.batches
    def recorded(model, photos, batch_size, title, order=None, *crop):
        order = torch.arange(len(photos.paths)) if order is None else order
        passes.append([photos.paths[index] for index in order])
        return batches(model, photos, batch_size, title, order, *crop)
    monkeypatch.setattr(Q3, "batches", recorded)
    out = quick_run("out", "--epochs", 2)
    split = json.loads((out / "split.json").read_text())
    features, val, first, val_1, second, val_2, test = passes
    assert features == sorted(first) == sorted(second) == split["train"]
    assert first != second != features and val == val_1 == val_2 == split["val"]
    assert test == [row["path"] for row in read_csv(out / "predictions.csv")]


def test_best_epoch_is_kept_and_is_the_one_that_is_tested(quick_run, monkeypatch):
    losses = iter([.5, .4, .3, .2, .2])  # of epochs 0 to 4
    monkeypatch.setattr(Q3, "fit_temperature", lambda *_: (1.0, next(losses)))
    heads, predict = [], Q3.predict
    def recorded(model, *args, **options):
        heads.append(model.head.weight.detach().clone())
        return predict(model, *args, **options)
    monkeypatch.setattr(Q3, "predict", recorded)
    out = quick_run("out", "--epochs", 4)
    best, last = load(out / "best.pt"), load(out / "last.pt")
    assert (best["epoch"], last["epoch"]) == (3, 4)
    assert json.loads((out / "test.json").read_text())["epoch"] == 3
    assert torch.equal(heads[-1], best["model"]["fc.weight"])
    assert not torch.equal(heads[-1], last["model"]["fc.weight"])


def test_same_seed_same_run_and_other_seed_other_run(quick_run):
    first, again, other = (benchmark_kills.result(quick_run(name, "--seed", seed, "--epochs", 2))
                           for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert benchmark_kills.equal(first, again)
    assert not benchmark_kills.equal(first["history.csv"], other["history.csv"])


# -- Options ---------------------------------------------------------------------------------------

FLAGS = {  # flag: (value, what the run folder then shows)
    "--data": (None, lambda out: len(read_csv(out / "predictions.csv")) == 11),
    "--fraction": (0.5, lambda out: len(load(out / "last.pt")["split"]["train"]) == 12),
    "--val-fraction": (0.5, lambda out: len(load(out / "last.pt")["split"]["val"]) == 15),
    "--seed": (5, lambda out: json.loads((out / "split.json").read_text())["seed"] == 5),
    "--image-size": (72, lambda out: load(out / "best.pt")["preprocessing"]["image_size"] == 72),
    "--freeze": (9, lambda out: len(load(out / "last.pt")["optimizer"]["state"]) == 2),
    "--epochs": (2, lambda out: read_csv(out / "history.csv")[-1]["epoch"] == "2"),
    "--batch-size": (4, lambda out: load(out / "last.pt")["optimizer"]["state"][0]["step"] == 6),
    "--lr-head": (0.01, lambda out: initial_rates(out)[0] == 0.01),
    "--lr-backbone": (0.02, lambda out: initial_rates(out)[1] == 0.02),
    "--amp": ("bf16", lambda out: "bfloat16" in (out / "said").read_text()),
    "--recipe": ("reference", lambda out: read_csv(out / "history.csv")[0]["epoch"] == "1"),
    "--weights": ("none", lambda out: initial_rates(out) == [1e-3, 1e-3]),
    "--cache": ("elsewhere", lambda out: (out.parent / "elsewhere").exists()),
    "--out": (None, lambda out: out.name == "other"),
}
TESTED_ELSEWHERE = {"--help", "--split", "--test-fraction", "--device", "--workers", "--demo",
                    "--download", "--from-scratch", "--resume", "--evaluate", "--predict"}


def initial_rates(out: Path) -> list[float]:
    return [group["initial_lr"] for group in load(out / "last.pt")["optimizer"]["param_groups"]]


def test_every_flag_has_a_test():
    flags = {flag for action in Q3.get_args_parser()._actions for flag in action.option_strings}
    assert {flag for flag in flags if flag.startswith("--")} == FLAGS.keys() | TESTED_ELSEWHERE


def test_each_flag_changes_something(quick_run, data, capsys):
    (data / "val/Aves/00.jpg").unlink()
    plain = quick_run("plain")
    for flag, (value, shows) in FLAGS.items():
        (plain / "said").write_text(capsys.readouterr().out)
        assert not shows(plain), flag
        given = (flag, value) if value is not None else ()
        other = quick_run("other", *given, **({"data": data} if flag == "--data" else {}))
        (other / "said").write_text(capsys.readouterr().out)
        assert shows(other), flag
        shutil.rmtree("other")


def test_split_takes_a_manifest(quick_run, refused, data):
    options = ("--fraction", 0.6, "--val-fraction", 0.4, "--seed", 3)
    assert call("dataset_split.py", "--data", data, *options, "--out", "s.json") == 0
    assert "leave the fractions out" in refused("Q3.py", "--split", "s.json", "--fraction", 0.6)
    words = ("Q3.py", "--data", data, *QUICK[:2], *QUICK[4:], "--split", "s.json", "--out", "out")
    assert call(*words) == 0
    manifest = json.loads(Path("s.json").read_text())
    for out in (Path("out"), quick_run("made", *options, data=data)):
        assert json.loads((out / "split.json").read_text()) == manifest
    (data / "train" / manifest["train"][0]).unlink()
    line = refused("Q3.py", "--data", data, "--split", "s.json")
    assert "split 's.json'" in line and repr(manifest["train"][0]) in line


def test_workers_is_the_number_of_photos_decoded_at_once(quick_run, monkeypatch):
    """Three threads meet at a barrier; two never would."""
    barrier, read_photo = threading.Barrier(3, timeout=20), Q3.read_photo
    monkeypatch.setattr(Q3, "read_photo", lambda *args, **options: (
        barrier.wait(), read_photo(*args, **options))[1])
    quick_run("three", "--workers", 3)
    barrier = threading.Barrier(3, timeout=0.1)
    with pytest.raises(threading.BrokenBarrierError):
        quick_run("two", "--workers", 2, "--cache", "other")


@pytest.mark.parametrize("flags, recipe, rates, epochs, freeze", [
    ((), "tuned", (1e-3, 1e-4), 5, None),
    (("--recipe", "reference"), "reference", (1e-3, 1e-4), 5, None),
    (("--from-scratch",), "scratch", (1e-3, 1e-3), 40, None),
    (("--weights", "none"), "scratch", (1e-3, 1e-3), 40, None),
    (("--weights", "none", "--recipe", "reference"), "reference", (1e-3, 1e-4), 5, None),
    (("--recipe", "scratch"), "scratch", (1e-3, 1e-3), 40, None),
    (("--lr-head", "0.5", "--epochs", "7", "--freeze", "0"), "tuned", (0.5, 1e-4), 7, 0)])
def test_defaults_are_those_of_the_recipe(flags, recipe, rates, epochs, freeze):
    args = Q3.get_args(list(flags))
    assert (args.recipe, (args.lr_head, args.lr_backbone)) == (recipe, rates)
    assert (args.epochs, args.freeze) == (epochs, freeze)  # None: as the weights' network has it
    assert args.batch_size == (32 if recipe == "tuned" else 64)


@pytest.mark.parametrize("flags, words", [
    (["--fraction", "0"], "outside [0.001"), (["--val-fraction", "1"], "outside [0.001"),
    (["--batch-size", "0"], "outside [1"), (["--epochs", "two"], "invalid number value: 'two'"),
    (["--freeze", "10"], "outside [0, 9]"), (["--lr-backbone", "inf"], "outside [1e-12"),
    (["--image-size", "63"], "outside [64"), (["--recipe", "best"], "'best'"),
    (["--weights", "none", "--recipe", "tuned"], "--recipe tuned needs trained weights"),
    (["--from-scratch", "--recipe", "tuned"], "--recipe tuned needs trained weights"),
    (["--from-scratch", "--weights", "none"], "not allowed with"),
    (["--resume", "out", "--epochs", "9"], "--epochs can't be given with --resume"),
    (["--resume", "out", "--batch-size", "4"], "--batch-size can't be given with --resume"),
    (["--evaluate", "a.pt", "--lr-head", "1"], "--lr-head can't be given with --evaluate"),
    (["--predict", "a.pt", "--data", "d"], "--data can't be given with --predict"),
    (["--resume", "out", "--evaluate", "a.pt"], "not allowed with"),
    (["--epoch", "3"], "unrecognized arguments: --epoch 3 (all options: python Q3.py --help)"),
    (["--lr_head", "3"], "unrecognized arguments: --lr_head 3"),
    (["--local-rank=1"], "use torchrun"), (["--local_rank", "1"], "use torchrun")])
def test_wrong_options(refused, flags, words):
    assert words in refused("Q3.py", *flags)


def test_typed_mistake_ends_in_one_line_and_exit_code_2(tmp_path):
    done = type_command("Q3.py", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and not done.stdout
    assert dataset_split.ARCHIVE in done.stderr and not os.listdir(tmp_path)


# -- The machine -----------------------------------------------------------------------------------

def test_cores_are_those_of_the_container(monkeypatch):
    quota = Path("cpu.max")
    assert 1 <= Q3.count_cores(quota) <= os.cpu_count()
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2, 3})
    for text, cores in (("max 100000", 4), ("50000 100000", 1), ("150000 100000", 2), ("9 1", 4)):
        quota.write_text(text)
        assert Q3.count_cores(quota) == cores


@pytest.mark.parametrize("gpus, mps, auto", [(1, 0, "cuda"), (0, 1, "mps"), (0, 0, "cpu")])
def test_device_auto_is_the_gpu_where_there_is_one(monkeypatch, gpus, mps, auto):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))  # too old a driver: False
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(mps))
    assert Q3.pick_device("auto").type == auto and Q3.pick_device("cpu").type == "cpu"
    monkeypatch.setattr(Q3, "LOCAL_WORLD_SIZE", 2)
    with pytest.raises(dataset_split.InputError, match=r". of 2 found, try cpu"):
        Q3.pick_device("mps" if mps else "cuda")


def test_precision_auto_is_what_the_hardware_computes_in(monkeypatch):
    for has, auto in (({"avx512_bf16": True}, torch.bfloat16), ({"bf16": True}, torch.bfloat16),
                      ({"avx2": True, "avx512_bf16": False}, torch.float32)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has)
        assert Q3.pick_precision("auto", CPU) == auto
    for bf16, auto in ((True, torch.bfloat16), (False, torch.float16)):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                            lambda including_emulation, bf16=bf16: bf16 or including_emulation)
        assert Q3.pick_precision("auto", CUDA) == auto
    assert Q3.pick_precision("off", CUDA) == torch.float32
    with pytest.raises(dataset_split.InputError, match="--amp fp16 is for NVIDIA GPUs"):
        Q3.pick_precision("fp16", CPU)


def moved(module: nn.Module, *args, memory_format=None) -> nn.Module:
    """What Module.to does, which fails for fake tensors; but the layout stays."""
    for each in module.modules():
        for named in (each._parameters, each._buffers):
            for name, value in named.items():
                if args and value is not None and value.is_floating_point():
                    value = value.detach().to(*args)
                    named[name] = nn.Parameter(value) if named is each._parameters else value
    return module


def test_step_forward_on_a_gpu_that_computes_no_numbers(monkeypatch):
    """torch's fake device knows where tensors are, and refuses to mix CPU and GPU."""
    monkeypatch.setattr(nn.Module, "to", moved)
    monkeypatch.setattr(torch._subclasses.FakeTensor, "__deepcopy__",
                        lambda self, memo: self.detach().clone(), raising=False)
    with torch._subclasses.FakeTensorMode():
        with CUDA:
            network = torchvision.models.resnet50(num_classes=10)
        model = Q3.FineTuned(network, 6, CUDA).train()
        pixels = torch.zeros(4, 224, 224, 3, dtype=torch.uint8)
        maps = model.maps(Q3.send(pixels, CUDA))
        cut = maps[:, :20, 8:].permute(0, 3, 1, 2)  # `crop` reads offsets, which aren't there
        logits = model(cut)
        losses = F.cross_entropy(logits, Q3.send(torch.zeros(4).long(), CUDA), reduction="none")
        assert maps.shape == (4, 28, 28, 512)
        assert cut.shape == (4, 512, 20, 20) and logits.shape == (4, 10)
        assert {each.device.type for each in (maps, cut, logits, losses)} == {"cuda"}
        for mixed in (lambda: model(cut.cpu()), lambda: model.maps(pixels)):
            with pytest.raises(RuntimeError, match="device"):
                mixed()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_job_runs_on_cuda_in_mixed_precision(small_network, shared_data, capsys):
    assert call("Q3.py", "--data", shared_data, *QUICK[:8], "--out", "out") == 0
    assert re.search("cuda:0, b?float16", capsys.readouterr().out)


# -- Photos ----------------------------------------------------------------------------------------

DARK_LIGHT, RED_BLUE = [(0, 0, 0), (255, 255, 255)], [(200, 40, 60), (30, 90, 220)]


def halves(left, right) -> Image.Image:
    image = Image.new("RGB", (80, 60), right)
    image.paste(left, (0, 0, 40, 60))
    return image


def colours_of(file: Path) -> list[list[int]]:
    photo = Q3.read_photo(file, 40, None)
    assert photo.shape == (40, 40, 3) and photo.dtype == torch.uint8
    return [photo[20, 8].tolist(), photo[20, 32].tolist()]


@pytest.mark.parametrize("mode, names", [
    ("RGB", "x.png x.jpg x.bmp"), ("P", "x.png x.tif"), ("CMYK", "x.jpg x.tif"),
    ("RGBA", "x.png x.webp"), ("L", "x.png x.jpg"), ("LA", "x.png"), ("1", "x.png")])
def test_photos_of_every_kind_arrive_as_rgb(mode, names):
    colours = DARK_LIGHT if mode[0] in "L1" else RED_BLUE
    for name in names.split():
        halves(*colours).convert(mode).save(name)
        assert np.allclose(colours_of(name), colours, atol=30)


@pytest.mark.parametrize("dtype, names", [
    (np.uint16, "x.png x.tif x.pgm"), (np.int32, "x.tif"), (np.float32, "x.tif")])
def test_photos_of_more_than_8_bits_are_refused_by_name(dtype, names):
    """Their white may be 1, 255, 4095 or 65535: a guess would be wrong without a word."""
    for name in names.split():
        Image.fromarray(np.ones((60, 80), dtype)).save(name)
        assert f"photo '{name}' can't be read (grey of more than 8 bits: convert" in str(
            Q3.read_photo(Path(name), 64, None))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white(mode):
    """Black on a transparent ground, which is black too: only the alpha tells them apart."""
    image = Image.new("LA", (80, 60), (0, 0))
    image.paste((0, 255), (0, 0, 40, 60))
    if mode == "P":
        image = Image.fromarray((np.asarray(image)[..., 1] == 0).astype(np.uint8))
        image.convert("P").save("x.png", transparency=bytes([255, 0]))
    else:
        image.convert(mode).save("x.png")
    assert np.allclose(colours_of("x.png"), DARK_LIGHT, atol=1)


def test_files_of_other_formats_are_no_photos_and_large_texts_are_no_harm(tmp_path):
    Path("x.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    assert "cannot identify" in str(Q3.read_photo(Path("x.jpg"), 64, None)), "no Ghostscript"
    (info := PngImagePlugin.PngInfo()).add_text("workflow", "x" * 3 * 2**20, zip=True)
    halves(*RED_BLUE).save("x.png", pnginfo=info, icc_profile=bytes(3 * 2**20))
    assert np.allclose(colours_of("x.png"), RED_BLUE, atol=1)


@pytest.mark.parametrize("ending", ["jpg", "tif"])  # Pillow turns TIFFs itself, when it loads them
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, ending):
    """The eight ways to hold a camera, of one scene: dark on the left, light on the right."""
    image = halves(*DARK_LIGHT)
    stored = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's Transpose that each tag undoes
    if orientation > 1:
        image = image.transpose(Image.Transpose(stored[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(f"x.{ending}", exif=exif)
    assert np.allclose(colours_of(f"x.{ending}"), DARK_LIGHT, atol=8)


def test_odd_metadata_is_no_reason_to_refuse_a_photo():
    image, exif = halves(*RED_BLUE), Image.Exif()
    image.convert("P").save("a.png", transparency=bytes([0, 128] * 8))
    image.save("b.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    image.save("c.png", exif=b"Exif\0\0no TIFF at all")
    for name in ("a.png", "b.jpg", "c.png"):
        assert np.allclose(colours_of(name), RED_BLUE, atol=30)
    exif[0x0112], exif[0x010F] = 3, "maker"
    image.save("d.jpg", exif=exif)
    spoilt = Path("d.jpg").read_bytes().replace(b"maker", b"\xff" * 5)
    Path("d.jpg").write_bytes(spoilt.replace(b"\x0f\x01\x02", b"\x0f\x01\x05"))
    assert np.allclose(colours_of("d.jpg"), RED_BLUE[::-1], atol=30), "as the whole part says"


@pytest.mark.parametrize("size", [(800, 600), (600, 800), (300, 300)])
def test_photo_is_that_of_torchvisions_resize_and_centre_crop(size):
    """Short side 256, of which the middle 224: but for the rounding of whole pixels."""
    x, y = np.meshgrid(np.linspace(0, 6, size[0]), np.linspace(0, 6, size[1]))
    waves = np.stack([np.sin(x), np.cos(y), np.sin(x + y)], 2)
    Image.fromarray((127 + 120 * waves).astype(np.uint8)).save("x.png")
    image, use = Image.open("x.png"), transforms
    expected = use.Compose([use.Resize(256), use.CenterCrop(224)])(image)
    ours = Q3.read_photo("x.png", 224, Q3.RECIPES["tuned"].border).int().numpy()
    assert ours.shape == (224, 224, 3) and np.abs(ours - np.asarray(expected)).max() <= 3
    squashed = Q3.read_photo("x.png", 224, Q3.RECIPES["reference"].border).numpy()
    assert np.array_equal(squashed, np.asarray(use.Resize((224, 224))(image)))


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 2), (3000, 5)])
def test_photos_of_odd_shapes(size):
    Image.new("RGB", size, (10, 200, 30)).save("x.png")
    for border in (1 / 16, None):
        assert (Q3.read_photo("x.png", 64, border) == torch.tensor((10, 200, 30))).all()


def test_what_is_no_photo_is_said_without_warnings(tmp_path):
    """In a process of its own, as pytest sets its own filters of warnings."""
    test_odd_metadata_is_no_reason_to_refuse_a_photo()
    Path("text.jpg").write_text("a poem")
    Path("link.jpg").symlink_to("nowhere")
    os.mkfifo("pipe.jpg")
    draw_photo(Path("cut.jpg"), (1, 2, 3), 0)
    Path("cut.jpg").write_bytes(Path("cut.jpg").read_bytes()[:-200])
    for name, size in (("large.png", (50, 130)), ("bomb.png", (300, 300)), ("fine.png", (30, 30))):
        Image.new("RGB", size).save(name)
    (tmp_path / "all.py").write_text(f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import Q3
Q3.Image.MAX_IMAGE_PIXELS = 5000
for name in sys.argv[1:]: print(str(Q3.read_photo(name, 64, None))[:80])""")
    names = {"text.jpg": "cannot identify", "cut.jpg": "can't be read (",
             "pipe.jpg": "is not a file", "link.jpg": "is not a file",
             "large.png": "exceeds limit of 5000", "bomb.png": "exceeds limit of 10000",
             **dict.fromkeys(("fine.png", "a.png", "b.jpg", "c.png", "d.jpg"), "tensor(")}
    done = subprocess.run([sys.executable, "all.py", *names], capture_output=True, text=True)
    said = re.sub(r"\n(?!tensor|photo|'|there)", " ", done.stdout.strip()).splitlines()
    assert not done.stderr and len(said) == len(names)
    assert all(words in line and (words == "tensor(" or f"'{name}'" in line)
               for (name, words), line in zip(names.items(), said, strict=True)), said


# -- The cache -------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_cache_gives_back_whole_tensors_in_any_order(dtype):
    def cache(names="abcdefg"):  # of another run each time
        return Q3.Cache(Path("cache"), list(names), (3, 5), dtype)
    values = (torch.rand(7, 3, 5) * 200).to(dtype)
    assert cache("eb").fill("", 1, lambda rows: values[[4, 1]][rows]) == {}
    assert cache().missing().tolist() == [0, 2, 3, 5, 6]
    errors = cache("abcdef").fill("", 2, lambda rows: [
        values[row] if row != 3 else dataset_split.InputError("bad") for row in rows])
    assert list(errors) == [3] and cache().missing().tolist() == [3, 6]
    assert torch.equal(cache()[torch.tensor([1, 5, 0, 1])], values[[1, 5, 0, 1]])
    assert cache()[torch.tensor([], dtype=int)].shape == (0, 3, 5), "an empty share of a step"
    Path("cache/b").write_bytes(b"\0" * 5)  # as after a power cut
    assert cache().missing().tolist() == [1, 3, 6] and cache().missing(1, 2).tolist() == [1, 3]
    with pytest.raises(dataset_split.InputError, match="b' is truncated: delete it"):
        cache()[torch.tensor([0, 1])]


def test_second_run_decodes_nothing_and_computes_no_map(quick_run, monkeypatch, capsys):
    first = benchmark_kills.result(quick_run("first"))
    assert computed(capsys.readouterr().out) == [
        "Decoding    24", "Decoding    6", "Decoding    12", "Trunk maps  24", "Trunk maps  6"]
    monkeypatch.setattr(Q3, "read_photo", None)
    assert benchmark_kills.equal(first, benchmark_kills.result(quick_run("second")))
    assert computed(capsys.readouterr().out) == []


def test_other_subset_seed_and_trunk_keep_what_is_there(quick_run, capsys, monkeypatch):
    def anew(name, *flags):
        quick_run(name, "--fraction", 0.5, *flags)
        return computed(capsys.readouterr().out), {*Path(".cache").rglob("*")}
    first, before = anew("a")
    maps = ["Trunk maps  12", "Trunk maps  3"]
    assert first == ["Decoding    12", "Decoding    3", "Decoding    12", *maps]
    rest, more = anew("b", "--fraction", 1.0)
    assert rest == ["Decoding    12", "Decoding    3", *maps] and more > before
    assert anew("c", "--seed", 1) == ([], more)
    seventh, both = anew("d", "--freeze", 7)
    assert seventh == maps and both > more
    assert anew("e") == anew("f", "--freeze", 7) == ([], both)
    squashed, all_three = anew("g", "--recipe", "reference")
    assert squashed == first and all_three > both and anew("h") == ([], all_three)
    monkeypatch.setattr(torch, "__version__", "another")
    assert anew("i")[0] == maps
    monkeypatch.setattr(Image, "__version__", "another")
    assert anew("j")[0] == first
    monkeypatch.setattr(Q3, "CACHE_FORMAT", "another")
    assert anew("k")[0] == first


def exchange(data: Path) -> None:
    """Two files of one size and time, as to correct their labels."""
    one, two, aside = (data / "train" / name for name in ("Aves/03.jpg", "Fungi/03.jpg", "x"))
    assert one.stat().st_size == two.stat().st_size and one.stat().st_mtime == two.stat().st_mtime
    for source, target in ((one, aside), (two, one), (aside, two)):
        source.rename(target)


@pytest.mark.parametrize("spoil, count", [
    (lambda data: draw_photo(data / "train/Aves/03.jpg", (0, 0, 0), 77), 1),
    (lambda data: os.utime(data / "train/Aves/03.jpg", (1, 1)), 1), (exchange, 2),
    (lambda data: (data / "train/Aves/03.jpg").unlink(), 0),
    (lambda data: draw_photo(data / "train/Aves/new.jpg", (0, 0, 0), 77), 1)])
def test_changed_photos_and_no_others_are_decoded_again(quick_run, data, monkeypatch, spoil, count):
    for file in data.glob("train/*/03.jpg"):
        file.write_bytes(file.read_bytes().ljust(9000))
        os.utime(file, (5, 5))
    quick_run("first", data=data)
    spoil(data)
    decoded = record(monkeypatch, "read_photo")
    second = benchmark_kills.result(quick_run("second", data=data))
    assert len(decoded) == count
    assert benchmark_kills.equal(second, benchmark_kills.result(
        quick_run("third", "--cache", "none", data=data)))


def test_no_cache_leaves_nothing_behind(quick_run, tmp_path):
    out = quick_run("out", "--cache", "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "small.pth"]
    assert not list(out.glob(".*"))


def test_cache_that_cannot_be_used(small_network, shared_data, refused, monkeypatch, capsys):
    Path("file").touch()
    flags = ("--data", shared_data, *QUICK, "--out", "out")
    assert "--cache 'file' can't be used" in refused("Q3.py", *flags, "--cache", "file")

    calls, replace = iter(range(99)), os.replace
    def full(*args):
        if next(calls) == 20:
            raise OSError(28, "No space left on device")
        replace(*args)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert re.search(r"'\.cache.* can't be written, give another --cache: No space left",
                         refused("Q3.py", *flags))
    assert not Path("out").exists()
    assert call("Q3.py", *flags) == 0 and "Decoding    4 photos" in capsys.readouterr().out


# -- The network -----------------------------------------------------------------------------------

@pytest.mark.parametrize("freeze", range(10))
def test_the_cut_network_computes_what_the_whole_one_does(small_network, freeze):
    """With every BatchNorm of the trunk folded into the convolution before it."""
    network = Q3.build_network(*Q3.read_weights("small.pth"), 5).eval()
    model, pixels = Q3.FineTuned(network, freeze, CPU).eval(), random_pixels(2)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.trunk.modules())
    with torch.no_grad():
        assert torch.allclose(model(model.maps(pixels).permute(0, 3, 1, 2)),
                              network(normalised(pixels)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("freeze", range(10))
def test_optimiser_holds_exactly_what_learns(small_network, freeze):
    network = Q3.build_network("resnet50", None, 10)
    model = Q3.FineTuned(network, freeze, CPU)
    head, backbone = Q3.build_optimizer(model, 1e-3, 1e-4).param_groups
    learning = [parameter for child in list(network.children())[freeze:]
                for parameter in child.parameters()]
    assert {id(each) for each in network.parameters() if each.requires_grad} == {
        id(each) for each in learning}
    in_groups = [id(each) for group in (head, backbone) for each in group["params"]]
    assert sorted(in_groups) == sorted(map(id, learning)), "each in one group, once"
    assert {id(each) for each in head["params"]} == {id(each) for each in network.fc.parameters()}
    assert (head["lr"], backbone["lr"]) == (head["initial_lr"], backbone["initial_lr"]) == (
        1e-3, 1e-4)


@pytest.mark.parametrize("hold", [True, False])
def test_frozen_layers_stay_in_eval_mode_and_build_no_graph(small_network, hold):
    model = a_model(6, hold_batchnorm=hold)
    for mode in (True, False, True):
        model.train(mode)
        frozen = [*list(model.network.children())[:6], model.trunk]
        assert not any(module.training for child in frozen for module in child.modules())
        assert all(module.training == (mode and not hold) for module in model.backbone.modules())
    maps = model.maps(random_pixels(2))
    assert maps.shape == (2, 8, 8, 128) and not maps.requires_grad
    assert model(maps.permute(0, 3, 1, 2)).requires_grad
    assert not any(parameter.requires_grad for parameter in model.trunk.parameters())


def test_small_cnn_takes_any_size_and_learns_all_of_itself(shared_data, capsys):
    for size in (64, 75, 224):
        network = Q3.FineTuned(Q3.build_network("small_cnn", None, 7), 0, CPU)
        assert network(torch.zeros(2, 3, size, size)).shape == (2, 7)
    assert call("Q3.py", "--data", shared_data, *QUICK[2:], "--from-scratch", "--out", "out") == 0
    assert "393,875 parameters learn, 0 are frozen" in capsys.readouterr().out
    torch.manual_seed(0)
    before, checkpoint = Q3.build_network("small_cnn", None, 3).state_dict(), load("out/best.pt")
    assert checkpoint["architecture"] == "small_cnn"
    network = Q3.build_network(*Q3.read_weights("out/best.pt"), 7)
    assert all(torch.equal(value, checkpoint["model"][name]) for name, value in
               network.state_dict().items() if not name.startswith("fc."))
    pixels = random_pixels(2)
    for freeze in range(10):
        model = Q3.FineTuned(network, freeze, CPU).eval()
        assert torch.allclose(model(model.maps(pixels).permute(0, 3, 1, 2)),
                              network(normalised(pixels)), atol=1e-4)
    assert all((value != before[name]).any() for name, value in checkpoint["model"].items())


# -- Feature maps and batches ----------------------------------------------------------------------

@pytest.mark.parametrize("recipe, freeze", [
    ("tuned", 6), ("reference", 6), ("tuned", 4), ("reference", 4), ("tuned", 0)])
def test_result_is_the_same_where_there_is_no_room_for_maps(quick_run, monkeypatch, capsys, recipe,
                                                            freeze):
    flags = ("--recipe", recipe, "--freeze", freeze, "--epochs", 2)
    cached = quick_run("cached", *flags)
    assert "runs once a photo" in capsys.readouterr().out
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**6))
    again = quick_run("again", *flags, "--cache", "other")
    assert "runs in each step" in capsys.readouterr().out
    assert benchmark_kills.equal(benchmark_kills.result(cached), benchmark_kills.result(again))


def test_maps_fill_half_of_the_disk_at_most_and_belong_to_one_trunk(small_network, monkeypatch):
    def cached(model, photos):
        said = Q3.cache_maps(model, [photos := dataclasses.replace(photos, maps=None)])
        return "once" in said and photos.maps.folder
    photos, model, room = photos_of(random_pixels(3)), a_model(), 3 * 8 * 8 * 128 * 4
    for free, kept in ((2 * room - 1, False), (2 * room, True), (0, True)):  # then it is there
        with monkeypatch.context() as patch:
            patch.setattr(shutil, "disk_usage", lambda _, free=free: SimpleNamespace(free=free))
            assert bool(cached(model, photos)) == kept
    other = a_model()
    with torch.no_grad():
        next(other.trunk.parameters())[0] += 1
    models = (model, other, a_model(2), a_model(3), a_model(5), a_model(7),  # 2, 3: same weights
              a_model(precision=torch.bfloat16))
    assert len({cached(each, photos) for each in models}) == 7


def test_crop_of_a_map_is_the_map_of_a_crop_but_for_its_borders(small_network):
    photos, model = photos_of(random_pixels(2, 224)), a_model()
    which, offsets = torch.tensor([1, 0]), torch.tensor([[0.5, 0.99], [0.0, 0.3]])
    corners = [(32, 64), (0, 16)]  # of 0 to 8 places down and right: 4, 8 and 0, 2
    from_pixels = model.maps(torch.stack([
        photos.pixels[which][k, top:top + 160, left:left + 160]
        for k, (top, left) in enumerate(corners)]))
    Q3.cache_maps(model, [photos])
    from_maps = Q3.crop(photos.maps[which], offsets, 5 / 7)
    assert from_maps.shape == from_pixels.shape == (2, 20, 20, 128)
    assert torch.allclose(from_maps[:, 8:12, 8:12], from_pixels[:, 8:12, 8:12], atol=1e-5)
    assert not torch.allclose(from_maps, from_pixels, atol=1e-5)


def test_crops_reach_every_corner_and_show_what_lies_there():
    photo = torch.arange(49).view(1, 7, 7, 1).expand(4000, -1, -1, -1)
    _, offsets = Q3.draw_epoch(4000, seed=0, epoch=1)
    crops = Q3.crop(photo, offsets, 5 / 7)
    assert crops.shape == (4000, 5, 5, 1)
    corners, counts = crops[:, 0, 0, 0].unique(return_counts=True)
    assert corners.tolist() == [0, 1, 2, 7, 8, 9, 14, 15, 16] and counts.min() > 350
    assert torch.equal(crops[..., 0] - crops[:, :1, :1, 0], photo[:, :5, :5, 0])
    both = torch.stack([photo[0], 100 + photo[0]])
    assert Q3.crop(both, torch.zeros(2, 2), 5 / 7)[:, 0, 0, 0].tolist() == [0, 100]
    assert Q3.crop(photo[:9, :1, :1], offsets[:9], 5 / 7).shape == (9, 1, 1, 1)
    assert Q3.crop(photo[:0], offsets[:0], 5 / 7).shape == (0, 5, 5, 1), "an empty share"


def test_draw_epoch_depends_on_seed_and_epoch_alone():
    def drawn(seed, epoch):
        order, offsets = Q3.draw_epoch(50, seed, epoch)
        assert sorted(order.tolist()) == list(range(50)) and offsets.shape == (50, 2)
        assert 0 <= offsets.min() <= offsets.max() < 1
        return tuple(order.tolist()), tuple(offsets.flatten().tolist())
    draws = {(seed, epoch): drawn(seed, epoch) for seed in (0, 1) for epoch in (1, 2)}
    assert len({order for order, _ in draws.values()}) == 4
    assert len({offsets for _, offsets in draws.values()}) == 4
    torch.manual_seed(99)
    assert draws[0, 1] == drawn(0, 1)


@pytest.mark.parametrize("count, batch_size, sizes", [
    (65, 64, [33, 32]), (128, 64, [64, 64]), (5, 64, [5]), (3, 1, [1, 1, 1]),
    (1999, 64, [63] * 15 + [62] * 17)])
def test_batches_share_the_photos_evenly(count, batch_size, sizes):
    pixels = torch.arange(count).view(-1, 1, 1, 1).expand(-1, 1, 2, 1).to(torch.uint8)
    photos = photos_of(pixels, torch.arange(count))
    model = SimpleNamespace(device=CPU, layout=torch.channels_last, maps=torch.Tensor.float)
    order = torch.arange(count).flip(0)
    seen = list(Q3.batches(model, photos, batch_size, "", order))
    assert [len(labels) for _, labels, _ in seen] == [size for *_, size in seen] == sizes
    assert torch.equal(torch.cat([labels for _, labels, _ in seen]), order)
    assert torch.equal(torch.cat([maps[:, 0, 0, 0] for maps, *_ in seen]), order % 256)


def test_training_batches_are_crops_and_all_others_whole(quick_run, monkeypatch):
    calls = record(monkeypatch, "crop")
    quick_run("reference", "--recipe", "reference", "--epochs", 2)
    assert not calls, "the reference recipe looks at whole photos"
    quick_run("tuned", "--epochs", 2)
    assert [len(maps) for maps, *_ in calls] == [8] * 6 and {part for *_, part in calls} == {5 / 7}
    assert torch.equal(torch.cat([offsets for _, offsets, _ in calls]),
                       torch.cat([Q3.draw_epoch(24, 0, epoch)[1] for epoch in (1, 2)]))


# -- Optimiser and epochs --------------------------------------------------------------------------

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def test_training_steps_are_those_of_the_plain_loop():
    """Three steps of Adam on a linear layer, each with its factor of the learning rate."""
    torch.manual_seed(0)
    steps = [(torch.randn(4, 3, 4, 4), torch.randint(0, 3, (4,)), 4) for _ in range(3)]
    ours, plain = (nn.Sequential(nn.Flatten(), nn.Linear(48, 3)) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    optimizer = torch.optim.Adam([{"params": list(ours.parameters()), "initial_lr": 0.01}])
    Q3.train_epoch(ours, steps, optimizer, NO_SCALER, [0.5, 1.0, 0.1])
    optimizer = torch.optim.Adam(plain.parameters())
    for (images, labels, _), rate in zip(steps, (0.005, 0.01, 0.001)):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        F.cross_entropy(plain(images), labels).backward()
        optimizer.step()
    assert torch.allclose(ours[1].weight, plain[1].weight, atol=1e-6)


def test_metrics_depend_neither_on_batches_nor_on_processes(small_network, monkeypatch):
    """With four processes the last step of one photo leaves three of them without any."""
    photos = photos_of(pixels := random_pixels(21), torch.randint(0, 4, (21,)))
    model = a_model(hold_batchnorm=True).eval()
    logits = model.network(normalised(pixels)).detach()
    expected = (F.cross_entropy(logits, photos.labels).item(),
                (logits.argmax(1) == photos.labels).float().mean().item())
    Q3.cache_maps(model, [photos])
    still = torch.optim.SGD([{"params": list(model.parameters()), "initial_lr": 0.0}])
    monkeypatch.setattr(Q3, "summed", lambda tensor: tensor)
    for size, processes in ((1, 1), (3, 1), (7, 1), (20, 1), (64, 1), (1, 4), (5, 4), (64, 4)):
        monkeypatch.setattr(Q3, "WORLD_SIZE", processes)
        trained, found = np.zeros(2), 0
        for rank in range(processes):
            monkeypatch.setattr(Q3, "RANK", rank)
            loader = Q3.batches(model, photos, size, "", torch.randperm(
                21, generator=torch.Generator().manual_seed(size)))
            trained += Q3.train_epoch(model, loader, still, NO_SCALER, [1.0] * math.ceil(21 / size))
            found += Q3.predict(model, photos, size, "")
        assert trained == pytest.approx(expected, abs=1e-5)
        assert Q3.loss_and_accuracy(found, photos.labels) == pytest.approx(expected, abs=1e-5)


def test_learning_rates_rise_and_then_fall_to_nothing():
    rates = [Q3.warmup_cosine(step, 150) for step in range(150)]
    top = rates.index(max(rates))
    assert 13 <= top <= 16 and 0.9 < max(rates) <= 1 and 0 < rates[0] < 0.1 > 100 * rates[-1] > 0
    assert rates[:top + 1] == sorted(rates[:top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert all(0 < Q3.warmup_cosine(step, steps) <= 1
               for steps in (1, 2, 3, 9) for step in range(steps))


def test_each_step_is_made_with_its_rate(quick_run, monkeypatch):
    calls = record(monkeypatch, "train_epoch")
    rates, step = [], torch.optim.Adam.step
    def recorded(optimizer, *args, **options):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer, *args, **options)
    monkeypatch.setattr(torch.optim.Adam, "step", recorded)
    quick_run("tuned", "--epochs", 2)
    factors = [factor for *_, factors in calls for factor in factors]
    assert factors == [Q3.warmup_cosine(step, 6) for step in range(6)]
    assert rates == [[factor * 1e-3, factor * 1e-4] for factor in factors]
    rates.clear()
    quick_run("b", "--epochs", 2, "--recipe", "reference")
    assert rates == [[1e-3, 1e-4]] * 6


def test_head_starts_at_the_optimum_of_logistic_regression(small_network):
    """There is no gradient there, and the network gives its logits."""
    photos, model = photos_of(pixels := random_pixels(40)), a_model()
    result = Q3.fit_head(model, photos, 16)
    logits = Q3.predict(model, photos, 16, "")
    assert Q3.loss_and_accuracy(logits, photos.labels) == pytest.approx(result, abs=1e-4)
    assert result[1] > 0.9
    with torch.no_grad():
        features = model.features(model.maps(pixels).permute(0, 3, 1, 2))
    centred = features - features.mean(0)
    scale = (centred.std() * (centred.std(0) + centred.std() / 1000)).sqrt()
    weight, bias = (each.detach().clone().requires_grad_() for each in model.head.parameters())
    loss = F.cross_entropy(features @ weight.T + bias, photos.labels)
    (loss + Q3.PENALTY * (weight * scale).square().sum()).backward()
    assert bias.grad.abs().max() < 1e-3 and (weight.grad / scale).abs().max() < 1e-3


def test_head_is_softened_once_before_the_layers_below_learn(quick_run, monkeypatch):
    heads, train_epoch = [], Q3.train_epoch
    def recorded(learner, *args):
        heads.append([value.detach().clone() for value in learner.head.parameters()])
        return train_epoch(learner, *args)
    monkeypatch.setattr(Q3, "train_epoch", recorded)
    monkeypatch.setattr(Q3, "best_epoch", lambda history: 0)
    start = load(quick_run("tuned", "--epochs", 2) / "best.pt")["model"]
    for name, first, second in zip(("fc.weight", "fc.bias"), *heads, strict=True):
        assert torch.equal(first, Q3.SOFTER * start[name])
        assert torch.allclose(second, first, atol=0.01), "three steps of 1e-3"
    assert not torch.allclose(heads[1][1], Q3.SOFTER * heads[0][1], atol=0.01)
    heads.clear()
    monkeypatch.setattr(Q3, "best_epoch", lambda history: 1)
    quick_run("reference", "--recipe", "reference")
    assert 0.04 < heads[0][0].abs().max() < 0.0443, "noise within 1 / sqrt(512), as it was"


def test_features_that_say_nothing_are_an_error(small_network, shared_data, refused):
    for value, bias in ((float("nan"), 0.0), (0.0, 0.0), (0.0, torch.arange(512.0) / 300)):
        state = load("small.pth")
        state["layer4.0.bn3.weight"].fill_(value)
        state["layer4.0.downsample.1.weight"].fill_(value)
        state["layer4.0.bn3.bias"].copy_(torch.as_tensor(bias))
        torch.save(state, "spoilt.pth")
        assert "features equal or not finite" in refused(
            "Q3.py", "--data", shared_data, *QUICK, "--weights", "spoilt.pth", "--out", "out")


def test_loss_that_is_not_finite_never_reaches_a_checkpoint(quick_run, shared_data, monkeypatch,
                                                            refused):
    def spoilt(model, photos, batch_size, title, *rest, batches=Q3.batches):
        for maps, labels, count in batches(model, photos, batch_size, title, *rest):
            yield maps * (math.nan if title == "epoch 2/3" else 1), labels, count
    monkeypatch.setattr(Q3, "batches", spoilt)
    line = refused("Q3.py", "--data", shared_data, *QUICK, "--epochs", 3, "--out", "out")
    for words in ("loss of epoch 2 is not finite", "--lr-head", "--amp off"):
        assert words in line
    last = load("out/last.pt")
    assert last["epoch"] == 1 and [row["epoch"] for row in last["history"]] == [0, 1]
    assert all(value.isfinite().all() for value in last["model"].values())
    results = iter([(1.0, 0.5), (1.0, 0.5), (math.inf, 0.5)])  # of validation in epoch 1
    monkeypatch.setattr(Q3, "loss_and_accuracy", lambda *_: next(results))
    assert "loss of epoch 1 is" in refused("Q3.py", "--data", shared_data, *QUICK, "--out", "two")
    assert load("two/last.pt")["epoch"] == 0


def test_temperature_undoes_what_logits_were_multiplied_with():
    torch.manual_seed(0)
    logits = 2 * torch.randn(4000, 5)
    labels = torch.distributions.Categorical(logits=logits).sample()
    temperature, loss = Q3.fit_temperature(logits, labels)
    assert temperature == pytest.approx(1, abs=0.1)
    assert loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-3)
    tripled, same_loss = Q3.fit_temperature(3 * logits, labels)
    assert tripled == pytest.approx(3 * temperature, rel=0.02)
    assert same_loss == pytest.approx(loss, rel=1e-4), "too much confidence changes nothing"
    few, _ = Q3.fit_temperature(2 * torch.eye(3), torch.arange(3))
    assert 0.7 < few < 1, "few photos say little"


def test_validation_decides_the_temperature_of_the_test(quick_run, monkeypatch):
    seen, temperatures = [], iter([2.0, 4.0])
    with monkeypatch.context() as patch:
        patch.setattr(Q3, "fit_temperature", lambda logits, labels: (
            seen.append(labels), (next(temperatures), 0.5))[1])
        patch.setattr(Q3, "best_epoch", lambda history: 0)
        out = quick_run("tuned")
    split = json.loads((out / "split.json").read_text())
    names = [path.split("/")[0] for path in split["val"]]
    assert all([split["classes"][label] for label in labels] == names for labels in seen)
    assert json.loads((out / "test.json").read_text())["temperature"] == 2.0
    assert (load(out / "best.pt")["temperature"], load(out / "last.pt")["temperature"]) == (2, 4)
