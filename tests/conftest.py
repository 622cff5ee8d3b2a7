"""What the tests share: small drawn photos, a small network, and the two commands as a user would type them."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from PIL import Image, ImageDraw
from torchvision.models.resnet import Bottleneck, ResNet

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import dataset_split  # noqa: E402
import Q3  # noqa: E402
from benchmark_kills import Forked  # noqa: E402

settings.register_profile("some", max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile("many", parent=settings.get_profile("some"), max_examples=10_000)
settings.load_profile("some")

COLOURS = {"Aves": (200, 60, 40), "Fungi": (50, 180, 70), "Insecta": (60, 80, 210)}

QUICK = ("--weights", "small.pth", "--fraction", 1.0, "--image-size", 32, "--epochs", 1, "--batch-size", 8, "--device", "cpu",
         "--amp", "off", "--workers", 1)


def draw_photo(file: Path, colour, seed: int, size=(48, 36)) -> None:
    """A disc of the class's colour on a noisy ground; JPEG or PNG, as the name says."""
    random = np.random.default_rng(seed)
    image = Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    ImageDraw.Draw(image).ellipse((6, 4, size[0] - 6, size[1] - 4), fill=colour)
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)


def draw_data(folder: Path, train: int = 10, val: int = 4, classes=COLOURS) -> Path:
    for part, count in (("train", train), ("val", val)):
        for name in classes:
            for index in range(count):
                draw_photo(folder / part / name / f"{index:02}.jpg", COLOURS.get(name, (90, 90, 90)),
                           seed=1000 * list(classes).index(name) + index + (part == "val") * 500)
    return folder


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Where runs/, splits/ and .cache/ of a test end up."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def without_pictures(request, monkeypatch):
    """Drawing takes longer than the small runs do, so that only the tests with the fixture `pictures` draw."""
    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(Q3, "draw_pictures", lambda *_: None)


@pytest.fixture
def pictures():
    pass


@pytest.fixture
def data(tmp_path) -> Path:
    """A fresh data folder of three classes with 10 training and 4 test photos each; a test may spoil it."""
    return draw_data(tmp_path / "photos")


@pytest.fixture(scope="session")
def shared_data(tmp_path_factory) -> Path:
    """The same, drawn once; only to be read."""
    return draw_data(tmp_path_factory.mktemp("shared") / "photos")


def with_statistics(network: torch.nn.Module) -> dict:
    """The state dict of a network of random weights, with the BatchNorm statistics that go with them."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.randn(16, 3, 64, 64))
    return network.state_dict()


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """A state dict of a ResNet50."""
    torch.manual_seed(7)
    file = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    torch.save(with_statistics(Q3.resnet50(weights=None)), file)
    return file


class Narrow(Bottleneck):
    expansion = 1


def small_resnet(weights=None) -> ResNet:
    """A ResNet50's children with one narrow block a layer: 0.4 million parameters, so that its files are written in no time."""
    return ResNet(Narrow, [1, 1, 1, 1], width_per_group=16)


@pytest.fixture(scope="session")
def small_weights(tmp_path_factory) -> Path:
    torch.manual_seed(7)
    file = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(with_statistics(small_resnet()), file)
    return file


@pytest.fixture
def small_network(small_weights, tmp_path, monkeypatch):
    """Let Q3.py build a small_resnet(). Its weights: small.pth."""
    monkeypatch.setattr(Q3, "resnet50", small_resnet)
    (tmp_path / "small.pth").symlink_to(small_weights)


def type_command(script: str, *argv, cwd: Path) -> subprocess.CompletedProcess:
    """Run `python script argv...` from the folder `cwd`, as a user would."""
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, argv)], cwd=cwd, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "2"}, timeout=240)


def call(script: str, *argv) -> int:
    """The same inside this process, which saves the seconds that torch takes to load; gives the exit code."""
    argv = list(map(str, argv))
    commands = {"Q3.py": lambda: Q3.main(Q3.get_args(argv)), "dataset_split.py": lambda: dataset_split.main(argv)}
    try:
        with dataset_split.exit_codes():
            commands[script]()
    except SystemExit as stop:
        return stop.code
    return 0


def forked(*words) -> Forked:
    """A run with the small network in a process of its own, which a test may kill."""
    return Forked(_run_small, list(map(str, words)))


def _run_small(words: list[str]) -> None:
    Q3.resnet50 = small_resnet
    sys.stdout = sys.stderr = open("output.txt", "a")
    os._exit(call("Q3.py", *words))


@pytest.fixture
def refused(capsys):
    """Check that a command answers with exit code 2 and one line on stderr, and give that line."""
    def refused(script: str, *argv) -> str:
        capsys.readouterr()
        code = call(script, *argv)
        stderr = capsys.readouterr().err
        assert code == 2, f"exit code {code}, stderr: {stderr}"
        assert stderr.count("\n") == 1 and stderr.endswith("\n"), f"not one line: {stderr!r}"
        return stderr
    return refused
