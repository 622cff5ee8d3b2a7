"""Random options, manifests, photos and checkpoints: an answer, never a traceback.

A hundred of each; `python -m pytest tests/test_random_input.py --hypothesis-profile=many` tries 10,000 (files that need a run: a tenth).
"""

import contextlib
import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

import dataset_split as ds
import Q3
from conftest import QUICK, call, draw_data, small_resnet

few = settings(max_examples=max(20, settings.default.max_examples // 10))


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A data folder, weights and a finished run, which the examples only read."""
    folder = tmp_path_factory.mktemp("random")
    draw_data(folder / "photos", train=5, val=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(Q3, "resnet50", small_resnet)
        torch.save(small_resnet().state_dict(), "small.pth")
        assert call("Q3.py", "--data", "photos", *QUICK, "--out", "run") == 0
        yield folder


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(Q3, "resnet50", small_resnet)


def answer(function, *args):
    """What a function gives, or None if it refuses in one line."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), ds.exit_codes():
            return function(*args)
    except SystemExit as stop:
        assert stop.code == 0 or stop.code == 2 and re.fullmatch(".+: .+\n", said.getvalue())


# -- options ----------------------------------------------------------------------------------------------------------

FLAGS = [flag for parser in (Q3.get_args_parser(), ds.get_args_parser()) for action in parser._actions for flag in action.option_strings]
words = st.one_of(st.sampled_from(FLAGS), st.sampled_from(FLAGS), st.sampled_from(["0", "1", "-1", "0.5", "1e-3", "nan", "inf", "none", "photos", "run", "cpu", "tuned"]),
                  st.integers().map(str), st.floats().map(str), st.text(st.characters(exclude_characters="\0", exclude_categories=()), max_size=8),
                  st.builds("{}={}".format, st.sampled_from(FLAGS), st.one_of(st.integers(), st.floats(), st.text(max_size=5))))


@given(st.lists(words, max_size=8))
def test_random_options_are_taken_or_refused_in_one_line(argv):
    args = answer(Q3.get_args, argv)
    if args:
        assert 0 < args.fraction <= 1 and 0 < args.val_fraction < 1 and args.epochs >= 1 and args.batch_size >= 1 and 0 < args.lr_head <= 100
    answer(ds.get_args_parser().parse_args, argv)


@given(st.text(max_size=4), st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                                         lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6))
def test_random_config_of_a_run_that_is_resumed(name, value):
    config = json.loads(Path("run/config.json").read_text())
    Path("other").mkdir(exist_ok=True)
    for spoilt in (value, {"options": value}, {"options": {name: value}}, *({"options": {**config["options"], key: value}} for key in ("epochs", "split", "no_cache"))):
        Path("other/config.json").write_text(json.dumps(spoilt))
        answer(Q3.get_args, ["--resume", "other"])


# -- manifests and trees ----------------------------------------------------------------------------------------------

names = st.text(st.characters(exclude_characters="/\0\\", exclude_categories=["Cs"]), min_size=1, max_size=6).filter(lambda name: not name.startswith("."))
trees = st.dictionaries(names, st.lists(names.map(lambda name: name + ".jpg"), min_size=1, max_size=12, unique=True), min_size=2, max_size=4)


@given(trees, st.floats(0, 1, exclude_min=True), st.floats(0, 1, exclude_min=True, exclude_max=True), st.integers(0, 2**32 - 1))
def test_random_trees_are_split_or_refused(tree, fraction, val_fraction, seed):
    photos = {name: [f"{name}/{file}" for file in files] for name, files in tree.items()}
    manifest = answer(ds.split, photos, fraction, val_fraction, seed)
    if manifest:
        train, val = set(manifest["train"]), set(manifest["val"])
        assert not train & val and all(any(path.startswith(f"{name}/") for path in part) for name in photos for part in (train, val))
        assert len(train | val) == sum(max(1, math.floor(len(paths) * ds._exact(fraction))) for paths in photos.values())


@given(st.binary(max_size=300) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass")), st.integers(0, 400), st.integers(1, 99))
def test_random_manifests_are_read_or_refused(content, place_of_it, length):
    photos = ds.list_photos(Path("photos/train"))
    manifest = Path("run/split.json").read_bytes()
    for spoilt in (content, manifest[:place_of_it] + content + manifest[place_of_it + length:]):
        Path("split.json").write_bytes(spoilt)
        read = answer(ds.read_manifest, "split.json", photos)
        assert read is None or set(read["train"] + read["val"]) <= {path for paths in photos.values() for path in paths}


@given(st.sampled_from(["format", "fraction", "val_fraction", "seed", "classes", "train", "val"]),
       st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.lists(st.none() | st.integers() | st.text(max_size=3), max_size=3))
def test_manifests_with_one_random_value(key, value):
    manifest = {**json.loads(Path("run/split.json").read_text()), key: value}
    Path("split.json").write_text(json.dumps(manifest))
    answer(ds.read_manifest, "split.json", ds.list_photos(Path("photos/train")))


# -- damaged files ----------------------------------------------------------------------------------------------------

damages = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=40)), min_size=1, max_size=3)


def damaged(content: bytes, damage) -> bytes:
    """Replace some bytes at some places by others."""
    for place_of_it, length, others in damage:
        start = int(place_of_it * len(content))
        content = content[:start] + others + content[start + length:]
    return content


def pictures() -> dict[str, bytes]:
    image, files = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)), {}
    for ending in ("jpeg", "png", "webp", "tiff", "bmp", "ppm", "gif"):
        stream, exif = io.BytesIO(), Image.Exif()
        exif[0x0112] = 6
        image.save(stream, ending, **({"exif": exif} if ending in ("jpeg", "png", "webp", "tiff") else {}))
        files[ending] = stream.getvalue()
    return files


@given(st.sampled_from(sorted(pictures())), damages, st.sampled_from([None, 1 / 16]))
def test_damaged_photos_are_read_or_refused(ending, damage, border):
    Path("photo.jpg").write_bytes(damaged(pictures()[ending], damage))
    photo = answer(Q3.read_photo, Path("photo.jpg"), 32, border)
    assert photo is None or photo.shape == (32, 32, 3)


@few
@given(damages, st.sampled_from(["last.pt", "best.pt"]))
def test_damaged_checkpoints_are_refused(damage, name):
    content = Path("run", name).read_bytes()
    spoilt = damaged(content, damage)
    shutil.rmtree("other", ignore_errors=True)
    shutil.copytree("run", "other")
    Path("other", name).write_bytes(spoilt)
    if answer(Q3.load_checkpoint, Path("other", name)) is not None and spoilt != content:
        assert call("Q3.py", "--resume", "other") in (0, 2)


plain = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=3) | st.lists(st.integers(), max_size=2) | st.just({}) | st.just(torch.zeros(2))


@few
@example("checksums", torch.zeros(2), "last.pt", True)
@given(st.sampled_from(sorted(Q3.CHECKPOINT)), plain, st.sampled_from(["last.pt", "best.pt"]), st.booleans())
def test_checkpoints_with_one_random_value(key, value, name, inside):
    checkpoint = torch.load(Path("run", name), weights_only=True)
    if inside and isinstance(checkpoint[key], dict) and checkpoint[key]:
        checkpoint[key][next(iter(checkpoint[key]))] = value
    elif inside and isinstance(checkpoint[key], list):
        checkpoint[key][0] = value
    else:
        checkpoint[key] = value
    shutil.rmtree("other", ignore_errors=True)
    shutil.copytree("run", "other")
    torch.save(checkpoint, Path("other", name))
    assert call("Q3.py", "--predict", Path("other", name), "missing.jpg") in (0, 2)
    assert call("Q3.py", "--resume", "other") in (0, 2)


@few
@given(damages)
def test_damaged_weights_are_refused(damage):
    content = Path("small.pth").read_bytes()
    Path("damaged.pth").write_bytes(damaged(content, damage))
    answer(Q3.build_network, "damaged.pth", 3)
