"""Q3.py: the whole job as a user types it, what always holds, every flag, and what is said about bad input."""

import csv
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torchvision import transforms

import benchmark_kills
import dataset_split
import Q3
from conftest import COLOURS, QUICK, ROOT, call, draw_data, draw_photo, forked, small_resnet, type_command

CPU = torch.device("cpu")


def load(file: Path) -> dict:
    return torch.load(file, weights_only=True)


def decoded(files: list[Path], size: int, workers: int = 1) -> torch.Tensor:
    store = Q3.pixel_store(Path("decoded"), files[0].parent, Q3.file_facts(files), size, None)
    assert Q3.decode(files, torch.arange(len(files)), store, workers, None) == {}
    return store[torch.arange(len(files))]


def a_store(name: str, rows: int, *shape: int, dtype: torch.dtype = torch.uint8) -> Q3.Store:
    return Q3.Store(Path("stores"), name, ("facts",), rows, shape, dtype)


def photos_of(pixels: torch.Tensor, labels: torch.Tensor, freeze: int = 6) -> Q3.Photos:
    """Photos with these pixels, and a new network to look at them."""
    store = a_store("pixels", len(pixels), *pixels.shape[1:])
    store.write(torch.arange(len(pixels)), pixels)
    torch.manual_seed(0)
    model = Q3.FineTuned(Q3.build_network("none", 4), freeze)
    return Q3.Photos(model, store, torch.arange(len(pixels)), labels)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    return (pixels.permute(0, 3, 1, 2) / 255 - torch.tensor(Q3.MEAN).view(3, 1, 1)) / torch.tensor(Q3.STD).view(3, 1, 1)


@pytest.fixture(scope="module")
def run(shared_data, weights, tmp_path_factory):
    """One whole job, typed as a user would: what it printed and the folder it left behind."""
    out = tmp_path_factory.mktemp("run") / "first"
    done = type_command("Q3.py", "--data", shared_data, "--weights", weights, "--fraction", 1.0, "--image-size", 64, "--epochs", 3,
                        "--batch-size", 10, "--seed", 1, "--device", "cpu", "--amp", "off", "--out", out, cwd=out.parent)
    assert done.returncode == 0, done.stderr
    return done, out


@pytest.fixture
def quick_run(small_network, shared_data, tmp_path):
    """Run the job inside this process with a small network; gives the run's folder."""
    def quick_run(name: str, *flags, data=shared_data) -> Path:
        assert call("Q3.py", "--data", data, *QUICK, *flags, "--out", tmp_path / name) == 0
        return tmp_path / name
    return quick_run


# -- the whole job ----------------------------------------------------------------------------------------------------

def test_job_prints_banner_table_and_test_result(run):
    done, out = run
    assert not done.stderr, "progress bars are for terminals"
    for part in ("24 training, 6 validation, 12 test", "3 classes", "22,069,251 trainable", "1,444,928 frozen", "cpu", "float32",
                 "3 an epoch, 9 in all", "--fraction 1)", str(out)):
        assert part in done.stdout
    lines = done.stdout.splitlines()
    head = lines.index("Epoch | Train Loss | Train Acc | Val Loss | Val Acc")
    for epoch, (line, row) in enumerate(zip(lines[head + 1:head + 5], read_csv(out / "history.csv"), strict=True)):
        shown = [float(cell) for cell in line.split("|")]
        assert shown[0] == epoch and len(line) == len(lines[head])
        assert shown[1:] == [round(float(row[key]), 4) for key in ("train_loss", "train_acc", "val_loss", "val_acc")]
    report = json.loads((out / "test.json").read_text())
    assert f"accuracy {report['accuracy']:.4f}" in done.stdout and "95 % interval" in done.stdout
    for name in COLOURS:
        assert re.search(rf"^{name} +\|      4 \|", done.stdout, re.MULTILINE)


def read_csv(file: Path) -> list[dict]:
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))


def test_job_leaves_the_run_folder_of_the_readme(run, shared_data):
    out = run[1]
    assert sorted(os.listdir(out)) == ["best.pt", "config.json", "confusion.png", "curves.png", "history.csv", "last.pt", "mistakes.png", "predictions.csv",
                                       "reliability.png", "split.json", "test.json"]
    assert list(read_csv(out / "history.csv")[0]) == ["epoch", "train_loss", "train_acc", "val_loss", "val_acc", "lr_head",
                                                      "lr_backbone", "seconds", "images_per_second"]
    photos = dataset_split.list_photos(shared_data / "train")
    assert dataset_split.read_manifest(out / "split.json", photos) == dataset_split.split(photos, 1.0, 0.2, 1)
    config = json.loads((out / "config.json").read_text())
    assert config["options"]["seed"] == 1 and config["versions"]["torch"] == torch.__version__ and config["device"] == "cpu"


def test_files_of_the_test_agree_with_each_other(run, shared_data):
    out = run[1]
    rows, report = read_csv(out / "predictions.csv"), json.loads((out / "test.json").read_text())
    assert [row["path"] for row in rows] == sorted(path.relative_to(shared_data / "val").as_posix() for path in (shared_data / "val").rglob("*.jpg"))
    assert all(row["label"] == row["path"].split("/")[0] for row in rows)
    assert report["accuracy"] == sum(row["label"] == row["predicted"] for row in rows) / 12
    for i, label in enumerate(report["classes"]):
        for j, guess in enumerate(report["classes"]):
            assert report["confusion"][i][j] == sum((row["label"], row["predicted"]) == (label, guess) for row in rows)
    assert all(1 / 3 <= float(row["confidence"]) <= 1 for row in rows)


def test_reported_test_result_is_that_of_best_pt(run, shared_data):
    """Score best.pt with torchvision and Pillow alone: it is usable without this script, and test.json tells the truth."""
    out = run[1]
    checkpoint, report = load(out / "best.pt"), json.loads((out / "test.json").read_text())
    network = torchvision.models.resnet50(num_classes=3)
    network.load_state_dict(checkpoint["model"])
    use = checkpoint["preprocessing"]
    prepare = transforms.Compose([transforms.ToTensor(), transforms.Normalize(use["mean"], use["std"])])
    for row in read_csv(out / "predictions.csv"):
        image = Image.open(shared_data / "val" / row["path"]).convert("RGB")
        image = ImageOps.fit(image, (64, 64), Image.Resampling.BILINEAR, use["border"])
        with torch.no_grad():
            shares = (network.eval()(prepare(image)[None]) / checkpoint["temperature"]).softmax(1)[0]
        assert checkpoint["classes"][int(shares.argmax())] == row["predicted"]
        assert float(shares.max()) == pytest.approx(float(row["confidence"]), abs=2e-3)
    best = max(checkpoint["history"], key=lambda row: (row["val_acc"], -row["val_loss"]))
    assert report["epoch"] == checkpoint["epoch"] == best["epoch"]


@pytest.mark.parametrize("recipe", ["tuned", "reference"])
def test_the_readme_tells_how_to_use_a_checkpoint(weights, shared_data, tmp_path, capsys, monkeypatch, recipe):
    monkeypatch.setattr(Q3, "temperature_of", lambda *_: 3.0)
    code, = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert call("Q3.py", "--data", shared_data, *QUICK, "--weights", weights, "--image-size", 64, "--recipe", recipe, "--out", "runs/first") == 0
    row = read_csv(tmp_path / "runs/first/predictions.csv")[5]
    shutil.copy(shared_data / "val" / row["path"], "frog.jpg")
    capsys.readouterr()
    exec(code, {})
    name, confidence = capsys.readouterr().out.split()
    assert name == row["predicted"] and float(confidence) == pytest.approx(float(row["confidence"]), abs=2e-3)


def test_best_epoch_is_kept_and_is_the_one_that_is_tested(quick_run, monkeypatch):
    probed, test = (0.1, 0.9), (0.5, 0.5)
    measured = iter([probed, (0.1, 0.4), (0.1, 0.5), (0.7, 0.8), (0.6, 0.8), (0.65, 0.8), test])  # loss, accuracy; of epochs 0 to 4
    monkeypatch.setattr(Q3, "loss_and_accuracy", lambda logits, labels: next(measured))
    heads = []
    def recorded(model, loader, layers=None, predict=Q3.predict):
        heads.append(model.head.weight.detach().clone())
        return predict(model, loader, layers)
    monkeypatch.setattr(Q3, "predict", recorded)
    out = quick_run("out", "--epochs", 4)
    best, last = load(out / "best.pt"), load(out / "last.pt")
    assert (best["epoch"], last["epoch"]) == (3, 4) and json.loads((out / "test.json").read_text())["epoch"] == 3
    assert torch.equal(heads[-1], best["model"]["fc.weight"]) and not torch.equal(heads[-1], last["model"]["fc.weight"])


def test_job_trains_on_the_training_photos_alone_and_in_another_order_each_epoch(quick_run, monkeypatch):
    passes = []
    def recorded(photos, which, *rest, batches=Q3.batches, **options):
        passes.append(which.tolist())
        return batches(photos, which, *rest, **options)
    monkeypatch.setattr(Q3, "batches", recorded)
    quick_run("out", "--epochs", 2)
    probed, probed_mirrored, val_before, first, val, second, val_again, test_pass = passes
    assert probed == probed_mirrored == list(range(24)) and val_before == val
    assert sorted(first) == sorted(second) == list(range(24)) and first != second
    assert val == val_again == list(range(24, 30)) and test_pass == list(range(12))


def test_history_has_the_validation_result_of_the_photos_in_split_json(run, shared_data):
    out = run[1]
    checkpoint, paths = load(out / "best.pt"), json.loads((out / "split.json").read_text())["val"]
    network = torchvision.models.resnet50(num_classes=3)
    network.load_state_dict(checkpoint["model"])
    photos = [ImageOps.fit(Image.open(shared_data / "train" / path), (64, 64), Image.Resampling.BILINEAR, 1 / 16) for path in paths]
    images = normalised(torch.from_numpy(np.stack(photos)))
    labels = torch.tensor([checkpoint["classes"].index(path.split("/")[0]) for path in paths])
    with torch.no_grad():
        loss = nn.functional.cross_entropy(network.eval()(images), labels).item()
    assert loss == pytest.approx(checkpoint["history"][-1]["val_loss"], rel=1e-3)


def test_training_steps_are_those_of_the_plain_loop():
    """Three steps of Adam on a linear layer, each with its share of the learning rate, written out."""
    torch.manual_seed(0)
    steps = [(torch.randn(4, 3, 4, 4), torch.randint(0, 3, (4,)), 4) for _ in range(3)]
    ours, plain = nn.Sequential(nn.Flatten(), nn.Linear(48, 3)), nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    plain.load_state_dict(ours.state_dict())
    optimizer = torch.optim.Adam([{"params": list(ours.parameters()), "initial_lr": 0.01}])
    Q3.train_epoch(ours, steps, optimizer, torch.amp.GradScaler("cpu", enabled=False), [0.5, 1.0, 0.1], torch.zeros(2))
    optimizer = torch.optim.Adam(plain.parameters())
    for (images, labels, _), rate in zip(steps, (0.005, 0.01, 0.001)):
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(images), labels).backward()
        optimizer.step()
    assert torch.allclose(ours[1].weight, plain[1].weight, atol=1e-6)


def test_learning_rates_rise_and_then_fall_to_nothing():
    rates = [Q3.rise_and_fall(step, 150) for step in range(150)]
    top = rates.index(max(rates))
    assert 13 <= top <= 16 and 0.9 < max(rates) <= 1 and 0 < rates[0] < 0.1 and 0 < rates[-1] < 0.001
    assert rates[:top + 1] == sorted(rates[:top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert all(0 < Q3.rise_and_fall(step, steps) <= 1 for steps in (1, 2, 3, 9) for step in range(steps))


def test_each_step_is_made_with_its_rate(quick_run, monkeypatch):
    used = []
    def recorded(model, loader, optimizer, scaler, shares, *rest, train_epoch=Q3.train_epoch):
        used.append(shares)
        return train_epoch(model, loader, optimizer, scaler, shares, *rest)
    monkeypatch.setattr(Q3, "train_epoch", recorded)
    rows = read_csv(quick_run("tuned", "--epochs", 2) / "history.csv")
    assert [float(row["lr_head"]) for row in rows] == [0, *(1e-4 * shares[-1] for shares in used)]
    assert used[0] + used[1] == [Q3.rise_and_fall(step, 6) for step in range(6)]
    used.clear()
    rows = read_csv(quick_run("reference", "--epochs", 2, "--recipe", "reference") / "history.csv")
    assert used == [[1.0] * 3] * 2 and {row["lr_backbone"] for row in rows} == {"0.0001"}


@pytest.mark.parametrize("flags, rates", [((), (1e-4, 1e-5)), (("--recipe", "reference"), (1e-3, 1e-4)), (("--weights", "none"), (1e-3, 1e-4)), (("--from-scratch",), (1e-3, 1e-3)),
                                          (("--lr-head", "0.5"), (0.5, 1e-5)), (("--lr-backbone", "0.5"), (1e-4, 0.5))])
def test_default_learning_rates_are_those_of_the_start_of_the_head(flags, rates):
    args = Q3.get_args(list(flags))
    assert (args.lr_head, args.lr_backbone) == rates


def test_head_starts_from_logistic_regression(small_network):
    """On the photos and their mirror images: its gradient is nothing, and the network's logits are those of the regression."""
    photos = photos_of(torch.randint(0, 256, (40, 32, 32, 3), dtype=torch.uint8), torch.arange(40) % 4)
    model, everything = photos.model, torch.arange(40)
    photos.keep(6, 10.0)
    def loaders():
        return [Q3.batches(photos, everything, 16, "", mirrored=mirrored) for mirrored in (False, True)]
    loss, accuracy = Q3.probe(model, loaders(), photos.labels)
    logits = Q3.predict(model, loaders()[0])
    assert Q3.loss_and_accuracy(logits, photos.labels) == pytest.approx((loss, accuracy), abs=1e-4) and accuracy > 0.9
    features = torch.cat([Q3.predict(model, loader, model.features) for loader in loaders()])
    scale = Q3.spread_of(features - features.mean(0))
    weight, bias = (value.detach().clone().requires_grad_() for value in model.head.parameters())
    (nn.functional.cross_entropy(features @ weight.T + bias, photos.labels.repeat(2)) + Q3.PENALTY * (weight * scale).square().sum()).backward()
    assert bias.grad.abs().max() < 1e-3 and (weight.grad / scale).abs().max() < 1e-2


def test_spread_of_a_feature_is_half_way_between_its_own_and_that_of_all():
    features = torch.randn(1000, 3) * torch.tensor([1.0, 4.0, 0.0])
    assert Q3.spread_of(features) == pytest.approx((features.std() * features.std(0)).sqrt(), rel=0.01, abs=0.1)
    assert Q3.spread_of(features).min() > 0 and Q3.spread_of(100 * features) == pytest.approx(100 * Q3.spread_of(features))


def test_mirrored_photos_have_left_and_right_exchanged(small_network):
    photos = photos_of(torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8), torch.arange(3))
    everything = torch.arange(3)
    photos.keep(6, 10.0)
    assert torch.allclose(photos.look(everything, mirrored=True)[0], photos.model.maps(photos.pixels[everything].flip(2)), atol=1e-5)
    assert not torch.allclose(photos.look(everything, mirrored=True)[0], photos.look(everything)[0], atol=0.1)


def test_row_of_epoch_0_is_the_network_before_its_first_step(quick_run, shared_data, monkeypatch):
    """Of whole photos, by torchvision's layers; all but fc is still as in the weights."""
    out = quick_run("out", "--epochs", 2, "--lr-backbone", 0.1)
    best_possible = load(out / "last.pt")["history"]
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(Q3, "train_epoch", stop)
    options = Q3.get_args(list(map(str, ["--data", shared_data, *QUICK, "--out", "before"])))
    with pytest.raises(KeyboardInterrupt):
        Q3.main(options)
    checkpoint, split, started = load(Path("before/last.pt")), json.loads(Path("before/split.json").read_text()), load(Path("small.pth"))
    assert checkpoint["history"][0] == {**best_possible[0], **{key: checkpoint["history"][0][key] for key in ("seconds", "images_per_second")}}
    assert [row["epoch"] for row in best_possible] == [0, 1, 2] and checkpoint["history"][0]["lr_head"] == 0
    assert all(torch.equal(value, started[name]) for name, value in checkpoint["model"].items() if not name.startswith("fc.") and "num_batches" not in name)
    network = Q3.resnet50()
    network.fc = nn.Linear(network.fc.in_features, 3)
    network.load_state_dict(checkpoint["model"])
    for part in ("train", "val"):
        pixels = torch.from_numpy(np.stack([Q3.read_photo(shared_data / "train" / path, 32, Q3.BORDER) for path in split[part]]))
        labels = torch.tensor([checkpoint["classes"].index(path.split("/")[0]) for path in split[part]])
        with torch.no_grad():
            loss, accuracy = Q3.loss_and_accuracy(network.eval()(normalised(pixels)), labels)
        assert loss == pytest.approx(checkpoint["history"][0][f"{part}_loss"], rel=1e-2)
        assert accuracy == checkpoint["history"][0][f"{part}_acc"]
    assert checkpoint["history"][0]["train_acc"] > 0.9


def test_test_result_is_on_disk_before_it_is_printed(small_network, shared_data, tmp_path, monkeypatch):
    def unprintable(*_):
        raise UnicodeEncodeError("cp1252", "", 0, 1, "")
    monkeypatch.setattr(Q3, "print_report", unprintable)
    with pytest.raises(UnicodeEncodeError):
        call("Q3.py", "--data", shared_data, *QUICK, "--out", tmp_path)
    assert (tmp_path / "test.json").exists() and (tmp_path / "predictions.csv").exists()


def test_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_good(quick_run, shared_data, tmp_path, monkeypatch, refused):
    """In the second epoch's second step one photo's maps turn into nothing."""
    def spoilt(photos, which, batch_size, title, *rest, batches=Q3.batches, **options):
        for step, (maps, labels, count) in enumerate(batches(photos, which, batch_size, title, *rest, **options)):
            maps[3] = float("nan") if (title, step) == ("epoch 2/3", 1) else maps[3]
            yield maps, labels, count
    monkeypatch.setattr(Q3, "batches", spoilt)
    line = refused("Q3.py", "--data", shared_data, *QUICK, "--epochs", 3, "--out", "out", "--save-minutes", 0)
    order, _ = Q3.draw_epoch(24, 0, 2)
    paths = json.loads(Path("out/split.json").read_text())["train"]
    rows, spoilt_photo = read_csv(Path("out/not_finite.csv")), str(shared_data / "train" / paths[order[8 + 3]])
    assert [row["path"] for row in rows] == [str(shared_data / "train" / paths[index]) for index in order[8:16]]
    assert [row["path"] for row in rows if row["loss"] == "nan"] == [spoilt_photo]
    for part in ("the loss of epoch 2 is not a finite number in step 2,", f"'{spoilt_photo}' and 0 more of the 8", "learning rates 6.8e-05 and 6.8e-06", "lower --lr-head",
                 "up to epoch 1", "'out'"):
        assert part in line
    assert "--resume" not in line, "it would meet the same loss again"
    checkpoint = load(Path("out/last.pt"))
    assert (checkpoint["epoch"], checkpoint["step"]) == (1, 1) and all(value.isfinite().all() for value in checkpoint["model"].values())
    assert load(Path("out/best.pt"))["epoch"] <= 1


def test_validation_loss_that_is_not_finite_stops_the_run_too(small_network, shared_data, monkeypatch, refused):
    results = iter([(1.0, 0.5), (1.0, 0.5), (float("inf"), 0.5)])  # of the start of fc, of epochs 0 and 1
    monkeypatch.setattr(Q3, "loss_and_accuracy", lambda *_: next(results))
    assert "the loss of epoch 1 is not a finite number" in refused("Q3.py", "--data", shared_data, *QUICK, "--out", "out")
    assert load(Path("out/last.pt"))["epoch"] == 0


def test_test_photos_are_first_read_when_training_is_over(small_network, data, tmp_path, refused):
    (data / "val" / "Fungi" / "01.jpg").write_bytes(b"damaged")
    line = refused("Q3.py", "--data", data, *QUICK, "--out", tmp_path / "out")
    assert str(data / "val" / "Fungi" / "01.jpg") in line
    assert f"Training is done, and its best epoch is safe in '{tmp_path / 'out' / 'best.pt'}'" in line
    assert load(tmp_path / "out" / "last.pt")["epoch"] == 1 and not (tmp_path / "out" / "test.json").exists()


# -- what always holds ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("file", ["best.pt", "last.pt"])
def test_frozen_children_stay_bit_identical_and_all_others_move(run, weights, file):
    before, checkpoint = load(weights), load(run[1] / file)
    after = checkpoint["model"]
    assert before.keys() == after.keys()
    for name in (name for name in before if not name.endswith("num_batches_tracked")):
        frozen = name.split(".")[0] in ("conv1", "bn1", "layer1", "layer2")
        held = "running_" in name  # by the tuned recipe, in all layers
        held = held or checkpoint["epoch"] == 0 and not name.startswith("fc.")  # before the first step
        assert (frozen or held) == torch.equal(before[name], after[name]), name


@pytest.mark.parametrize("freeze", range(10))
def test_optimiser_holds_exactly_the_parameters_that_learn(freeze):
    network = Q3.build_network("none", 10)
    head, backbone = Q3.build_optimizer(Q3.FineTuned(network, freeze), 1e-3, 1e-4).param_groups
    learning = [parameter for child in list(network.children())[freeze:] for parameter in child.parameters()]
    assert {id(parameter) for parameter in network.parameters() if parameter.requires_grad} == {id(p) for p in learning}
    in_groups = [id(parameter) for group in (head, backbone) for parameter in group["params"]]
    assert sorted(in_groups) == sorted(id(parameter) for parameter in learning), "each in one group, once"
    assert {id(parameter) for parameter in head["params"]} == {id(parameter) for parameter in network.fc.parameters()}
    assert (head["lr"], backbone["lr"]) == (head["initial_lr"], backbone["initial_lr"]) == (1e-3, 1e-4)


def test_default_freeze_lets_layer3_layer4_and_fc_learn():
    network = Q3.build_network("none", 10)
    Q3.FineTuned(network, Q3.get_args([]).freeze)
    assert {name.split(".")[0] for name, parameter in network.named_parameters() if parameter.requires_grad} == {"layer3", "layer4", "fc"}


def test_frozen_children_stay_in_eval_mode_and_build_no_graph():
    model = Q3.FineTuned(Q3.build_network("none", 3), 6)
    for mode in (True, False, True):
        model.train(mode)
        assert not any(module.training for child in list(model.network.children())[:6] for module in child.modules())
        assert all(module.training == mode for module in model.backbone.modules())
    maps = model.maps(torch.zeros(2, 64, 64, 3, dtype=torch.uint8))
    assert maps.shape == (2, 512, 8, 8) and not maps.requires_grad and model(maps).requires_grad
    assert not any(parameter.requires_grad for parameter in model.trunk.parameters())


def test_held_batchnorm_keeps_its_statistics_and_learns_scale_and_shift(small_network):
    model = Q3.FineTuned(Q3.build_network("none", 3), 6, hold_batchnorm=True)
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    optimizer, maps = Q3.build_optimizer(model, 0.1, 0.1), torch.randn(4, 128, 8, 8)
    Q3.train_epoch(model, [(maps, torch.tensor([0, 1, 2, 0]), 4)], optimizer, torch.amp.GradScaler("cpu", enabled=False), [1.0], torch.zeros(2))
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, before[name]) == ("running" in name or "num_batches" in name), name


def test_statistics_of_batchnorm_are_held_by_the_tuned_recipe_if_there_are_any(quick_run):
    for recipe, spec, held in (("reference", "small.pth", False), ("tuned", "small.pth", True), ("tuned", "none", False)):
        state = load(quick_run(f"{recipe}-{spec}", "--recipe", recipe, "--weights", spec) / "last.pt")["model"]
        before = load(Path("small.pth"))["layer4.0.bn1.running_mean"] if spec != "none" else torch.zeros(())
        assert bool((state["layer4.0.bn1.running_mean"] == before).all()) == held, (recipe, spec)


@pytest.mark.parametrize("freeze", range(10))
def test_the_cut_network_computes_what_the_whole_one_does(weights, freeze):
    """Also with every BatchNorm of the trunk folded into the convolution before it."""
    network = Q3.build_network(str(weights), 5).eval()
    model = Q3.FineTuned(network, freeze).eval()
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.trunk.modules()) or freeze == 0
    with torch.no_grad():
        assert torch.allclose(model(model.maps(pixels)), network(normalised(pixels)), rtol=1e-4, atol=1e-4)


def test_metrics_do_not_depend_on_the_batches(small_network):
    pixels, labels = torch.randint(0, 256, (23, 32, 32, 3), dtype=torch.uint8), torch.randint(0, 4, (23,))
    photos = photos_of(pixels, labels)
    model = photos.model
    model.hold_batchnorm = True
    logits = model.network.eval()(normalised(pixels)).detach()
    expected = nn.functional.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).float().mean().item()
    standing_still, scaler = torch.optim.SGD([{"params": list(model.parameters()), "initial_lr": 0.0}]), torch.amp.GradScaler("cpu", enabled=False)
    for batch_size in (1, 3, 7, 22, 64):
        loader = Q3.batches(photos, torch.randperm(23), batch_size, "")
        totals = torch.zeros(2)
        Q3.train_epoch(model, loader, standing_still, scaler, [1.0] * math.ceil(23 / batch_size), totals)
        assert (totals / 23).tolist() == pytest.approx(expected, abs=1e-5)
        logits = Q3.predict(model, Q3.batches(photos, torch.arange(23), batch_size, ""))
        assert Q3.loss_and_accuracy(logits, labels) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("photos, batch_size, sizes", [
    (65, 64, [33, 32]), (128, 64, [64, 64]), (5, 64, [5]), (1999, 64, [63] * 15 + [62] * 17), (3, 1, [1, 1, 1])])
def test_batches_share_the_photos_evenly(photos, batch_size, sizes):
    class Looked:
        def look(self, which, places, mirrored):
            return places, which
    which, places = torch.arange(photos).flip(0), torch.rand(photos, 2)
    seen = list(Q3.batches(Looked(), which, batch_size, "", places))
    assert [len(labels) for _, labels, _ in seen] == [count for *_, count in seen] == sizes
    assert torch.equal(torch.cat([labels for _, labels, _ in seen]), which)
    assert torch.equal(torch.cat([places for places, *_ in seen]), places)


def test_every_epoch_shuffles_and_crops_anew_and_the_same_way_each_time():
    def drawn(seed, epoch):
        order, places = Q3.draw_epoch(50, seed, epoch)
        assert sorted(order.tolist()) == list(range(50)) and 0 <= places.min() <= places.max() < 1
        return tuple(order.tolist()), tuple(places.flatten().tolist())
    draws = {(seed, epoch): drawn(seed, epoch) for seed in (0, 1) for epoch in (1, 2)}
    assert len({order for order, _ in draws.values()}) == len({places for _, places in draws.values()}) == 4
    torch.manual_seed(99)
    assert draws[0, 1] == drawn(0, 1)


def test_same_seed_same_run(quick_run, capsys):
    def printed(*names_and_flags):
        out = quick_run(*names_and_flags)
        text = capsys.readouterr().out
        return re.findall(r"^.*\|.*$", text, re.MULTILINE), load(out / "last.pt")["model"]
    first, again, other = printed("a", "--epochs", 2), printed("b", "--epochs", 2), printed("c", "--epochs", 2, "--seed", 1)
    assert first[0] == again[0] != other[0]
    assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])


def test_checkpoint_holds_plain_values_on_the_cpu_and_all_that_resuming_needs(run):
    checkpoint = load(run[1] / "last.pt")
    assert checkpoint["classes"] == list(COLOURS)
    assert checkpoint["preprocessing"]["image_size"] == 64 and checkpoint["options"]["weights"].endswith(".pth")
    assert [row["epoch"] for row in checkpoint["history"]] == [0, 1, 2, 3]
    optimizer = Q3.build_optimizer(Q3.FineTuned(Q3.build_network("none", 3), 6), 1, 1)
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert [group["initial_lr"] for group in optimizer.param_groups] == [1e-4, 1e-5]
    assert all(state["step"] == 9 for state in optimizer.state.values())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("[enforce fail] unexpected pos 64 vs 0")])
def test_failed_save_leaves_the_last_good_checkpoint(tmp_path, monkeypatch, error):
    Q3.save_checkpoint(tmp_path / "last.pt", {"epoch": 2})

    def full(value, stream):
        stream.write(b"half a check")
        raise error
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(dataset_split.InputError, match="last.pt' can't be written"):
        Q3.save_checkpoint(tmp_path / "last.pt", {"epoch": 3})
    assert load(tmp_path / "last.pt") == {"epoch": 2} and os.listdir(tmp_path) == ["last.pt"]


def test_interruption_while_saving_is_an_interruption(tmp_path, monkeypatch):
    def interrupted(value, stream):
        with torch.serialization._open_zipfile_writer(stream):
            raise KeyboardInterrupt
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Q3.save_checkpoint(tmp_path / "last.pt", {"epoch": 3})
    assert os.listdir(tmp_path) == []


def test_row_is_on_disk_before_it_is_on_screen(small_network, shared_data, tmp_path, monkeypatch):
    def printed(*args, **options):
        if args and re.match(r"    \d \|", args[0]):
            assert load(tmp_path / "last.pt")["epoch"] == int(args[0][:5]) == len(read_csv(tmp_path / "history.csv")) - 1
            assert load(tmp_path / "best.pt")["epoch"] <= int(args[0][:5])
            printed.rows += 1
    printed.rows = 0
    monkeypatch.setattr("builtins.print", printed)
    assert call("Q3.py", "--data", shared_data, *QUICK, "--out", tmp_path) == 0 and printed.rows == 2


def test_head_starts_small_and_new_whatever_the_weights_held(weights, tmp_path):
    network = Q3.build_network(str(weights), 10)
    assert network.fc.weight.shape == (10, 2048) and network.fc.weight.abs().max() <= 2048 ** -0.5
    state = {name: value for name, value in load(weights).items() if not name.endswith("num_batches_tracked")}
    state["fc.weight"], state["fc.bias"] = torch.randn(7, 2048), torch.randn(7)
    state["bn1.num_batches_tracked"] = torch.zeros(4)
    for wrapper in ("model", "state_dict"):
        torch.save({wrapper: state, "epoch": 3}, tmp_path / "checkpoint.pt")
        again = Q3.build_network(str(tmp_path / "checkpoint.pt"), 10).state_dict()
        assert all(torch.equal(value, again[name]) for name, value in state.items() if not name.startswith(("fc.", "bn1.num")))


# -- photos as they come ----------------------------------------------------------------------------------------------

def halves(left, right) -> Image.Image:
    """A picture whose left half has one colour and whose right half has another."""
    image = Image.new("RGB", (80, 60), right)
    image.paste(left, (0, 0, 40, 60))
    return image


def colours_of(file: Path) -> list[tuple]:
    photo = Q3.read_photo(file, 40, None)
    assert photo.shape == (40, 40, 3) and photo.dtype == np.uint8
    return [photo[20, 8].tolist(), photo[20, 32].tolist()]


@pytest.mark.parametrize("mode, name", [("RGB", "x.png"), ("RGB", "x.jpg"), ("P", "x.png"), ("CMYK", "x.jpg"), ("CMYK", "x.tif"),
                                        ("RGBA", "x.png"), ("RGBA", "x.webp"), ("RGB", "x.bmp"), ("RGB", "x.ppm"), ("P", "x.tif")])
def test_colour_photos_of_every_kind_arrive_as_rgb(tmp_path, mode, name):
    halves((200, 40, 60), (30, 90, 220)).convert(mode).save(tmp_path / name)
    assert np.allclose(colours_of(tmp_path / name), [(200, 40, 60), (30, 90, 220)], atol=30)


@pytest.mark.parametrize("mode, name", [("L", "x.png"), ("L", "x.jpg"), ("LA", "x.png"), ("1", "x.png")])
def test_grey_photos_arrive_as_rgb(tmp_path, mode, name):
    halves((0, 0, 0), (255, 255, 255)).convert(mode).save(tmp_path / name)
    assert np.allclose(colours_of(tmp_path / name), [(0, 0, 0), (255, 255, 255)], atol=3)


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.pgm"])
def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path, name):
    grey = np.full((60, 80), 64 * 257, dtype=np.uint16)
    grey[:, 40:] = 192 * 257
    Image.fromarray(grey).save(tmp_path / name)
    assert np.allclose(colours_of(tmp_path / name), [(64,) * 3, (192,) * 3], atol=1)


def test_odd_metadata_is_no_reason_to_refuse_a_photo_nor_to_warn(tmp_path, recwarn):
    image = halves((200, 40, 60), (30, 90, 220))
    image.convert("P").save(tmp_path / "a.png", transparency=bytes([0, 128] * 8))
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 3, "maker"
    image.save(tmp_path / "b.jpg", exif=exif)
    (tmp_path / "b.jpg").write_bytes((tmp_path / "b.jpg").read_bytes().replace(b"maker", b"\xff" * 5).replace(b"\x0f\x01\x02", b"\x0f\x01\x05"))
    image.save(tmp_path / "c.jpg", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    image.save(tmp_path / "d.png", exif=b"Exif\0\0no TIFF at all")
    pixels = decoded([tmp_path / name for name in ("a.png", "b.jpg", "c.jpg", "d.png")], 40)
    assert np.allclose(pixels[0, 20, 8], (200, 40, 60), atol=30) and np.allclose(pixels[2:, 20, 8], (200, 40, 60), atol=30)
    assert np.allclose(pixels[1, 20, 32], (200, 40, 60), atol=30), "turned as the part of EXIF that can be read says"
    assert not [warning for warning in recwarn if warning.category is not ResourceWarning]


@pytest.mark.parametrize("kind", ["jpg", "tif"])  # Pillow turns TIFFs itself, when it loads them
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation, kind):
    """The eight ways to hold a camera: each file, seen as its tag says, is dark on the left and light on the right."""
    upright = halves((0, 0, 0), (255, 255, 255))
    stored_from_upright = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's Transpose that undoes each tag
    image = upright if orientation == 1 else upright.transpose(Image.Transpose(stored_from_upright[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / f"x.{kind}", exif=exif)
    assert np.allclose(colours_of(tmp_path / f"x.{kind}"), [(0, 0, 0), (255, 255, 255)], atol=8)


def test_a_batch_is_what_torchvisions_transforms_make_of_the_photo(tmp_path):
    draw_photo(tmp_path / "x.jpg", (200, 60, 40), seed=3, size=(90, 50))
    prepare = transforms.Compose([transforms.Resize((64, 64)), transforms.ToTensor(), transforms.Normalize(
        torchvision.models.ResNet50_Weights.DEFAULT.transforms().mean, torchvision.models.ResNet50_Weights.DEFAULT.transforms().std)])
    photos = photos_of(decoded([tmp_path / "x.jpg"], 64), torch.tensor([4]), freeze=0)  # without a trunk its input is seen
    (images, labels, _), = Q3.batches(photos, torch.tensor([0]), 64, "")
    assert torch.allclose(images[0], prepare(Image.open(tmp_path / "x.jpg")), atol=1e-5) and labels.tolist() == [4]
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(800, 600), (600, 800), (300, 300)])
def test_cropped_photo_is_that_of_torchvisions_resize_and_centre_crop(tmp_path, size):
    """Short side 256, of which the middle 224: but for the rounding of whole pixels."""
    x, y = np.meshgrid(np.linspace(0, 6, size[0]), np.linspace(0, 6, size[1]))
    Image.fromarray((127 + 120 * np.stack([np.sin(x), np.cos(y), np.sin(x + y)], 2)).astype(np.uint8)).save(tmp_path / "x.png")
    expected = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])(Image.open(tmp_path / "x.png"))
    ours = Q3.read_photo(tmp_path / "x.png", 224, 1 / 16)
    assert ours.shape == (224, 224, 3) and np.abs(ours.astype(int) - np.asarray(expected)).max() <= 3


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 2), (3000, 5)])
def test_photos_of_odd_shapes_are_cropped_too(tmp_path, size):
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "x.png")
    assert (Q3.read_photo(tmp_path / "x.png", 32, 1 / 16) == (10, 200, 30)).all()


def test_features_that_cannot_be_told_apart_are_an_error(small_network, shared_data, refused):
    state = load(Path("small.pth"))
    torch.save({name: torch.full_like(value, float("nan")) if name == "layer4.0.conv1.weight" else value for name, value in state.items()}, "nan.pth")
    assert "no finite numbers" in refused("Q3.py", "--data", shared_data, *QUICK, "--weights", "nan.pth", "--out", "out")


def test_recipes_do_not_share_pixels(quick_run, capsys):
    quick_run("tuned")
    capsys.readouterr()
    quick_run("reference", "--recipe", "reference")
    assert "Decoding    30 photos" in capsys.readouterr().out


def test_decoding_keeps_the_order(tmp_path):
    files = [tmp_path / f"{index}.png" for index in range(80)]
    for index, file in enumerate(files):
        Image.new("RGB", (9, 5), (index, 2 * index, 3)).save(file)
    pixels = decoded(files, 32, workers=2)
    assert pixels.shape == (80, 32, 32, 3) and pixels[:, 7, 7].tolist() == [[index, 2 * index, 3] for index in range(80)]


# -- pixels and maps that are kept ------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_store_gives_back_what_was_written_in_any_order(dtype):
    values = (torch.rand(6, 3, 5) * 200).to(dtype)
    store = a_store("x", 6, 3, 5, dtype=dtype)
    store.write(torch.tensor([4, 1]), values[[4, 1]])
    again = a_store("x", 6, 3, 5, dtype=dtype)  # the next run, or another at the same time
    assert again.missing(torch.arange(6)).tolist() == [True, False, True, True, False, True]
    again.write(torch.tensor([0, 4]), values[[0, 4]])
    assert store.missing(torch.tensor([5, 0])).tolist() == [True, False]
    assert torch.equal(store[torch.tensor([1, 4, 0, 1])], values[[1, 4, 0, 1]])


def test_row_counts_as_written_only_when_it_is_on_the_disk(monkeypatch):
    store = a_store("x", 4, 8)
    store.write(torch.tensor([0]), torch.ones(1, 8, dtype=torch.uint8))
    def killed(descriptor):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        store.write(torch.tensor([1, 2]), torch.ones(2, 8, dtype=torch.uint8))
    assert a_store("x", 4, 8).missing(torch.arange(4)).tolist() == [False, True, True, True]


def test_store_deletes_its_outdated_namesakes_and_nothing_else():
    old, others = a_store("maps-1a", 2, 3).file, ["maps-paris.pdf", "maps-1a-notes", f"maps-1b-{'0' * 16}", f"maps-1a-{'0' * 16}.jpg"]
    for name in others:
        Path("stores", name).touch()
    new = Q3.Store(Path("stores"), "maps-1a", ("other facts",), 2, (3,), torch.uint8).file
    assert sorted(os.listdir("stores")) == sorted([new.name, *others]) and old != new


def test_store_that_another_run_deleted_is_noticed():
    store, rows = a_store("x", 2, 3), torch.arange(2)
    store.write(rows, torch.ones(2, 3, dtype=torch.uint8))
    store.check(rows)
    store.file.unlink()
    assert store[rows].sum() == 6, "what is open stays open"
    with pytest.raises(dataset_split.InputError, match="deleted by another run"):
        a_store("x", 2, 3).check(rows)


def test_second_run_decodes_nothing_and_computes_no_map_of_a_kept_photo(quick_run, data, monkeypatch, capsys):
    first = quick_run("first", data=data)
    assert re.search(r"^Decoding +30 photos", text := capsys.readouterr().out, re.MULTILINE) and "Trunk maps  30 photos" in text
    monkeypatch.setattr(Q3, "read_photo", None)
    second = quick_run("second", data=data)
    assert "Decoding" not in (text := capsys.readouterr().out) and "Trunk maps" not in text
    assert (second / "predictions.csv").read_text() == (first / "predictions.csv").read_text()


def test_larger_subset_and_other_seed_decode_only_what_is_new(quick_run, data, capsys):
    for flags, new in ((("--fraction", 0.5), ["15"]), (("--fraction", 1.0), ["15"]), (("--seed", 5), [])):
        quick_run(f"run{flags[1]}", *flags, data=data)
        assert re.findall(r"^Decoding +(\d+) photos", capsys.readouterr().out.split("Epoch |")[0], re.MULTILINE) == new


@pytest.mark.parametrize("spoil", [
    lambda data: draw_photo(data / "train" / "Aves" / "03.jpg", (0, 0, 0), 77),
    lambda data: os.utime(data / "train" / "Aves" / "03.jpg", (1, 1)),
    lambda data: (data / "train" / "Aves" / "03.jpg").unlink(),
    lambda data: draw_photo(data / "train" / "Aves" / "new.jpg", (0, 0, 0), 77)])
def test_changed_photos_are_decoded_again(data, spoil):
    def store():
        return store_of(32)
    def store_of(size):
        return Q3.pixel_store(Path("cache"), data / "train", Q3.file_facts(sorted((data / "train").rglob("*.jpg"))), size, None).file
    first, other_size = store(), store_of(40)
    assert first == store() and first.exists()
    spoil(data)
    assert first != store() and other_size.exists()
    assert not first.exists(), "what is out of date is not left to fill the disk"


def test_maps_of_another_trunk_are_not_taken_for_ours(small_network):
    def file(seed=0, freeze=6, precision=torch.float32, photos=3):
        torch.manual_seed(seed)
        model = Q3.FineTuned(Q3.build_network("none", 4), freeze, precision)
        photos = Q3.Photos(model, a_store("pixels", 3, 32, 32, 3), torch.arange(photos), torch.zeros(photos))
        assert photos.keep(freeze, 10.0).startswith("computed once")
        return photos.kept.file
    assert file() == file() and len({file(), file(seed=1), file(freeze=7), file(precision=torch.bfloat16), file(photos=2)}) == 5
    assert len(list(Path("stores").glob("maps-*"))) <= 1, "the maps of one run at most are kept"


@pytest.mark.parametrize("recipe", ["reference", "tuned"])
def test_kept_maps_and_computed_ones_train_alike(quick_run, capsys, recipe):
    """To the bit, if the whole photo is looked at; a crop of a map differs from the map of a crop at its borders."""
    kept, computed = (quick_run(name, "--recipe", recipe, "--amp", "off", "--cache-gb", limit) for name, limit in (("kept", 10), ("computed", 0)))
    assert re.search(r"Trunk +computed once.*\n.*Trunk +computed in every step \(its maps would take 0.0 GB, see --cache-gb\)", capsys.readouterr().out, re.DOTALL)
    assert json.loads((kept / "config.json").read_text())["trunk"].startswith("computed once")
    same = (kept / "predictions.csv").read_text() == (computed / "predictions.csv").read_text()
    assert same == (recipe == "reference")


@pytest.mark.parametrize("freeze, free, words", [(6, 10**9, "computed once"), (6, 10**4, "the disk of --cache is too full"), (4, 10**9, "every step")])
def test_maps_are_kept_where_there_is_room_and_they_are_worth_it(small_network, monkeypatch, freeze, free, words):
    photos = photos_of(torch.zeros(3, 32, 32, 3, dtype=torch.uint8), torch.zeros(3, dtype=torch.long), freeze)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, free))
    assert words in photos.keep(freeze, 10.0) and (photos.kept is not None) == (words == "computed once")
    if photos.kept is not None:
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 0))
        assert words in photos.keep(freeze, 10.0), "what is there already needs no more room"


def test_crop_of_a_map_is_the_map_of_a_crop_but_for_its_borders(small_network):
    photos = photos_of(torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8), torch.zeros(2, dtype=torch.long))
    which, places = torch.tensor([1, 0]), torch.tensor([[0.5, 0.99], [0.0, 0.3]])  # of 0 to 8 places down and right: 4, 8 and 0, 2
    corners = [(32, 64), (0, 16)]
    crops = torch.stack([photos.pixels[which][k][top:top + 160, left:left + 160] for k, (top, left) in enumerate(corners)])
    from_pixels = photos.model.maps(crops)
    photos.keep(6, 10.0)
    from_maps, _ = photos.look(which, places)
    assert from_maps.shape == from_pixels.shape == (2, 128, 20, 20) and from_maps.is_contiguous(memory_format=torch.channels_last)
    inner = (slice(None), slice(None), slice(8, 12), slice(8, 12))
    assert torch.allclose(from_maps[inner], from_pixels[inner], atol=1e-5) and not torch.allclose(from_maps, from_pixels, atol=1e-5)


def test_crops_reach_every_corner_and_show_what_lies_there():
    photo = torch.arange(49).view(1, 7, 7, 1)
    places = torch.rand(4000, 2, generator=torch.Generator().manual_seed(0))
    crops = Q3.cut(photo.expand(4000, -1, -1, -1), places)
    assert crops.shape == (4000, 5, 5, 1)
    corners, counts = crops[:, 0, 0, 0].unique(return_counts=True)
    assert corners.tolist() == [0, 1, 2, 7, 8, 9, 14, 15, 16] and counts.min() > 350
    assert torch.equal(crops[:, :, :, 0] - crops[:, :1, :1, 0], photo[:, :5, :5, 0].expand(4000, 5, 5))
    assert Q3.cut(torch.stack([photo[0], 100 + photo[0]]), torch.zeros(2, 2))[:, 0, 0, 0].tolist() == [0, 100]
    assert Q3.cut(photo[:, :1, :1], places[:1]).shape == (1, 1, 1, 1) and Q3.cut(photo[:, :2, :2], places[:1]).shape == (1, 2, 2, 1)


def test_test_and_validation_photos_are_seen_whole(quick_run, monkeypatch):
    looks = []
    def recorded(self, which, places=None, mirrored=False, look=Q3.Photos.look):
        looks.append((len(which), places is not None))
        return look(self, which, places, mirrored)
    monkeypatch.setattr(Q3.Photos, "look", recorded)
    quick_run("out", "--batch-size", 100)
    assert looks == [(1, False), (30, False), (24, False), (24, False), (6, False), (24, True), (6, False), (12, False)]
    looks.clear()
    quick_run("reference", "--batch-size", 100, "--recipe", "reference")
    assert looks == [(1, False), (30, False), (24, False), (6, False), (12, False)]


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs Linux's /proc")
def test_memory_does_not_hold_the_rows_that_are_not_in_use():
    store = a_store("x", 64, 1000, 1000)
    for row in range(64):
        store.write(torch.tensor([row]), torch.full((1, 1000, 1000), row, dtype=torch.uint8))
    def megabytes():
        return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1000
    before = megabytes()
    assert all(store[torch.tensor([row])][0, 0, 0] == row for row in range(64))
    assert megabytes() - before < 16


def test_no_cache_leaves_nothing_behind(quick_run, tmp_path, capsys):
    out = quick_run("out", "--no-cache")
    assert "Trunk maps  30 photos" in capsys.readouterr().out
    assert not list(tmp_path.rglob("pixels-*")) and set(os.listdir(out)) == set(Q3.RUN_FILES) - {"damaged.csv", "same_photos.csv", "not_finite.csv", *Q3.PICTURES}


def test_data_folder_is_only_read_and_the_cache_may_lie_elsewhere(quick_run, data, tmp_path):
    def tree():
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in (data, *data.rglob("*"))}
    before = tree()
    for folder in before:
        folder.chmod(0o555)
    quick_run("out", "--cache", tmp_path / "elsewhere", data=data)
    assert before == tree()
    assert len(list((tmp_path / "elsewhere").glob("*-*"))) == 3 and not (tmp_path / ".cache").exists()


def test_two_runs_at_once_share_a_cache(small_network, shared_data):
    both = [forked("--data", shared_data, *QUICK, "--cache", "cache", "--out", name) for name in ("one", "two")]
    assert [running.wait() for running in both] == [0, 0]
    assert forked("--data", shared_data, *QUICK, "--no-cache", "--out", "alone").wait() == 0
    assert Path("one/predictions.csv").read_text() == Path("two/predictions.csv").read_text() == Path("alone/predictions.csv").read_text()


def test_killed_while_decoding_the_next_run_goes_on(quick_run, data, monkeypatch, capsys):
    monkeypatch.setattr(Q3, "QUIET", True)
    def killed_at_the_end(self, rows, values, write=Q3.Store.write):
        write(self, rows[:20], values[:20])
        raise KeyboardInterrupt
    with monkeypatch.context() as killing:
        killing.setattr(Q3.Store, "write", killed_at_the_end)
        assert call("Q3.py", "--data", data, *QUICK, "--out", "killed") == 130
    quick_run("again", data=data)
    assert "Decoding    10 photos" in capsys.readouterr().out


def test_cache_that_cannot_be_a_folder(small_network, shared_data, tmp_path, refused):
    (tmp_path / "file").touch()
    assert "--cache DIR" in refused("Q3.py", "--data", shared_data, *QUICK, "--cache", tmp_path / "file", "--out", tmp_path / "out")


# -- the test's figures -----------------------------------------------------------------------------------------------

def test_report_counts_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 0, 1, 1, 0, 1])
    report = Q3.test_report(nn.functional.one_hot(predicted, 3).float() * 9, labels, ["a", "b", "c"])
    assert report["confusion"] == [[2, 1, 0], [1, 1, 0], [0, 1, 0]] and report["accuracy"] == 0.5
    rows = report["per_class"]
    assert [row.pop("recall_interval_95") for row in rows.values()] == [Q3.wilson_interval(*counts) for counts in ((2, 3), (1, 2), (0, 1))]
    assert rows["a"] == pytest.approx({"photos": 3, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3})
    assert rows["b"] == pytest.approx({"photos": 2, "precision": 1 / 3, "recall": 1 / 2, "f1": 0.4})
    assert rows["c"] == {"photos": 1, "precision": 0.0, "recall": 0.0, "f1": 0.0}


def test_calibration_error_by_hand():
    """Two photos at 0.9, one of them right; two at 0.6, both right: off by 0.4 and 0.4. In bins of their own; in one bin by 0."""
    logits = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.4, 0.6]]).log()
    labels = torch.tensor([0, 1, 0, 1])
    assert Q3.calibration_error(logits, labels) == pytest.approx(0.4, abs=1e-6)
    assert Q3.calibration_error(logits, labels, bins=1) == pytest.approx(0.0, abs=1e-6)
    assert Q3.calibration_error(torch.tensor([[9e9, 0.0]]), torch.tensor([1])) == 1.0


def test_temperature_undoes_what_logits_were_multiplied_with():
    torch.manual_seed(0)
    logits = 2 * torch.randn(4000, 5)
    labels = torch.distributions.Categorical(logits=logits).sample()
    temperature = Q3.temperature_of(logits, labels)
    assert temperature == pytest.approx(1.0, abs=0.05) and Q3.calibration_error(logits / temperature, labels) < 0.03
    for factor in (0.3, 4.0):
        assert Q3.temperature_of(factor * logits, labels) == pytest.approx(factor * temperature, rel=0.02)


def test_temperature_of_few_photos_stays_near_1():
    assert 0.7 < Q3.temperature_of(2 * torch.eye(3), torch.arange(3)) < 1
    assert 1 < Q3.temperature_of(2 * torch.eye(3), torch.tensor([1, 2, 0])) < 1.5


def test_confidence_is_that_of_scaled_logits_and_the_validation_photos_decide_the_scale(quick_run, shared_data, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(Q3, "temperature_of", lambda logits, labels, temperatures=iter([2.0, 4.0]): (seen.append(labels), next(temperatures))[1])
    monkeypatch.setattr(Q3, "loss_and_accuracy", lambda *_, results=iter([(1.0, 0.1), (1.0, 0.9), (0.9, 0.8), (1.0, 1.0)]): next(results))
    out = quick_run("tuned")
    report, split = json.loads((out / "test.json").read_text()), json.loads((out / "split.json").read_text())
    assert all([split["classes"][label] for label in labels] == [path.split("/")[0] for path in split["val"]] for labels in seen)
    assert load(out / "best.pt")["temperature"] == report["temperature"] == 2.0 and load(out / "last.pt")["temperature"] == 4.0
    assert f"Confidence is off by {100 * report['calibration_error']:.1f} points" in capsys.readouterr().out
    assert report["calibration_error"] != report["calibration_error_unscaled"]


def test_the_reference_recipe_scales_nothing(quick_run, capsys):
    out = quick_run("reference", "--recipe", "reference")
    report = json.loads((out / "test.json").read_text())
    assert report["temperature"] == 1.0 and report["calibration_error"] == report["calibration_error_unscaled"]
    assert "temperature" not in capsys.readouterr().out


@pytest.mark.parametrize("correct, count, low, high", [(80, 100, 0.7112, 0.8666), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)])
def test_wilson_interval(correct, count, low, high):
    assert Q3.wilson_interval(correct, count) == pytest.approx((low, high), abs=1e-4)


# -- from scratch -----------------------------------------------------------------------------------------------------

FROM_SCRATCH = (*QUICK[2:], "--from-scratch", "--epochs", 3)


def test_from_scratch_a_small_network_learns_all_of_itself(shared_data, capsys):
    assert call("Q3.py", "--data", shared_data, *FROM_SCRATCH, "--out", "out") == 0
    options, checkpoint, said = options_of(Path("out")), load(Path("out/best.pt")), capsys.readouterr().out
    assert (options["weights"], options["freeze"], options["lr_head"], options["lr_backbone"]) == ("none", 0, 1e-3, 1e-3)
    assert checkpoint["architecture"] == "small_cnn" and checkpoint["history"][0]["epoch"] == 1
    assert "a small CNN from scratch" in said and "393,875 trainable, 0 frozen" in said
    torch.manual_seed(0)
    network = Q3.small_cnn(3)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.load_state_dict(checkpoint["model"])
    assert all((value != before[name]).any() for name, value in network.state_dict().items())
    assert sum(isinstance(layer, nn.Conv2d) for layer in network.modules()) == 5


def test_small_cnn_takes_any_size():
    for size in (23, 32, 224):
        assert Q3.FineTuned(Q3.small_cnn(7), 0)(torch.zeros(2, 3, size, size)).shape == (2, 7)


def test_from_scratch_learns_for_longer_by_default():
    assert Q3.get_args(["--from-scratch"]).epochs == 40 and Q3.get_args([]).epochs == 5
    assert Q3.get_args(["--from-scratch", "--epochs", "3"]).epochs == 3


def test_frozen_layers_of_random_weights_are_noted(run, capsys):
    config = json.loads((run[1] / "config.json").read_text())
    for weights, freeze, noted in (("none", 6, True), ("none", 0, False), ("IMAGENET1K_V2", 6, False)):
        Q3.print_banner(config | {"options": config["options"] | {"weights": weights, "freeze": freeze}})
        assert ("add --freeze 0" in capsys.readouterr().out) == noted


@pytest.mark.parametrize("flags", [("--weights", "none"), ("--freeze", 0)])
def test_from_scratch_is_another_network_which_takes_no_weights_and_freezes_nothing(refused, flags):
    assert "leave --weights and --freeze out" in refused("Q3.py", "--from-scratch", *flags)


def test_from_scratch_is_resumed_and_its_weights_are_no_resnet50s(shared_data, refused, monkeypatch):
    flags = ("--data", shared_data, *FROM_SCRATCH)
    assert call("Q3.py", *flags, "--out", "whole") == 0
    with monkeypatch.context() as patch:
        interrupt(patch, "train_epoch", 2)
        assert call("Q3.py", *flags, "--out", "out") == 130
    assert call("Q3.py", "--resume", "out") == 0
    assert benchmark_kills.equal(finished(Path("out")), finished(Path("whole")))
    assert "is not of a ResNet50" in refused("Q3.py", "--data", shared_data, *QUICK[2:], "--weights", "out/best.pt")


# -- every flag changes something -------------------------------------------------------------------------------------

def options_of(out: Path) -> dict:
    return json.loads((out / "config.json").read_text())["options"]


FLAGS = {  # flag: (value, what the run folder then shows)
    "--data": (None, lambda out: json.loads((out / "config.json").read_text())["photos"]["test"] == 11),
    "--fraction": (0.5, lambda out: json.loads((out / "config.json").read_text())["photos"]["train"] == 12),
    "--val-fraction": (0.5, lambda out: json.loads((out / "config.json").read_text())["photos"]["val"] == 15),
    "--seed": (5, lambda out: json.loads((out / "split.json").read_text())["seed"] == 5),
    "--image-size": (40, lambda out: load(out / "best.pt")["preprocessing"]["image_size"] == 40),
    "--freeze": (9, lambda out: json.loads((out / "config.json").read_text())["trainable_parameters"] == 3 * 512 + 3),
    "--epochs": (2, lambda out: read_csv(out / "history.csv")[-1]["epoch"] == "2"),
    "--batch-size": (4, lambda out: all(state["step"] == 6 for state in load(out / "last.pt")["optimizer"]["state"].values())),
    "--lr-head": (0.01, lambda out: load(out / "last.pt")["optimizer"]["param_groups"][0]["initial_lr"] == 0.01),
    "--lr-backbone": (0.02, lambda out: load(out / "last.pt")["optimizer"]["param_groups"][1]["initial_lr"] == 0.02),
    "--amp": ("bf16", lambda out: json.loads((out / "config.json").read_text())["precision"] == "bfloat16"),
    "--recipe": ("reference", lambda out: read_csv(out / "history.csv")[0]["epoch"] == "1"),
    "--cache": ("elsewhere", lambda out: len(list((out.parent / "elsewhere").glob("*-*"))) == 3),
    "--cache-gb": (0, lambda out: "--cache-gb" in json.loads((out / "config.json").read_text())["trunk"]),
    "--out": (None, lambda out: out.name == "other"),
}
TESTED_ELSEWHERE = {"--split", "--weights", "--device", "--workers", "--no-cache", "--help", "--resume", "--download", "--skip-damaged", "--save-minutes",
                    "--from-scratch", "--evaluate", "--predict", "--test-fraction", "--demo"}


def test_every_flag_has_a_test():
    flags = {flag for action in Q3.get_args_parser()._actions for flag in action.option_strings if flag.startswith("--")}
    assert flags == FLAGS.keys() | TESTED_ELSEWHERE


def test_each_flag_changes_something(quick_run, data):
    (data / "val" / "Aves" / "00.jpg").unlink()
    plain = quick_run("plain")
    for flag, (value, shows) in FLAGS.items():
        assert not shows(plain), flag
        shutil.rmtree(plain.parent / "other", ignore_errors=True)
        assert shows(quick_run("other", *(() if value is None else (flag, value)), data=data)), flag


def test_learning_rates_reach_their_layers(quick_run):
    def moved(name, *flags):
        still, far = load(quick_run(f"{name}0", "--lr-head", 1e-12, "--lr-backbone", 1e-12) / "last.pt")["model"], load(quick_run(name, *flags) / "last.pt")["model"]
        return {key.split(".")[0] for key in far if key.endswith("weight") and (far[key] - still[key]).abs().max() > 1e-5}
    assert moved("head", "--lr-head", 1e-2, "--lr-backbone", 1e-12) == {"fc"}
    assert moved("backbone", "--lr-head", 1e-12, "--lr-backbone", 1e-2) == {"layer3", "layer4"}


def test_mixed_precision_changes_the_arithmetic(quick_run):
    exact, rounded = (read_csv(quick_run(amp, "--amp", amp) / "history.csv")[0]["train_loss"] for amp in ("off", "bf16"))
    assert exact != rounded and float(exact) == pytest.approx(float(rounded), rel=0.05)


def test_split_takes_a_manifest(quick_run, data, tmp_path):
    assert call("dataset_split.py", "--data", data, "--fraction", 0.6, "--val-fraction", 0.4, "--seed", 3, "--out", tmp_path / "s.json") == 0
    flags = [flag for pair in zip(QUICK[::2], QUICK[1::2]) if pair[0] != "--fraction" for flag in pair]
    assert call("Q3.py", "--data", data, *flags, "--split", tmp_path / "s.json", "--out", tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "split.json").read_text()) == json.loads((tmp_path / "s.json").read_text())
    assert (options_of(tmp_path / "out")["fraction"], options_of(tmp_path / "out")["val_fraction"]) == (0.6, 0.4)
    made_here = quick_run("made", "--fraction", 0.6, "--val-fraction", 0.4, "--seed", 3, data=data)
    assert json.loads((made_here / "split.json").read_text()) == json.loads((tmp_path / "s.json").read_text())


def test_workers_is_the_number_of_photos_decoded_at_once(data, tmp_path, monkeypatch):
    """Three threads meet at a barrier; two never would."""
    barrier = threading.Barrier(3, timeout=20)
    monkeypatch.setattr(Q3, "read_photo", lambda file, size, border: (barrier.wait(), np.zeros((size, size, 3), np.uint8))[1])
    (tmp_path / "x.jpg").touch()
    assert len(decoded([tmp_path / "x.jpg"] * 6, 32, workers=3)) == 6
    barrier = threading.Barrier(3, timeout=0.3)
    with pytest.raises(threading.BrokenBarrierError):
        decoded([tmp_path / "x.jpg"] * 6, 40, workers=2)


def test_weights_none_starts_from_noise_and_a_path_from_the_file(weights):
    state = Q3.build_network("none", 3).state_dict()
    assert not torch.equal(state["conv1.weight"], load(weights)["conv1.weight"])
    assert torch.equal(Q3.build_network(str(weights), 3).state_dict()["conv1.weight"], load(weights)["conv1.weight"])


def test_weights_by_name_come_from_torchvision_with_a_hash_check(weights, monkeypatch):
    asked = []
    def fetch(self, *args, **options):
        asked.append((self.name, options))
        return load(weights)
    monkeypatch.setattr(torchvision.models.ResNet50_Weights, "get_state_dict", fetch)
    assert Q3.get_args([]).weights == "IMAGENET1K_V2"
    state = Q3.build_network("IMAGENET1K_V1", 3).state_dict()
    assert torch.equal(state["layer4.2.conv3.weight"], load(weights)["layer4.2.conv3.weight"])
    assert asked == [("IMAGENET1K_V1", {"progress": True, "check_hash": True})]


def test_default_folder_in_a_place_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs").symlink_to("not/mounted")
    with pytest.raises(dataset_split.InputError, match="runs"):
        Q3.claim_folder(None, Q3.RUN_FILES)


def test_default_folder_is_named_after_the_time_and_never_shared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first, second = Q3.claim_folder(None, Q3.RUN_FILES), Q3.claim_folder(None, Q3.RUN_FILES)
    assert first != second and first.is_dir() and second.is_dir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", first.name) and first.parent == Path("runs")


@pytest.mark.parametrize("present, auto", [((True, False), "cuda"), ((False, True), "mps"), ((False, False), "cpu")])
def test_device_auto_is_the_gpu_where_there_is_one(monkeypatch, present, auto):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present[0])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: present[1])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    assert Q3.pick_device("auto").type == auto and Q3.pick_device("cpu").type == "cpu"


@pytest.mark.parametrize("capabilities, auto", [
    ({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16), ({"bf16": True}, torch.bfloat16),
    ({"avx2": True, "avx512_bf16": False}, torch.float32)])
def test_precision_auto_asks_what_the_processor_computes_in(monkeypatch, capabilities, auto):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert Q3.pick_precision("auto", CPU) == auto
    assert Q3.pick_precision("off", CPU) == torch.float32 and Q3.pick_precision("bf16", CPU) == torch.bfloat16


@pytest.mark.parametrize("bf16, capability, auto", [(True, (8, 0), torch.bfloat16), (False, (7, 5), torch.float16), (False, (6, 1), torch.float32)])
def test_precision_auto_on_nvidia_gpus(monkeypatch, bf16, capability, auto):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert Q3.pick_precision("auto", torch.device("cuda")) == auto


def test_apples_gpus_get_the_layout_they_compute_right_in():
    assert Q3.layout(torch.device("mps")) == torch.contiguous_format and Q3.layout(CPU) == torch.channels_last


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_job_runs_on_cuda_in_mixed_precision(small_network, shared_data, tmp_path):
    flags = [flag for pair in zip(QUICK[::2], QUICK[1::2]) if pair[0] not in ("--device", "--amp") for flag in pair]
    assert call("Q3.py", "--data", shared_data, *flags, "--out", tmp_path / "out") == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["device"] == "cuda" and config["precision"] in ("bfloat16", "float16")


# -- bad input --------------------------------------------------------------------------------------------------------

def test_typed_mistakes_end_in_one_line_and_exit_code_2(tmp_path):
    done = type_command("Q3.py", "--epochs", 0, cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "--epochs" in done.stderr and not done.stdout
    done = type_command("Q3.py", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and dataset_split.ARCHIVE in done.stderr
    assert os.listdir(tmp_path) == [], "a run that could not start leaves nothing behind"


def test_options_are_answered_before_torch_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise SystemExit(77)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert type_command("Q3.py", "--help", cwd=tmp_path).returncode == 0
    assert type_command("Q3.py", "--batch-size", "0", cwd=tmp_path).returncode == 2
    assert type_command("Q3.py", cwd=tmp_path).returncode == 2, "nor is torch needed to see that there are no photos"
    assert type_command("Q3.py", "--resume", "nowhere", cwd=tmp_path).returncode == 2
    (tmp_path / "inaturalist_12k" / "train").mkdir(parents=True)
    assert type_command("Q3.py", cwd=tmp_path).returncode == 77, "the stand-in for torch was not met at all"


@pytest.mark.parametrize("flags, part", [
    (["--fraction", "0"], "outside (0, 1]"), (["--fraction", "2"], "outside (0, 1]"), (["--val-fraction", "1"], "outside (0, 1)"),
    (["--batch-size", "0"], "outside [1"), (["--epochs", "0"], "outside [1"), (["--epochs", "two"], "not a whole number"),
    (["--freeze", "10"], "outside [0, 9]"), (["--lr-head", "0"], "outside (0"), (["--lr-backbone", "inf"], "outside"),
    (["--image-size", "16"], "outside [32"), (["--workers", "0"], "outside [1"), (["--device", "tpu"], "'tpu'"), (["--amp", "int8"], "'int8'"),
    (["--recipe", "best"], "'best'"), (["--epoch", "3"], "--epoch"), (["--split", "s.json", "--fraction", "0.25"], "one or the other"),
    (["--batch-size", "2", "--image-size", "32", "--recipe", "reference"], "BatchNorm"),
    (["--batch-size", "1", "--image-size", "48", "--weights", "none"], "BatchNorm"), (["--cache-gb", "-1"], "outside [0"), (["--fraction", "1", "--device", "cpu", "--amp", "fp16"], "for NVIDIA GPUs")])
def test_wrong_options(shared_data, refused, flags, part):
    assert part in refused("Q3.py", "--data", shared_data, *flags)


@pytest.mark.parametrize("spoil, part", [
    (lambda data: shutil.rmtree(data), dataset_split.ARCHIVE),
    (lambda data: shutil.rmtree(data / "train"), "no train/ beside val/"),
    (lambda data: [shutil.rmtree(data / "train" / name) for name in COLOURS], "no class folders"),
    (lambda data: [file.unlink() for file in (data / "train" / "Fungi").iterdir()], os.path.join("train", "Fungi")),
    (lambda data: [file.unlink() for file in sorted((data / "train" / "Fungi").iterdir())[2:]], "'Fungi' is too small"),
    (lambda data: shutil.rmtree(data / "val" / "Fungi"), "only train has 'Fungi'"),
    (lambda data: (data / "val" / "Aves").rename(data / "val" / "Birds"), "only train has 'Aves'; only val has 'Birds'"),
    (lambda data: [file.unlink() for file in (data / "val" / "Aves").iterdir()], os.path.join("val", "Aves")),
    (lambda data: (data / "train" / "Aves" / "03.jpg").write_text("a poem"), os.path.join("train", "Aves", "03.jpg") + "' is no photo"),
    (lambda data: cut_off(data / "train" / "Aves" / "04.jpg"), os.path.join("train", "Aves", "04.jpg") + "' can't be read (")])
def test_unusable_photos(small_network, data, tmp_path, refused, spoil, part):
    spoil(data)
    assert part in refused("Q3.py", "--data", data, *QUICK, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == [], "the same --out can be used again"


def flip(file: Path, found: bytes) -> None:
    """Change one bit in the first place where the file holds these bytes."""
    content = bytearray(file.read_bytes())
    content[content.index(found)] ^= 4
    file.write_bytes(content)


def cut_off(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-200])


def test_hidden_files_and_folders_change_nothing(quick_run, data):
    for name in (".DS_Store", "Aves/._00.jpg", ".ipynb_checkpoints/x.jpg"):
        for part in ("train", "val"):
            (data / part / name).parent.mkdir(exist_ok=True)
            (data / part / name).write_bytes(b"?")
    assert json.loads((quick_run("out", data=data) / "config.json").read_text())["photos"] == {"train": 24, "val": 6, "test": 12}


def test_split_that_does_not_fit_the_data(data, tmp_path, refused):
    assert call("dataset_split.py", "--data", data, "--out", tmp_path / "s.json") == 0
    gone = json.loads((tmp_path / "s.json").read_text())["train"][0]
    (data / "train" / gone).unlink()
    assert repr(gone) in refused("Q3.py", "--data", data, "--split", tmp_path / "s.json", "--out", tmp_path / "out")
    draw_photo(data / "train" / "Zebra" / "0.jpg", (9, 9, 9), 0)
    draw_photo(data / "val" / "Zebra" / "0.jpg", (9, 9, 9), 0)
    assert "'Zebra'" in refused("Q3.py", "--data", data, "--split", tmp_path / "s.json", "--out", tmp_path / "out")


def save(tmp_path, value) -> Path:
    torch.save(value, tmp_path / "w.pth")
    return tmp_path / "w.pth"


class Malicious:
    def __reduce__(self):
        return exec, ("open('executed', 'w')",)


@pytest.mark.parametrize("make, part", [
    (lambda tmp: tmp / "nowhere.pth", "is no file, nor one of IMAGENET1K_V1, IMAGENET1K_V2, none"),
    (lambda tmp: tmp, "is no file"),
    (lambda tmp: draw_data(tmp / "d") / "train" / "Aves" / "00.jpg", "not a state dict"),
    (lambda tmp: (save(tmp, {"a": torch.zeros(99)}), cut_off(tmp / "w.pth"))[0], "not a state dict"),
    (lambda tmp: save(tmp, Malicious()), "holds code (exec), not only tensors and plain values: it was refused"),
    (lambda tmp: (save(tmp, {"a": torch.ones(99)}), flip(tmp / "w.pth", b"\0\0\x80\x3f" * 9))[0], "is damaged (in its part 'w/data/0')"),
    (lambda tmp: save(tmp, torch.zeros(3)), "a Tensor"),
    (lambda tmp: save(tmp, {"epoch": 3}), "no state dict"),
    (lambda tmp: save(tmp, {5: torch.zeros(3)}), "no state dict"),
    (lambda tmp: tmp / ("x" * 300), "is no file"),
    (lambda tmp: save(tmp, {}), "only ResNet50 has"),
    (lambda tmp: save(tmp, torchvision.models.mobilenet_v3_small().state_dict()), "only the file has 'classifier"),
    (lambda tmp: save(tmp, torchvision.models.resnet34().state_dict()), "only ResNet50 has 'layer1.0.bn3"),
    (lambda tmp: save(tmp, torchvision.models.wide_resnet50_2().state_dict()), "size mismatch for layer1.0.conv1.weight")])
def test_weights_that_are_none_of_a_resnet50(shared_data, tmp_path, monkeypatch, refused, make, part):
    monkeypatch.chdir(tmp_path)
    assert part in refused("Q3.py", "--data", shared_data, "--weights", make(tmp_path), "--fraction", 1.0, "--out", "out")
    assert not os.path.exists("out") and not os.path.exists("executed")


def test_without_network_the_message_says_which_file_goes_where(shared_data, monkeypatch, tmp_path, refused):
    def offline(self, **options):
        raise URLError("Name or service not known")
    monkeypatch.setattr(torchvision.models.ResNet50_Weights, "get_state_dict", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    line = refused("Q3.py", "--data", shared_data, "--fraction", 1.0, "--out", tmp_path / "out")
    for part in ("IMAGENET1K_V2", "https://download.pytorch.org/models/resnet50-11ad3fa6.pth", str(tmp_path / "torch"), "--weights PATH"):
        assert part in line


@pytest.mark.parametrize("name", ["config.json", "split.json", "last.pt", "best.pt", "history.csv", "test.json", "predictions.csv"])
def test_out_that_already_holds_a_run(small_network, shared_data, tmp_path, refused, name):
    (tmp_path / name).write_text("earlier")
    assert "already holds a run" in refused("Q3.py", "--data", shared_data, *QUICK, "--out", tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([name, "small.pth"]) and (tmp_path / name).read_text() == "earlier"


def test_out_that_cannot_be_a_folder(small_network, shared_data, tmp_path, refused):
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "inside"):
        assert "can't be the run's folder" in refused("Q3.py", "--data", shared_data, *QUICK, "--out", out)


def test_device_that_is_not_there(shared_data, monkeypatch, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "--device cuda" in refused("Q3.py", "--data", shared_data, *QUICK, "--device", "cuda")


def test_full_disk_while_decoding(small_network, shared_data, tmp_path, monkeypatch, refused):
    left = iter([None, None])  # for config.json and split.json
    def full(descriptor):
        next(left, "full") and errno_28()
    def errno_28():
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    line = refused("Q3.py", "--data", shared_data, *QUICK, "--out", tmp_path / "out")
    assert "No space left" in line and "--cache DIR" in line and "'.cache'" in line


# -- interrupted runs -------------------------------------------------------------------------------------------------

BEGIN = ("--epochs", 2, "--save-minutes", 1000)


def finished(out: Path) -> dict:
    """All that a run leaves behind but timings and the folder's name."""
    return benchmark_kills.result(out)


def interrupt(monkeypatch, name: str, call_number: int, signals=(signal.SIGINT,), owner=Q3) -> None:
    """Send this process signals when the function is called for the so-manieth time."""
    function, calls = getattr(owner, name), iter(range(1, 1000))
    def interrupted(*args, **options):
        if next(calls) == call_number:
            for number in signals:
                os.kill(os.getpid(), number)
        return function(*args, **options)
    monkeypatch.setattr(owner, name, interrupted)


@pytest.fixture(scope="module")
def left_alone(shared_data, small_weights, tmp_path_factory):
    """What a run of a recipe ends with that nobody interrupts."""
    ends = {}
    def left_alone(recipe: str) -> dict:
        if recipe not in ends:
            folder = tmp_path_factory.mktemp("alone")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Q3, "resnet50", small_resnet)
                patch.chdir(folder)
                (folder / "small.pth").symlink_to(small_weights)
                assert call("Q3.py", "--data", shared_data, *QUICK, *BEGIN, "--recipe", recipe, "--out", "out") == 0
            ends[recipe] = finished(folder / "out")
        return ends[recipe]
    return left_alone


@pytest.mark.parametrize("recipe", ["tuned", "reference"])
@pytest.mark.parametrize("name, call_number, number, reached", [
    ("decode", 1, signal.SIGTERM, "from the start"), ("features of", 1, signal.SIGINT, "from the start"), ("features of", 2, signal.SIGHUP, "from the start"), ("step", 2, signal.SIGINT, "epoch 0 and 2 steps"),
    ("step", 4, signal.SIGTERM, "epoch 1 and 1 steps"), ("validation", 2, signal.SIGTERM, "and 3 steps"), ("write_csv", 1, signal.SIGINT, "and 0 steps"),
    ("test_report", 1, signal.SIGINT, None), ("decode", 2, signal.SIGINT, "at the end: only the test is left")])
def test_interrupted_run_goes_on_as_if_nothing_had_been(small_network, shared_data, left_alone, monkeypatch, capsys, recipe, name, call_number, number, reached):
    with monkeypatch.context() as patch:
        if name == "step":
            def train_epoch(*args, train_epoch=Q3.train_epoch, calls=iter(range(1, 99))):
                def after_step(losses):
                    if next(calls) == call_number:
                        os.kill(os.getpid(), number)
                    args[-1](losses)
                train_epoch(*args[:-1], after_step)
            patch.setattr(Q3, "train_epoch", train_epoch)
        elif name in ("features of", "validation"):
            def batches(photos, which, size, title, *rest, batches=Q3.batches, calls=iter(range(1, 99)), **options):
                if title.startswith(name) and next(calls) == call_number:
                    os.kill(os.getpid(), number)
                yield from batches(photos, which, size, title, *rest, **options)
            patch.setattr(Q3, "batches", batches)
        else:
            interrupt(patch, name, call_number, [number])
        code = call("Q3.py", "--data", shared_data, *QUICK, *BEGIN, "--recipe", recipe, "--out", "out")
    if name == "features of" and recipe == "reference" or name == "test_report":
        assert code == 0, "nothing is left to be interrupted"
    else:
        assert code == 130 and capsys.readouterr().err.endswith("interrupted: go on with: python Q3.py --resume out\n")
        assert not Path("out/test.json").exists()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler, "what was there before is put back"
    assert call("Q3.py", "--resume", "out") == 0
    if reached and code == 130:
        assert reached in re.search("^Resumed .*", capsys.readouterr().out, re.MULTILINE)[0]
    assert benchmark_kills.equal(finished(Path("out")), left_alone(recipe))


def test_second_interruption_does_not_wait(small_network, shared_data, monkeypatch, capsys):
    interrupt(monkeypatch, "train_epoch", 1, (signal.SIGINT, signal.SIGINT))
    assert call("Q3.py", "--data", shared_data, *QUICK, *BEGIN, "--out", "out") == 130
    assert "--resume out" in capsys.readouterr().err and (load(Path("out/last.pt"))["epoch"], load(Path("out/last.pt"))["step"]) == (0, 0)
    assert call("Q3.py", "--resume", "out") == 0


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_closed_terminal_saves_though_there_is_nowhere_to_say_so(small_network, shared_data, monkeypatch):
    def gone(descriptor, words, write=os.write):
        if descriptor == 2:
            raise OSError(5, "Input/output error")
        return write(descriptor, words)
    monkeypatch.setattr(os, "write", gone)
    interrupt(monkeypatch, "train_epoch", 1, (signal.SIGHUP, signal.SIGHUP))  # a shell passes it on, and the system sends it too
    assert call("Q3.py", "--data", shared_data, *QUICK, *BEGIN, "--out", "out") == 130
    assert load(Path("out/last.pt"))["step"] == 1


def test_interrupted_while_saving_the_save_is_finished_first(small_network, shared_data, monkeypatch):
    interrupt(monkeypatch, "save", 2, owner=Q3.torch)
    assert call("Q3.py", "--data", shared_data, *QUICK, *BEGIN, "--out", "out") == 130
    assert load(Path("out/best.pt"))["epoch"] == 0 and read_csv(Path("out/history.csv")) and not list(Path("out").glob("*.tmp"))


def typed_run(tmp_path, *argv, start=subprocess.Popen):
    return start([sys.executable, *map(str, argv)], cwd=tmp_path, text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                 stderr=subprocess.PIPE, start_new_session=True)


def wait_for_row(running, epoch: int) -> None:
    while f"{epoch:5} |" not in (line := running.stdout.readline()):
        assert line, running.stderr.read()


def test_sigterm_as_a_scheduler_sends_it(shared_data, weights, tmp_path):
    flags = ("--data", shared_data, "--weights", weights, *QUICK[2:], "--epochs", 400, "--out", "a run")
    running = typed_run(tmp_path, ROOT / "Q3.py", *flags)
    wait_for_row(running, 1)
    running.terminate()
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130 and "stopping after this step" in errors and errors.endswith(f"go on with: python {ROOT / 'Q3.py'} --resume 'a run'\n")
    assert load(tmp_path / "a run" / "last.pt")["epoch"] >= 1


def test_two_processes_are_interrupted_and_go_on_together(shared_data, weights, tmp_path):
    flags = ("--data", shared_data, "--weights", weights, *QUICK[2:], "--out", "out", "--save-minutes", 1000, "--epochs", 400)
    run_two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", ROOT / "Q3.py")
    running = typed_run(tmp_path, *run_two, *flags)
    wait_for_row(running, 1)
    os.killpg(running.pid, signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert f"go on with: torchrun --nproc-per-node=2 {ROOT / 'Q3.py'} --resume out" in errors
    assert load(tmp_path / "out" / "last.pt")["epoch"] >= 1
    shutil.copy(tmp_path / "out" / "best.pt", tmp_path / "out" / "last.pt")  # the end of an epoch, where all files are written again
    reached = load(tmp_path / "out" / "last.pt")
    again = typed_run(tmp_path, *run_two, "--resume", "out")
    wait_for_row(again, reached["epoch"] + 1)
    os.killpg(again.pid, signal.SIGTERM)
    again.communicate(timeout=60)
    later = load(tmp_path / "out" / "last.pt")
    assert later["epoch"] > reached["epoch"] and later["history"][:len(reached["history"])] == reached["history"]
    assert all(0 <= row["train_acc"] <= 1 for row in later["history"])


def test_each_process_goes_on_from_its_own_totals(monkeypatch):
    """Summed in another order, the loss of an interrupted epoch would differ in its last digit."""
    saved = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    for processes, rank, own in ((2, 0, [[1, 2], [0, 0]]), (2, 1, [[0, 0], [3, 4]]), (1, 0, [[4, 6]]), (3, 0, [[4, 6], [0, 0], [0, 0]]),
                                 (3, 2, [[0, 0], [0, 0], [0, 0]])):
        monkeypatch.setattr(Q3, "PROCESSES", processes)
        monkeypatch.setattr(Q3, "RANK", rank)
        assert Q3.own_totals(saved).tolist() == own


def test_processes_stop_together_if_one_is_asked(monkeypatch):
    monkeypatch.setattr(Q3, "PROCESSES", 2)
    def the_other_wants_the_second(flags, operation):
        assert operation == torch.distributed.ReduceOp.MAX
        flags.copy_(torch.maximum(flags, torch.tensor([0, 1], dtype=torch.int32)))
    monkeypatch.setattr(Q3.distributed, "all_reduce", the_other_wants_the_second)
    assert Q3.wished(True, False) == [1, 1] and Q3.wished(False, False) == [0, 1]


def test_last_pt_is_written_within_an_epoch_as_often_as_asked(quick_run, monkeypatch):
    saved = []
    monkeypatch.setattr(Q3.Training, "save", lambda self, *names, save=Q3.Training.save: (saved.append((names, self.step)), save(self, *names)))
    quick_run("often", "--save-minutes", 0)
    assert [step for _, step in saved] == [0, 1, 2, 3, 0]
    saved.clear()
    quick_run("seldom")
    assert [step for _, step in saved] == [0, 0]


def test_resumed_run_may_move_and_use_another_cache_and_other_threads(small_network, data, left_alone, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        interrupt(patch, "train_epoch", 2)
        assert call("Q3.py", "--data", data, *QUICK, *BEGIN, "--out", "out") == 130
    data.rename("moved")
    (tmp_path / "small.pth").unlink()
    Path("out").rename("elsewhere")
    assert call("Q3.py", "--resume", "elsewhere", "--data", "moved", "--cache", "new", "--workers", 2) == 0
    assert benchmark_kills.equal(finished(Path("elsewhere")), left_alone("tuned"))


def test_finished_run_can_be_resumed_to_the_same_end(quick_run):
    before = finished(out := quick_run("out"))
    (out / "test.json").unlink(), (out / "history.csv").unlink()
    assert call("Q3.py", "--resume", out) == 0 and benchmark_kills.equal(finished(out), before)


def test_resumed_run_keeps_its_options(quick_run, refused):
    out = quick_run("out")
    for flag, *value in (("--epochs", 9), ("--seed", 1), ("--batch-size", 4), ("--lr-head", 0.5), ("--recipe", "reference"), ("--freeze", 7), ("--amp", "bf16"),
                         ("--image-size", 64), ("--fraction", 0.5), ("--weights", "none"), ("--out", "other"), ("--skip-damaged",), ("--split", "s.json")):
        line = refused("Q3.py", "--resume", out, flag, *value)
        assert flag in line and "can only go on as it began" in line
    assert call("Q3.py", "--resume", out, "--epochs", 1) == 0, "to say it again does no harm"


def other_run(out: Path) -> None:
    checkpoint = load(out / "last.pt")
    checkpoint["options"]["seed"] = 7
    torch.save(checkpoint, out / "last.pt")


def changed(file: Path, **values) -> None:
    torch.save({**load(file), **values}, file)


@pytest.mark.parametrize("spoil, part", [
    (lambda data, out: draw_photo(data / "train/Aves/03.jpg", (0, 0, 0), 77), "1 of the photos are not those that the run began with (changed, new, or damaged then or now), the first 'train/Aves/03.jpg'"),
    (lambda data, out: (data / "train/Aves/03.jpg").unlink(), "'Aves/03.jpg'"),
    (lambda data, out: shutil.rmtree(data / "val/Aves"), "only train has 'Aves'"),
    (lambda data, out: shutil.rmtree(out), "no run there to go on with"),
    (lambda data, out: (out / "config.json").unlink(), "no run there to go on with"),
    (lambda data, out: (out / "config.json").write_text("{}"), "is not the JSON"),
    (lambda data, out: (out / "config.json").write_text('{"options": {"epochs": "many"}}'), "--epochs"),
    (lambda data, out: (out / "config.json").write_text('{"options": {"speed": 9}}'), "it has an option 'speed'"),
    (lambda data, out: (out / "split.json").write_text("{}"), "not a manifest"),
    (lambda data, out: (out / "last.pt").unlink(), "last.pt' can't be read (No such file or directory): put a whole copy back"),
    (lambda data, out: (out / "best.pt").unlink(), "best.pt' can't be read (No such file or directory): put a whole copy back, or start another run (it held the best epoch so far)"),
    (lambda data, out: changed(out / "best.pt", epoch=7), "is not of epoch 1, the best so far"),
    (lambda data, out: other_run(out), "last.pt' and config.json are of different runs: they differ in seed"),
    (lambda data, out: changed(out / "best.pt", classes=["cat", "dog"]), "best.pt' and config.json are of different runs: they differ in the classes"),
    (lambda data, out: changed(out / "last.pt", format=2), f"has checkpoint format 2, this version of Q3.py reads {Q3.CHECKPOINT_FORMAT}"),
    (lambda data, out: changed(out / "last.pt", optimizer={}), "last.pt' is of another run or damaged"),
    (lambda data, out: changed(out / "last.pt", model={}), "last.pt' is of another run or damaged"),
    (lambda data, out: changed(out / "last.pt", history=[{"epoch": 1}]), "its history is no table"),
    (lambda data, out: changed(out / "last.pt", step="two"), "its step is missing or of the wrong kind"),
    (lambda data, out: changed(out / "last.pt", temperature=0.0), "its temperature is missing or of the wrong kind"),
    (lambda data, out: torch.save(load(out / "last.pt")["model"], out / "last.pt"), "a state dict, which --weights takes"),
    (lambda data, out: torch.save([1], out / "last.pt"), "no checkpoint of Q3.py but a list"),
    (lambda data, out: torch.save(Malicious(), out / "last.pt"), "holds code (exec), not only tensors and plain values"),
    (lambda data, out: torch.save({"model": Malicious()}, out / "last.pt", _use_new_zipfile_serialization=False), "holds code (exec)"),
    (lambda data, out: cut_off(out / "last.pt"), "is not a checkpoint of Q3.py, or a damaged one"),
    (lambda data, out: flip(out / "last.pt", load(out / "last.pt")["model"]["layer4.0.conv2.weight"].numpy().tobytes()[:64]), "is damaged (in its part 'archive/data/")])
def test_run_that_cannot_be_resumed(small_network, data, stopped_run, refused, spoil, part):
    shutil.copytree(stopped_run, "out")
    spoil(data, Path("out"))
    before = {path: path.read_bytes() for path in Path("out").glob("*.pt")}
    assert part.format(data=data) in refused("Q3.py", "--resume", "out", "--data", data)
    assert before == {path: path.read_bytes() for path in Path("out").glob("*.pt")} and not Path("executed").exists()


@pytest.fixture(scope="module")
def stopped_run(shared_data, small_weights, tmp_path_factory):
    """The folder of a run that was stopped in epoch 2, after a better epoch 1."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Q3, "resnet50", small_resnet)
        patch.setattr(Q3, "loss_and_accuracy", lambda *_, results=iter([(1.0, 0.1), (1.0, 0.1), (0.9, 0.9)]): next(results))
        patch.chdir(folder)
        (folder / "small.pth").symlink_to(small_weights)
        interrupt(patch, "train_epoch", 2)
        assert call("Q3.py", "--data", shared_data, *QUICK, *BEGIN, "--out", "out") == 130
    return folder / "out"


def test_resumed_from_another_folder_the_message_says_where_to_go(quick_run, shared_data, refused, monkeypatch):
    Path("photos_here").symlink_to(shared_data)
    quick_run("out", data="photos_here")
    Path("sub").mkdir()
    monkeypatch.chdir("sub")
    assert "go to the folder where the run was begun, or say with --data" in refused("Q3.py", "--resume", "../out")


def test_other_machine_is_noted(quick_run, capsys):
    out = quick_run("out")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "threads": 99}))
    capsys.readouterr()
    assert call("Q3.py", "--resume", out) == 0
    assert "only the test is left, or made again" in (text := capsys.readouterr().out) and f"threads: {torch.get_num_threads()}, was 99" in text


@pytest.mark.parametrize("began, goes_on", [(10, 0), (0, 10)])
def test_crops_come_from_where_they_came_from(small_network, shared_data, monkeypatch, began, goes_on):
    """Whatever room there is for maps by then."""
    assert call("Q3.py", "--data", shared_data, *QUICK, *BEGIN, "--cache-gb", began, "--out", "alone") == 0
    with monkeypatch.context() as patch:
        interrupt(patch, "train_epoch", 2)
        assert call("Q3.py", "--data", shared_data, *QUICK, *BEGIN, "--cache-gb", began, "--out", "out") == 130
    assert call("Q3.py", "--resume", "out", "--cache-gb", goes_on, "--cache", "other") == 0
    one, two = (finished(Path(name)) for name in ("alone", "out"))
    for name in ("best.pt", "last.pt"):
        del one[name]["options"]["cache_gb"], two[name]["options"]["cache_gb"]
    assert benchmark_kills.equal(one, two)


# -- files that are whole ---------------------------------------------------------------------------------------------

def test_full_disk_while_saving(small_network, shared_data, monkeypatch, refused):
    def full(value, stream, calls=iter(range(1, 99)), save=torch.save):
        if next(calls) == 3:
            stream.write(b"half a check")
            raise OSError(28, "No space left on device")
        save(value, stream)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        line = refused("Q3.py", "--data", shared_data, *QUICK, "--out", "out", "--save-minutes", 0)
    assert "'out/last.pt' can't be written: No space left on device. Then go on with: python Q3.py --resume out" in line
    assert load(Path("out/last.pt"))["epoch"] == 0 and not list(Path("out").glob("*.tmp"))
    assert call("Q3.py", "--resume", "out") == 0


def test_run_folder_that_is_deleted_meanwhile(small_network, shared_data, monkeypatch, refused):
    monkeypatch.setattr(Q3.Training, "finish_epoch", lambda self, *args, go_on=Q3.Training.finish_epoch: (shutil.rmtree(self.args.out), go_on(self, *args)))
    assert "the folder 'out' is gone" in refused("Q3.py", "--data", shared_data, *QUICK, "--out", "out")


def test_leftovers_of_a_kill_are_cleared_away(quick_run):
    out = quick_run("out")
    for name in ("last.pt.1234.tmp", "history.csv.99.tmp"):
        (out / name).write_bytes(b"half")
    (out / "notes.tmp").write_text("mine")
    assert call("Q3.py", "--resume", out) == 0
    assert [path.name for path in out.glob("*.tmp")] == ["notes.tmp"]


@pytest.mark.parametrize("named", [True, False])
def test_run_that_could_not_begin_leaves_nothing(small_network, data, tmp_path, refused, named):
    (data / "train/Aves/03.jpg").write_text("a poem")
    refused("Q3.py", "--data", data, *QUICK, *["--out", "out"] * named)
    assert not list(Path("runs").glob("*")) and not list(Path("out").glob("*"))


# -- damaged and doubtful photos --------------------------------------------------------------------------------------

def test_damaged_photos_are_all_named_before_training_starts(small_network, data, refused):
    for name in ("Aves/03", "Fungi/05", "Insecta/01", "Insecta/02"):
        cut_off(data / "train" / f"{name}.jpg")
    line = refused("Q3.py", "--data", data, *QUICK)
    assert all(f"{name}.jpg' can't be read" in line for name in ("Aves/03", "Fungi/05", "Insecta/01"))
    assert "; and 1 more: replace or remove them, or leave damaged ones out with --skip-damaged" in line


def test_damaged_photos_are_left_out_if_asked_and_listed(quick_run, data, capsys):
    split = dataset_split.split(dataset_split.list_photos(data / "train"), 1.0, 0.2, 0)
    in_train, in_val = split["train"][3], split["val"][1]
    cut_off(data / "train" / in_train)
    (data / "train" / in_val).write_text("a poem")
    out = quick_run("out", "--skip-damaged", data=data)
    rows = read_csv(out / "damaged.csv")
    assert {row["path"] for row in rows} == {f"train/{in_train}", f"train/{in_val}"} and all("photo" in row["problem"] for row in rows)
    assert "2 photos left out, see" in capsys.readouterr().out
    checkpoint = load(out / "last.pt")
    assert len(checkpoint["checksums"]) == 28 and checkpoint["optimizer"]["state"][0]["step"] == 3
    before = finished(out)
    assert call("Q3.py", "--resume", out) == 0 and benchmark_kills.equal(finished(out), before)


def test_damaged_photos_are_never_left_out_of_the_test(small_network, data, refused):
    cut_off(data / "val/Aves/01.jpg")
    line = refused("Q3.py", "--data", data, *QUICK, "--skip-damaged", "--out", "out")
    assert "val/Aves/01.jpg' can't be read" in line and "--skip-damaged" not in line and line.endswith("--resume out\n")
    draw_photo(data / "val/Aves/01.jpg", (1, 2, 3), 5)
    assert call("Q3.py", "--resume", "out") == 0 and json.loads(Path("out/test.json").read_text())["photos"] == 12


def test_class_whose_photos_are_all_damaged(small_network, data, refused):
    for file in (data / "train/Fungi").iterdir():
        file.write_bytes(b"")
    assert "none is left to train 'Fungi' with" in refused("Q3.py", "--data", data, *QUICK, "--skip-damaged")
    for file in data.glob("train/*/*"):
        file.write_bytes(b"")
    assert "none is left to train 'Aves' with" in refused("Q3.py", "--data", data, *QUICK, "--skip-damaged")


def test_photos_of_absurd_size_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for name, size in (("large.png", (50, 30)), ("bomb.png", (300, 300)), ("fine.png", (30, 30))):
        Image.new("RGB", size).save(tmp_path / name)
    files = [tmp_path / name for name in ("large.png", "bomb.png", "fine.png")]
    store = Q3.pixel_store(Path("decoded"), tmp_path, Q3.file_facts(files), 32, None)
    damaged = Q3.decode(files, torch.arange(3), store, 1, None)
    assert sorted(damaged) == [0, 1] and all(re.search("exceeds limit of [12]000 pixels", words) for words in damaged.values())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_pipe_and_link_to_nowhere_are_no_photos(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").symlink_to("nowhere")
    files = [tmp_path / "a.jpg", tmp_path / "b.jpg"]
    store = Q3.pixel_store(Path("decoded"), tmp_path, Q3.file_facts(files), 32, None)
    assert [words.endswith("is not there, or no file") for words in Q3.decode(files, torch.arange(2), store, 1, None).values()] == [True, True]


def test_photo_that_changes_while_photos_are_read(small_network, data, monkeypatch, refused):
    def slow(files, *rest, decode=Q3.decode):
        damaged = decode(files, *rest)
        draw_photo(data / "train/Aves/03.jpg", (0, 0, 0), 77)
        return damaged
    monkeypatch.setattr(Q3, "decode", slow)
    assert "Aves/03.jpg' for one" in refused("Q3.py", "--data", data, *QUICK)


@pytest.mark.parametrize("change", [Path.unlink, lambda file: draw_photo(file, (0, 0, 0), 77)])
def test_photo_that_changes_or_vanishes_during_training_is_noticed(quick_run, data, monkeypatch, capsys, change):
    monkeypatch.setattr(Q3.Training, "run", lambda self, run=Q3.Training.run: (run(self), change(data / "train/Aves/03.jpg")))
    quick_run("out", data=data)
    assert "1 photos have changed since they were read" in (text := capsys.readouterr().out) and "Aves/03.jpg" in text


def test_same_photos_in_two_parts_or_classes_are_reported_with_both_paths(quick_run, data, capsys):
    split = dataset_split.split(dataset_split.list_photos(data / "train"), 1.0, 0.2, 0)
    aves = [path for path in split["train"] if path.startswith("Aves")]
    fungi = [path for path in split["train"] if path.startswith("Fungi")]
    held_out = [path for path in split["val"] if path.startswith("Aves")]
    pairs = [(aves[0], held_out[0]), (aves[1], fungi[0]), (aves[2], aves[3])]  # across parts, across classes, no harm
    for source, copy in pairs:
        shutil.copy(data / "train" / source, data / "train" / copy)
    shutil.copy(data / "train" / aves[4], data / "val/Aves/02.jpg")
    seen_by_training = []
    def recorded(self, run=Q3.Training.run):
        seen_by_training.extend(read_csv(self.args.out / "same_photos.csv"))
        run(self)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Q3.Training, "run", recorded)
        out = quick_run("out", data=data)
    expected = {(f"train/{aves[0]}", f"train/{held_out[0]}", "train val", "same"), (f"train/{aves[1]}", f"train/{fungi[0]}", "train train", "different")}
    assert {tuple(row.values()) for row in seen_by_training} == expected, "before the test, no test photo is opened"
    assert {tuple(row.values()) for row in read_csv(out / "same_photos.csv")} == expected | {(f"train/{aves[4]}", "val/Aves/02.jpg", "train test", "same")}
    text = capsys.readouterr().out
    assert "2 times in two parts" in text and "3 times in two parts" in text and json.loads((out / "test.json").read_text())["same_photos"] == 3


# -- memory and odd numbers of photos ---------------------------------------------------------------------------------

@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has"), MemoryError(),
                                   RuntimeError("[enforce fail at alloc_cpu.cpp:114] err == 0. DefaultCPUAllocator: can't allocate memory: you tried")])
def test_out_of_memory_says_what_to_try(small_network, shared_data, monkeypatch, refused, error):
    def full(*_):
        raise error
    monkeypatch.setattr(Q3, "train_epoch", full)
    line = refused("Q3.py", "--data", shared_data, *QUICK, "--batch-size", 10, "--out", "out")
    assert "out of memory with --batch-size 10 and --image-size 32" in line and "try --batch-size 5" in line and "--resume out" in line
    assert "a smaller --image-size" in refused("Q3.py", "--data", shared_data, *QUICK, "--batch-size", 1, "--image-size", 64)


def test_other_errors_of_torch_are_not_called_lack_of_memory(small_network, shared_data, monkeypatch):
    def broken(*_):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr(Q3, "train_epoch", broken)
    with pytest.raises(RuntimeError, match="mat1"):
        call("Q3.py", "--data", shared_data, *QUICK)


@pytest.mark.parametrize("batch_size, steps", [(1, 24), (7, 4), (23, 2), (24, 1), (1000, 1)])
def test_batches_of_any_size_work(quick_run, batch_size, steps):
    out = quick_run("out", "--batch-size", batch_size)
    assert load(out / "last.pt")["optimizer"]["state"][0]["step"] == steps


@pytest.mark.parametrize("typed, meant", [("--epoch", "--epochs"), ("--batchsize=8", "--batch-size"), ("-epochs", "--epochs"), ("--learning-rate-head", None),
                                          ("--lr_head", "--lr-head"), ("--no-cash", "--no-cache")])
def test_typo_is_named_with_what_was_meant(refused, typed, meant):
    line = refused("Q3.py", typed, "3")
    assert repr(typed) in line and (f"did you mean {meant}?" in line) == bool(meant)


# -- several processes ------------------------------------------------------------------------------------------------

def torchrun(*argv, processes: int = 2, start=subprocess.run, **options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", ROOT / "Q3.py", *argv]
    return start(list(map(str, command)), text=True, stdin=subprocess.DEVNULL, **options)


def test_two_processes_give_the_result_of_one(shared_data, weights, tmp_path):
    flags = ("--data", shared_data, "--weights", weights, "--fraction", 1.0, "--image-size", 64, "--epochs", 2, "--batch-size", 10,
             "--device", "cpu", "--amp", "off", "--lr-head", 1e-5, "--lr-backbone", 1e-7)  # Adam's larger steps magnify rounding
    alone = type_command("Q3.py", *flags, "--out", "one", "--cache", "cache-one", cwd=tmp_path)
    both = torchrun(*flags, "--out", "two", "--cache", "cache-two", capture_output=True, cwd=tmp_path, timeout=240)
    assert alone.returncode == both.returncode == 0, both.stderr
    assert "2 processes" in both.stdout and both.stdout.count("Epoch |") == both.stdout.count("Test of the best") == 1
    for one, two in zip(read_csv(tmp_path / "one" / "history.csv"), read_csv(tmp_path / "two" / "history.csv"), strict=True):
        for key in ("train_loss", "train_acc", "val_loss", "val_acc"):
            assert float(one[key]) == pytest.approx(float(two[key]), rel=1e-3), key
    rows = [{row["path"]: float(row["confidence"]) for row in read_csv(tmp_path / name / "predictions.csv")} for name in ("one", "two")]
    assert rows[0] == pytest.approx(rows[1], abs=5e-3)
    one, two = (load(tmp_path / name / "last.pt")["optimizer"]["state"] for name in ("one", "two"))
    for key in one:  # Adam's mean gradient, since Adam's steps are the same whatever the gradients are multiplied with
        assert (one[key]["exp_avg"] - two[key]["exp_avg"]).norm() < 0.05 * one[key]["exp_avg"].norm()
    assert "Warning" not in both.stderr


def test_killed_process_ends_the_run(shared_data, weights, tmp_path):
    flags = ("--data", shared_data, "--weights", weights, "--fraction", 1.0, "--image-size", 64, "--epochs", 10000, "--device", "cpu")
    with torchrun(*flags, start=subprocess.Popen, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path) as running:
        while "    1 |" not in (line := running.stdout.readline()):
            assert line, running.stderr.read()
        children = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
        _, errors = running.communicate(timeout=60)
    assert running.returncode != 0 and "SIGKILL" in errors


def test_what_several_cpu_processes_cannot_do(small_network, shared_data, monkeypatch, refused):
    monkeypatch.setattr(Q3, "PROCESSES", 2)
    monkeypatch.setattr(Q3, "join_processes", lambda device: None)
    monkeypatch.setattr(Q3, "wait_for_all", lambda: None)
    assert "2 processes can't share steps of 1 photos: raise --batch-size" in refused("Q3.py", "--data", shared_data, *QUICK, "--batch-size", 1, "--image-size", 64)
    assert "use one process" in refused("Q3.py", "--data", shared_data, *QUICK, "--recipe", "reference")
    assert "--cache DIR" in refused("Q3.py", "--data", shared_data, *QUICK, "--no-cache")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(Q3, "LOCAL_RANK", 2)
    with pytest.raises(dataset_split.InputError, match="--nproc-per-node=2"):
        Q3.pick_device("cuda")
