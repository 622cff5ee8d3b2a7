"""Random options, manifests, photos, checkpoints: an answer or one line, never a traceback.

100 examples of each, or with --hypothesis-profile=many 10,000 (files that need a run: a tenth)."""

import contextlib
import io
import json
import math
import re
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import QUICK, call, draw_data, small_resnet
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import dataset_split as ds
import Q3


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A data folder, weights and a finished run, which the examples only read."""
    folder = tmp_path_factory.mktemp("random")
    draw_data(folder / "photos", train=5, val=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(Q3, "resnet50", small_resnet)
        torch.save(small_resnet().state_dict(), "small.pth")
        assert call("Q3.py", "--data", "photos", *QUICK, "--recipe", "scratch", "--out", "run") == 0
        yield folder


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setattr(Q3, "resnet50", small_resnet)


def answer(function, *args):
    """What a function gives, or None if it refuses in one line."""
    said, quiet = io.StringIO(), contextlib.redirect_stdout(io.StringIO())
    try:
        with contextlib.redirect_stderr(said), quiet, ds.exit_codes():
            return function(*args)
    except SystemExit as stop:
        assert stop.code == 0 or (stop.code == 2 and re.fullmatch(".+: .+\n", said.getvalue()))


FLAGS = [flag for parser in (Q3.get_args_parser(), ds.get_args_parser())
         for action in parser._actions for flag in action.option_strings]
values = st.sampled_from(["0", "1", "-1", "0.5", "1e-3", "nan", "none", "photos", "run", "tuned"])
words = st.one_of(
    st.sampled_from(FLAGS), st.sampled_from(FLAGS), values, st.integers().map(str),
    st.floats().map(str), st.text(st.characters(exclude_characters="\0", exclude_categories=()),
                                  max_size=8),
    st.builds("{}={}".format, st.sampled_from(FLAGS), st.integers() | st.floats() | st.text()))


@given(st.lists(words, max_size=8))
def test_options_are_taken_or_refused(argv):
    if args := answer(Q3.get_args, argv):
        assert 0 < args.fraction <= 1 and 0 < args.val_fraction < 1 and 0 < args.lr_head <= 100
        assert args.epochs >= 1 and args.batch_size >= 1 and args.freeze in (None, *range(10))
    answer(ds.get_args_parser().parse_args, argv)


names = st.text(st.characters(exclude_characters="/\0\\", exclude_categories=["Cs"]), min_size=1,
                max_size=6).filter(lambda name: not name.startswith("."))
files = st.lists(names.map("{}.jpg".format), min_size=1, max_size=12, unique=True)
open_fraction = st.floats(0, 1, exclude_min=True, exclude_max=True)


@given(st.dictionaries(names, files, min_size=2, max_size=4), st.just(1.0) | open_fraction,
       open_fraction, st.integers(0, 2**32 - 1))
def test_trees_are_split_or_refused(tree, fraction, val_fraction, seed):
    photos = {name: [f"{name}/{file}" for file in files] for name, files in tree.items()}
    if manifest := answer(ds.split, photos, fraction, val_fraction, seed):
        train, val = set(manifest["train"]), set(manifest["val"])
        assert not train & val and all(any(path.startswith(f"{name}/") for path in part)
                                       for name in photos for part in (train, val))
        assert len(train | val) == sum(max(1, math.floor(len(paths) * Fraction(str(fraction))))
                                       for paths in photos.values())


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner))


@given(st.binary(max_size=300), st.integers(0, 400), st.integers(1, 99), anything,
       st.sampled_from(["format", "fraction", "seed", "classes", "train", "val", "test"]))
def test_manifests_are_read_or_refused(content, start, length, value, key):
    args, manifest = Q3.get_args(["--data", "photos"]), Path("run/split.json").read_bytes()
    for spoilt in (content, manifest[:start] + content + manifest[start + length:],
                   json.dumps({**json.loads(manifest), key: value}).encode(),
                   json.dumps({**json.loads(manifest), key: [value]}).encode()):
        Path("split.json").write_bytes(spoilt)
        if split := answer(lambda: ds.load_split(args, ds.read_manifest("split.json"), "split")):
            assert all(path.is_file() for pairs in split.parts.values() for path, _ in pairs)


damages = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 40), st.binary(max_size=40)),
                   min_size=1, max_size=3)


def damaged(content: bytes, damage) -> bytes:
    """Replace some bytes at some places by others."""
    for place_of_it, length, others in damage:
        start = int(place_of_it * len(content))
        content = content[:start] + others + content[start + length:]
    return content


def pictures() -> dict[str, bytes]:
    random, files, exif = np.random.default_rng(0), {}, Image.Exif()
    image, exif[0x0112] = Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)), 6
    for ending in ("jpeg", "png", "webp", "tiff", "bmp", "ppm", "gif"):
        image.save(stream := io.BytesIO(), ending, exif=exif)
        files[ending] = stream.getvalue()
    return files


@given(st.sampled_from(sorted(pictures())), damages, st.sampled_from([None, 1 / 16]))
def test_damaged_photos_are_read_or_named(ending, damage, border):
    Path("photo.jpg").write_bytes(damaged(pictures()[ending], damage))
    photo = Q3.read_photo(Path("photo.jpg"), 64, border)
    assert "photo.jpg" in str(photo) if isinstance(photo, ds.InputError) else (
        photo.shape == (64, 64, 3))


@settings(max_examples=max(20, settings.default.max_examples // 10))
@given(damages, st.sampled_from(["last.pt", "best.pt"]))
def test_damaged_checkpoints_and_weights_are_refused(damage, name):
    """Or used, if what is damaged does not matter."""
    shutil.rmtree("other", ignore_errors=True)
    shutil.copytree("run", "other")
    Path("other", name).write_bytes(damaged(Path("run", name).read_bytes(), damage))
    for words in (("--resume", "other"), ("--predict", f"other/{name}", "missing.jpg")):
        assert call("Q3.py", *words) in (0, 2)
    Path("damaged.pth").write_bytes(damaged(Path("small.pth").read_bytes(), damage))
    answer(lambda: Q3.build_network(*Q3.read_weights("damaged.pth"), 3))
