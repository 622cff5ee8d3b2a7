"""What the tests share: drawn photos, a small network, and the commands as a user types them."""

import csv
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image, ImageDraw
from torchvision.models.resnet import Bottleneck, ResNet

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmark_kills import Forked  # noqa: E402

import dataset_split  # noqa: E402
import Q3  # noqa: E402

settings.register_profile("some", max_examples=100, deadline=None,
                          suppress_health_check=list(HealthCheck))
settings.register_profile("many", parent=settings.get_profile("some"), max_examples=10_000)
settings.load_profile("some")

COLOURS = {"Aves": (200, 60, 40), "Fungi": (50, 180, 70), "Insecta": (60, 80, 210)}
QUICK = ("--weights", "small.pth", "--fraction", 1.0, "--image-size", 64, "--epochs", 1,
         "--batch-size", 8, "--device", "cpu", "--amp", "off", "--workers", 1)


def draw_photo(file: Path, colour, seed: int, size=(48, 36)) -> None:
    """A disc of the class's colour on a noisy ground; JPEG or PNG, as the name says."""
    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    ImageDraw.Draw(image).ellipse((6, 4, size[0] - 6, size[1] - 4), fill=colour)
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def draw_data(folder: Path, train: int = 10, val: int = 4, classes=COLOURS) -> Path:
    for part, count in (("train", train), ("val", val)):
        for number, name in enumerate(classes):
            for index in range(count):
                draw_photo(folder / part / name / f"{index:02}.jpg", COLOURS.get(name, (90,) * 3),
                           seed=1000 * number + index + (part == "val") * 500)
    return folder


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Where runs/, splits/ and .cache/ of a test end up."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def without_pictures(request, monkeypatch):
    """Drawing takes longer than the small runs do: only tests with the fixture `pictures` draw."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(Q3, "draw_pictures", lambda *_: None)


@pytest.fixture
def pictures():
    pass


@pytest.fixture
def data(tmp_path) -> Path:
    """Three classes with 10 training and 4 test photos each, for a test to spoil."""
    return draw_data(tmp_path / "photos")


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory) -> Path:
    """The same, drawn once; only to be read."""
    return draw_data(tmp_path_factory.mktemp("shared") / "photos")


def write_weights(network: torch.nn.Module, file: Path) -> Path:
    """The state dict of a network of random weights, with BatchNorm statistics that fit them."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.randn(16, 3, 64, 64))
    torch.save(network.state_dict(), file)
    return file


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Of a ResNet50."""
    torch.manual_seed(7)
    return write_weights(Q3.resnet50(weights=None), tmp_path_factory.mktemp("weights") / "50.pth")


class Narrow(Bottleneck):
    expansion = 1


def small_resnet(weights=None) -> ResNet:
    """A ResNet50's children with one narrow block a layer: half a million parameters."""
    return ResNet(Narrow, [1, 1, 1, 1], width_per_group=16)


@pytest.fixture(scope="session")
def small_weights(tmp_path_factory) -> Path:
    torch.manual_seed(7)
    return write_weights(small_resnet(), tmp_path_factory.mktemp("weights") / "small.pth")


@pytest.fixture
def small_network(small_weights, tmp_path, monkeypatch):
    """Let Q3.py build a small_resnet(). Its weights: small.pth."""
    monkeypatch.setattr(Q3, "resnet50", small_resnet)
    (tmp_path / "small.pth").symlink_to(small_weights)


@pytest.fixture
def quick_run(small_network, shared_data, tmp_path):
    """Run the job in this process with a small network; gives the run's folder."""
    def quick_run(name: str, *flags, data=shared_data) -> Path:
        assert call("Q3.py", "--data", data, *QUICK, *flags, "--out", name) == 0
        return tmp_path / name
    return quick_run


def type_command(script: str, *argv, cwd: Path, start=subprocess.run, **options):
    """Run `python script argv...` from the folder `cwd` as a user would; torchrun, with `-m`."""
    words = script.split() if script.startswith("-m") else [str(ROOT / script)]
    options |= {"timeout": 240} if start is subprocess.run else {}
    return start([sys.executable, *words, *map(str, argv)], cwd=cwd, text=True, stderr=-1,
                 stdin=subprocess.DEVNULL, stdout=-1, env=os.environ | {"OMP_NUM_THREADS": "1"},
                 **options)


def call(script: str, *argv) -> int:
    """The same in this process, which saves the seconds that torch takes to load: exit code."""
    argv = list(map(str, argv))
    try:
        with dataset_split.exit_codes():
            Q3.main(Q3.get_args(argv)) if script == "Q3.py" else dataset_split.main(argv)
    except SystemExit as stop:
        return stop.code
    return 0


def forked(*words, rank: int = 0, of: int = 1, port: int = 0) -> Forked:
    """A run with the small network in a process of its own, which a test may kill; or one of
    several that are set up as torchrun does it."""
    return Forked(_run_small, list(map(str, words)), rank, of, port)


def _run_small(words: list[str], rank: int, of: int, port: int) -> None:
    def draw_pictures(out, report, photos, *_):
        time.sleep(0.3 * (of > 1))  # the other processes end before
        assert photos.pixels[torch.tensor([0])].any()
    Q3.resnet50, Q3.draw_pictures = small_resnet, draw_pictures
    Q3.RANK = Q3.LOCAL_RANK = rank
    Q3.WORLD_SIZE = Q3.LOCAL_WORLD_SIZE = of
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(of), MASTER_ADDR="localhost",
                      MASTER_PORT=str(port))
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open("output.txt", "a")  # noqa: SIM115 - this process ends with it
    code = call("Q3.py", *words)
    sys.stdout.flush()
    os._exit(code)


@pytest.fixture
def refused(capsys):
    """Check that a command gives exit code 2 and one line on stderr, and return that line."""
    def refused(script: str, *argv) -> str:
        capsys.readouterr()
        assert call(script, *argv) == 2
        stderr = capsys.readouterr().err
        assert re.fullmatch(".+\n", stderr), "not one line"
        return stderr
    return refused


def load(file: str | Path) -> dict:
    return torch.load(file, weights_only=True)


def read_csv(file: str | Path) -> list[dict]:
    with open(file, newline="") as stream:
        return list(csv.DictReader(stream))
