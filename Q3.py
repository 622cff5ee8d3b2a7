#!/usr/bin/env python3
"""Fine-tune an ImageNet ResNet50 on the ten classes of iNaturalist-12K.

    python Q3.py

The script reads from top to bottom in the order in which a run happens:

    photos -> split -> pixels -> network -> trunk maps -> optimiser -> epochs -> test -> files

The first six children of the network (conv1 to layer2) stay as ImageNet left them, its last layer is replaced by one
for ten classes and learns fast, and the layers between learn slowly. The best epoch on the validation photos is tested
once. Which photos there are, and which is in which part, is dataset_split.py's business; a list of (file, label) is
all that comes from there. A run that was interrupted goes on with --resume, and ends as if nothing had been.

    python Q3.py --demo                                       see it work first, on drawn pictures
    python Q3.py --evaluate runs/NAME/best.pt                 test what was trained
    python Q3.py --predict runs/NAME/best.pt PHOTO ...        and use it
    torchrun --nproc-per-node=N Q3.py                         the same on several GPUs
"""

import argparse
import hashlib
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import time
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from itertools import islice
from pathlib import Path

from dataset_split import (InputError, Parser, add_split_options, atomic_write, changed_files, claim_folder, differences, disk_errors,
                           download, draw_demo, exit_codes, file_facts, find_data, labelled, list_photos, load_split, number,
                           photos_in, print_same_photos, quoted, refuse_inside_photos, test_folder, train_folder, unread_part,
                           write_csv, write_json, write_manifest)


# -- Options ----------------------------------------------------------------------------------------------------------

def cores() -> int:
    """How many of the processor's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def get_args_parser() -> Parser:
    parser = Parser(prog="Q3.py", allow_abbrev=False, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)

    group = parser.add_argument_group("photos")
    group.add_argument("--data", type=Path, default=Path("inaturalist_12k"), metavar="DIR",
                       help="folder with train/<Class>/ and val/<Class>/, the test set; or class folders alone (default: inaturalist_12k)")
    group.add_argument("--download", action="store_true",
                       help="fetch iNaturalist-12K first (3.8 GB), unless it is there; a transfer that broke off goes on")
    group.add_argument("--demo", action="store_true",
                       help="draw a small data set into the folder demo/ and do the whole job on it, with the small CNN of --from-scratch: "
                            "needs no network, photos or weights")
    add_split_options(group, fraction=0.25)
    group.add_argument("--split", type=Path, metavar="FILE",
                       help="a manifest that dataset_split.py wrote, instead of --fraction, --val-fraction and --test-fraction")
    group.add_argument("--image-size", type=number(int, 32, 4096), default=224, metavar="N",
                       help="the network sees N x N pixels of a photo (default: 224)")
    group.add_argument("--skip-damaged", action="store_true",
                       help="leave damaged training and validation photos out, and list them in damaged.csv; without it they are "
                            "an error")
    group.add_argument("--workers", type=number(int, 1, 1024), default=min(cores(), 1024), metavar="N",
                       help="threads that decode photos (default: one for each core)")
    group.add_argument("--cache", type=Path, default=Path(".cache"), metavar="DIR",
                       help="where decoded photos and the trunk's maps are kept for the next run (default: .cache)")
    group.add_argument("--cache-gb", type=number(float, 0, 10**6), default=10.0, metavar="GB",
                       help="the most that the trunk's maps may take there, for each recipe and image size; if they need "
                            "more, the trunk is computed in every step (default: 10)")
    group.add_argument("--no-cache", action="store_true", help="keep nothing for the next run")

    group = parser.add_argument_group("network")
    group.add_argument("--weights", default="IMAGENET1K_V2", metavar="SPEC",
                       help="where training starts: a torchvision name (IMAGENET1K_V1, IMAGENET1K_V2), the path of a "
                            "ResNet50 state dict, or none for random weights, with --freeze 0 (default: IMAGENET1K_V2)")
    group.add_argument("--freeze", type=number(int, 0, 9), default=6, metavar="N",
                       help="the first N of conv1, bn1, relu, maxpool, layer1, layer2, layer3, layer4, avgpool stay as "
                            "they are; 9: only fc learns (default: 6)")
    group.add_argument("--from-scratch", action="store_true",
                       help="train a small CNN from random weights instead, for comparison: five convolutions, nothing frozen")

    group = parser.add_argument_group("training")
    group.add_argument("--recipe", choices=("tuned", "reference"), default="tuned",
                       help="reference: the plain published protocol; tuned: keeps the photos' proportions, starts fc from "
                            "logistic regression, trains on crops at rates that rise and fall, holds BatchNorm's statistics, "
                            "scales its confidence (default: tuned)")
    group.add_argument("--epochs", type=number(int, 1, 10**6), metavar="N",
                       help="passes over the training photos (default: 5; 40 with --from-scratch)")
    group.add_argument("--batch-size", type=number(int, 1, 10**6), default=64, metavar="N",
                       help="photos a step at most; an epoch's steps share its photos evenly (default: 64)")
    group.add_argument("--lr-head", type=number(float, 0, 100, open_low=True), metavar="LR",
                       help="learning rate of fc (default: 1e-4; 1e-3 where fc starts from noise)")
    group.add_argument("--lr-backbone", type=number(float, 0, 100, open_low=True), metavar="LR",
                       help="learning rate of the other layers that learn (default: 1e-5; 1e-4 where fc starts from noise; 1e-3 with "
                            "--from-scratch)")

    group = parser.add_argument_group("machine")
    group.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto",
                       help="auto: the GPU where there is one (default: auto)")
    group.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
                       help="mixed precision; auto: where the hardware computes in it (default: auto)")

    group = parser.add_argument_group("results")
    group.add_argument("--out", type=Path, metavar="DIR",
                       help="the run's folder; one that already holds a run is refused (default: runs/<date-time>)")
    group.add_argument("--save-minutes", type=number(float, 0, 10**6), default=5.0, metavar="M",
                       help="how often last.pt is written within an epoch; 0: after each step (default: 5)")
    group.add_argument("--resume", type=Path, metavar="RUN",
                       help="go on with an interrupted run from its last.pt; its folder says all else (Ctrl-C prints the command)")

    group = parser.add_argument_group("a trained network")
    group.add_argument("--evaluate", type=Path, metavar="CKPT",
                       help="test a checkpoint on the test photos of --data, or on any folder of class folders; its options are the run's")
    group.add_argument("--predict", type=Path, nargs="+", metavar=("CKPT", "PHOTO"),
                       help="say for photos, and those in folders, which classes a checkpoint takes them for: a row each, with tabs "
                            "between its columns; without PHOTO, or with -, a list of them is read from standard input")
    return parser


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked; those of a run that is resumed are its own. Raises InputError: options that can't be used, or
    not together."""
    parser = get_args_parser()
    defaults = vars(parser.parse_args([]))
    args = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults)))
    typed = {name: value for name, value in vars(args).items() if value is not None}
    if PROCESSES > 1 and (alone := sorted(typed.keys() & {"download", *USES})):
        parser.error(f"--{alone[0]} is for a single process: leave torchrun out")
    for use, changeable in USES.items():
        if use in typed:
            if others := sorted(typed.keys() - changeable - {use}):
                parser.error(f"--{use} takes a network as it was trained: leave --{others[0].replace('_', '-')} out")
            file = typed[use][0] if use == "predict" else typed[use]
            if not os.path.isfile(file):
                what = "a folder, not a checkpoint" if os.path.isdir(file) else "no such file"
                parser.error(f"--{use} '{file}': {what}; a run keeps its best checkpoint in best.pt, in the run's folder")
            return args  # what was not typed is in the checkpoint
    if "split" in typed and typed.keys() & {"fraction", "val_fraction", "test_fraction"}:
        parser.error("--split FILE takes the place of --fraction, --val-fraction and --test-fraction: give one or the other")
    if "demo" in typed and "resume" not in typed:
        if others := sorted(typed.keys() & {"data", "download", "split", "test_fraction", "weights", "freeze"}):
            parser.error(f"--demo brings its own data and network: leave --{others[0].replace('_', '-')} out")
        typed = DEMO | typed
    if "from_scratch" in typed and typed.keys() & {"weights", "freeze"}:
        parser.error("--from-scratch trains another network from random weights, all of it: leave --weights and --freeze out")
    if "resume" in typed:
        own = typed_again(read_config(typed["resume"])["options"], typed["resume"] / "config.json")
        for name in typed.keys() - CHANGEABLE - {"resume"}:
            if typed[name] != own[name]:
                parser.error(f"--{name.replace('_', '-')} {typed[name]}: the run in '{typed['resume']}' has {own[name]}, and can only "
                             "go on as it began. For another result start another run")
        typed = own | typed | {"out": typed["resume"]}
        if not os.path.isdir(typed["data"]):
            parser.error(f"--resume '{typed['resume']}': its photos are in '{typed['data']}', which is not there, seen from {Path.cwd()}: "
                         "go to the folder where the run was begun, or say with --data where they are now")
    args = argparse.Namespace(**(defaults | typed))
    if args.demo and PROCESSES > 1:
        parser.error("--demo is for a single process: leave torchrun out")
    if args.from_scratch:
        args.weights, args.freeze = "none", 0
    lr_head, lr_backbone = (1e-3, 1e-3) if args.from_scratch else (1e-4, 1e-5) if starts_from_probe(args) else (1e-3, 1e-4)
    args.lr_head, args.lr_backbone = args.lr_head or lr_head, args.lr_backbone or lr_backbone
    args.epochs = args.epochs or (40 if args.from_scratch else 5)
    smallest = 48 if args.recipe == "tuned" else 32  # pixels that leave a ResNet50's layer4 a map of one place
    if not holds_batchnorm(args) and not args.from_scratch and args.image_size <= smallest and args.batch_size <= 2:
        parser.error(f"--batch-size {args.batch_size} with --image-size {args.image_size} can leave layer4's BatchNorm a "
                     "single value to take the mean of: raise one of them")
    return args


CHANGEABLE = {"data", "download", "workers", "cache", "cache_gb", "no_cache", "save_minutes"}  # by a run that goes on
DEMO = {"data": Path("demo"), "fraction": 1.0, "image_size": 64, "from_scratch": True, "epochs": 20}
USES = {  # of a trained network, and what they can change
    "evaluate": {"data", "workers", "cache", "no_cache", "batch_size", "device", "amp", "out"},
    "predict": {"workers", "batch_size", "device", "amp"}}


def typed_again(options: dict, file: Path) -> dict:
    """A run's options, from what it wrote down of them in this file, as if they had been typed. Raises InputError: there is
    one that this program doesn't know, or takes another value."""
    parser, words = get_args_parser(), []
    known = vars(parser.parse_args([]))
    for name, value in options.items():
        if name not in known:
            raise InputError(f"'{file}' is damaged or of another version: it has an option {name!r}")
        if value is not None and value is not False:
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}"))
    try:
        return vars(parser.parse_args(words))
    except InputError as error:
        raise InputError(f"'{file}' is damaged or of another version ({first_line(error)})") from None


def read_config(folder: Path) -> dict:
    """A run's config.json. Raises InputError: it isn't there, or is something else."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_bytes())
    except OSError as error:
        raise InputError(f"--resume '{folder}': no run there to go on with ('{file}': {error.strerror})") from None
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict) or not isinstance(config.get("options"), dict):
        raise InputError(f"--resume '{folder}': '{file}' is not the JSON that a run writes")
    return config


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def starts_from_probe(args: argparse.Namespace) -> bool:
    """Whether fc starts from logistic regression on the features, of which a network of random weights has none."""
    return args.recipe == "tuned" and args.weights != "none"


def holds_batchnorm(args: argparse.Namespace) -> bool:
    """Whether no BatchNorm statistics are learnt: there are none behind the eighth child, and none to hold in noise."""
    return args.freeze >= 8 or starts_from_probe(args)


def preprocessing(args: argparse.Namespace) -> dict:
    """What is done to a photo before the network sees it; the reference recipe squashes, which `read_photo` calls a border of None."""
    return {"image_size": args.image_size, "border": BORDER if args.recipe == "tuned" else None, "interpolation": "bilinear",
            "mean": list(MEAN), "std": list(STD)}


RANK, LOCAL_RANK, PROCESSES, LOCAL_PROCESSES = (
    int(os.environ.get(name, alone))  # this process among those that torchrun started, in all and on this machine; how many they are
    for name, alone in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))

if __name__ == "__main__":  # mistakes and --help are answered here, before the seconds that torch takes to load
    with exit_codes(unsaid=(InputError, KeyboardInterrupt) if RANK else ()):
        args = get_args()
        if not (args.download or args.demo or args.evaluate or args.predict):
            find_data(args.data)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # meanwhile Ctrl-C just ends

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import distributed, nn
from torch.fx.experimental.optimization import fuse  # of convolutions with the BatchNorm layers behind them
from torch.nn import functional as F
from torchvision.models import ResNet50_Weights, resnet50
from tqdm import tqdm

torch.backends.cudnn.deterministic = True  # the same seed, the same run
torch.backends.cudnn.allow_tf32 = False  # float32 is float32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue, in [0, 1]
BORDER = 1 / 16  # of a photo's short side, at either end: its middle 224 of 256 pixels, as IMAGENET1K_V1 was tested
PENALTY = 0.03  # on the squares of the weights of the logistic regression that the head starts from
WARM_UP = 0.1  # part of the steps in which the tuned recipe's learning rates rise
CROP = 5 / 7  # of a photo's side that a step of training sees: 160 of 224 pixels, 20 of 28 places of a trunk map
BINS = 15  # of confidence, in the calibration error and its picture
CHECKPOINT_FORMAT = 4
STORE_FORMAT = 2  # to be raised when read_photo or FineTuned.maps give something else


# -- The machine, and the processes that torchrun started -------------------------------------------------------------

QUIET = True if RANK else None  # for tqdm: one process draws progress bars, and only in a terminal


def join_processes(device: torch.device) -> None:
    """Let the processes that torchrun started talk to each other. Raises InputError: on Apple's GPUs, which can't."""
    if device.type == "mps":
        raise InputError("several processes need NVIDIA GPUs, or --device cpu")
    backend, device_id = ("cpu:gloo,cuda:nccl", device) if device.type == "cuda" else ("gloo", None)
    warnings.filterwarnings("ignore", message="Grad strides do not match")  # of 1 x 1 convolutions, whose strides say nothing
    # One may wait for a day while another decodes; when one dies, torchrun ends all.
    distributed.init_process_group(backend, timeout=timedelta(days=1), device_id=device_id)


@contextmanager
def first_on_this_machine():
    """What one process of each machine does before the others do: fetch, decode."""
    if LOCAL_RANK > 0:
        wait_for_all()
    try:
        yield
    finally:
        if LOCAL_RANK == 0:
            wait_for_all()


def wait_for_all() -> None:
    if PROCESSES > 1:
        distributed.barrier()


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of this tensor over all processes."""
    if PROCESSES > 1:
        distributed.all_reduce(tensor)
    return tensor


class Stopped(KeyboardInterrupt):
    """Asked to stop, and at a place now that the run can go on from."""


ASKED = []  # to stop: the signals that came


@contextmanager
def stopping_between_steps():
    """Let Ctrl-C, a closed terminal and SIGTERM, which schedulers send, wait for the end of a step. A second one does not wait;
    but torchrun passes SIGTERM on to processes that have it already, and a shell SIGHUP, so that these don't count twice."""
    def ask(signal_number, _):
        ASKED.append(signal_number)
        for repeated, handler in then.items():
            signal.signal(repeated, handler)
        with suppress(OSError):  # the terminal may be gone; and print() may be in the middle of something
            os.write(2, b"\nstopping after this step; once more to leave at once\n")

    then = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_IGN if PROCESSES > 1 else signal.SIG_DFL}
    then |= {signal.SIGHUP: signal.SIG_IGN} if hasattr(signal, "SIGHUP") else {}
    then = {each: handler for each, handler in then.items() if signal.getsignal(each) != signal.SIG_IGN}
    before = {each: signal.signal(each, ask) for each in then}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        ASKED.clear()


def on_first(function, *args):
    """What the first process makes of this, for all of them; so is an InputError."""
    done = [None]
    if RANK == 0:
        try:
            done[0] = function(*args)
        except InputError as error:
            done[0] = error
    if PROCESSES > 1:
        distributed.broadcast_object_list(done, 0, device=torch.device("cpu"))
    if isinstance(done[0], InputError):
        raise done[0]
    return done[0]


def wished(*wishes: bool) -> list[int]:
    """For each wish whether any process has it, so that all do the same; they have to ask together."""
    flags = torch.tensor(wishes, dtype=torch.int32)
    if PROCESSES > 1:
        distributed.all_reduce(flags, distributed.ReduceOp.MAX)
    return flags.tolist()


def pick_device(name: str) -> torch.device:
    """The device called cuda, mps or cpu; for auto the first of these that is there. Raises InputError: it is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in present if present[kind])
    if not present[name]:
        raise InputError(f"--device {name}: this machine or this build of torch has none; there is "
                         f"{' and '.join(kind for kind in present if present[kind])}")
    if name == "cuda":
        if LOCAL_RANK >= torch.cuda.device_count():
            raise InputError(f"{LOCAL_PROCESSES} processes and {torch.cuda.device_count()} GPUs: give torchrun "
                             f"--nproc-per-node={torch.cuda.device_count()}")
        torch.cuda.set_device(LOCAL_RANK)
    return torch.device(f"cuda:{LOCAL_RANK}" if name == "cuda" else name)


def pick_precision(amp: str, device: torch.device) -> torch.dtype:
    """The type that matrix products and convolutions are computed in; float32 means no mixed precision.

    auto is bfloat16 where the hardware multiplies in it, float16 on the NVIDIA GPUs before that (Volta, Turing), and
    float32 elsewhere: a CPU that only emulates bfloat16 is many times slower with it (measured: 10.3 photos/s forward
    in float32, 1.6 in bfloat16, on an AVX2 machine). Raises InputError: float16 on another device than an NVIDIA GPU.
    """
    if amp == "fp16" and device.type != "cuda":
        raise InputError(f"--amp fp16 is for NVIDIA GPUs: on {device.type} give --amp bf16 or off")
    if amp != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        return torch.float16 if torch.cuda.get_device_capability() >= (7, 0) else torch.float32
    if device.type == "cpu":
        has = torch.cpu.get_capabilities()
        if torch.backends.mkldnn.is_available() and (has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16")):
            return torch.bfloat16
    return torch.float32


def layout(device: torch.device) -> torch.memory_format:
    """Channels-last, which convolutions are fastest in (on 2 AVX2 cores 10.3 photos/s forward, against 7.1), except on
    Apple's GPUs, where BatchNorm then gives wrong gradients (pytorch issue 175189)."""
    return torch.contiguous_format if device.type == "mps" else torch.channels_last


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; a GPU gets it without this process waiting for what the GPU still has to do."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


# -- Photos: files -> uint8 pixels, once ------------------------------------------------------------------------------

def read_photo(file: Path, size: int, border: float | None) -> np.ndarray:
    """A photo as the network sees it: upright, RGB, and a square: its middle, or all of it squashed.

    Args:
        border: part of the short side that the square in the middle leaves out at either end; None squashes.

    Returns:
        uint8 array (size, size, 3).

    Raises:
        InputError: the file is no photo, a damaged one, or one of more pixels than Pillow thinks sane (89 million).
    """
    if not os.path.isfile(file):  # opening a pipe would wait for ever
        what = "a folder that holds no photos or can't be read" if os.path.isdir(file) else "not there, or no file"
        raise InputError(f"'{file}' is {what}")
    try:
        with Image.open(file) as image:
            image.load()
            turn_upright(image)
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would cut off at 255
                image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
            image = image.convert("RGB")
            if border is None:
                return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
            return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR, border))
    except UnidentifiedImageError:
        raise InputError(f"'{file}' is no photo: what it holds is no image") from None
    except MemoryError:
        raise
    except Exception as error:  # for a damaged file Pillow raises nearly anything: OSError, SyntaxError, struct.error
        raise InputError(f"photo '{file}' can't be read ({first_line(error)})") from None


def photo_or_problem(file: Path, size: int, border: float | None) -> np.ndarray | str:
    """What `read_photo` gives, or in words why the photo can't be read."""
    try:
        return read_photo(file, size, border)
    except InputError as error:
        return str(error)


def strict_about_photos() -> None:
    """Let Pillow refuse a photo of too many pixels, and keep silent about odd metadata; the pixels are fine."""
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")
    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


def turn_upright(image: Image.Image) -> None:
    """Obey EXIF's orientation tag, as far as the EXIF data can be read."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except MemoryError:
        raise
    except Exception:  # a photo with damaged EXIF data is still a photo
        pass


class Store:
    """A file of tensors of one shape and type, one a row, that are written once and read many times.

    Behind the rows lies a byte for each, which is set when the row has reached the disk. So a run that is killed leaves
    only whole rows behind and the next one goes on from there; and two runs at once write the same bytes twice. Only the
    rows in use are in memory: they are mapped anew for each batch, as nanoGPT does.

    The file is called NAME-FINGERPRINT after what went into it. Others of the same NAME are out of date, and deleted.
    """

    def __init__(self, folder: Path, name: str, facts: tuple, rows: int, shape: tuple[int, ...], dtype: torch.dtype):
        self.name, self.rows, self.shape, self.dtype = name, rows, tuple(shape), dtype
        self.row_bytes = math.prod(shape) * dtype.itemsize
        self.file = folder / f"{name}-{fingerprint(facts, dtype, STORE_FORMAT)}"
        self.trouble = f"decoded photos and their maps can't be kept in '{folder}' (make room there, or choose another --cache DIR)"
        with disk_errors(self.trouble):
            folder.mkdir(parents=True, exist_ok=True)
            for old in set(folder.glob(f"{name}-{'[0-9a-f]' * 16}")) - {self.file}:
                with suppress(OSError):  # Windows deletes no file that another run has open
                    old.unlink()
            self.stream = open(self.file, "r+b", opener=lambda path, flags: os.open(path, flags | os.O_CREAT, 0o666))
            self.stream.truncate(rows * (self.row_bytes + 1))

    def missing(self, rows: torch.Tensor) -> torch.Tensor:
        """For each of these rows whether it is still to be written: bool (len(rows),)."""
        written = np.memmap(self.stream, bool, "r", offset=self.rows * self.row_bytes, shape=self.rows)
        return ~torch.from_numpy(written[rows.numpy()])

    def write(self, rows: torch.Tensor, values: torch.Tensor) -> None:
        """Write values (len(rows), *shape) to these rows."""
        assert (*values.shape, values.dtype) == (len(rows), *self.shape, self.dtype)
        with disk_errors(self.trouble):
            for row, value in zip(rows.tolist(), values.contiguous().view(torch.uint8).numpy()):
                self.stream.seek(row * self.row_bytes)
                self.stream.write(value)
            self.stream.flush()
            os.fsync(self.stream.fileno())
            for row in rows.tolist():
                self.stream.seek(self.rows * self.row_bytes + row)
                self.stream.write(b"\1")
            self.stream.flush()

    def check(self, rows: torch.Tensor) -> None:
        """Raise InputError unless all processes find these rows written."""
        wait_for_all()
        if self.missing(rows).any():
            raise InputError(f"'{self.file}' was deleted by another run meanwhile: start again, with a --cache of its own")

    def __getitem__(self, rows: torch.Tensor) -> torch.Tensor:
        """A copy of these rows: (len(rows), *shape)."""
        data = np.memmap(self.stream, np.uint8, "r", shape=(self.rows, self.row_bytes))
        return torch.from_numpy(data[rows.numpy()]).view(self.dtype).view(len(rows), *self.shape)


def fingerprint(*facts) -> str:
    """A short name for these facts, which changes when one of them does."""
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def in_steps(title: str, rows: torch.Tensor, size: int):
    """Go through the rows a few at a time with a progress bar, and say how long it took."""
    start = time.perf_counter()
    with tqdm(desc=title, total=len(rows), unit="photo", leave=False, disable=QUIET) as progress:
        for some in rows.split(size) if len(rows) else ():
            if ASKED:
                raise Stopped
            yield some
            progress.update(len(some))
    if len(rows):
        seconds = time.perf_counter() - start
        print(f"{title:11} {len(rows):,} photos{' in this process' if LOCAL_PROCESSES > 1 else ''} in {seconds:.1f} s "
              f"({len(rows) / seconds:,.0f} a second)", flush=True)


def pixel_store(cache: Path, folder: Path, facts: list[tuple], size: int, border: float | None) -> Store:
    """The store of a folder's photos, which holds for as long as none of them is added, removed or changed."""
    facts = [(os.path.relpath(name, folder), *rest) for name, *rest in facts]
    return Store(cache, f"pixels-{fingerprint(folder.resolve(), size, border)}", (facts, PIL.__version__), len(facts),
                 (size, size, 3), torch.uint8)


def decode(files: list[Path], rows: torch.Tensor, pixels: Store, workers: int, border: float | None) -> dict[int, str]:
    """Decode the photos of these rows, unless they are in the store already, in several threads.

    Threads rather than processes, because Pillow lets them run side by side (two cores, photos of 800 x 600: 144
    photos/s with one thread, 272 with two, 222 with two processes). A few at a time, so that few wait to be written.

    Returns:
        {row: what is wrong} of those that can't be read.

    Raises:
        InputError: the disk is full.
    """
    strict_about_photos()
    few = max(workers, min(32 * workers, 2**27 // pixels.row_bytes))
    damaged = {}

    with ThreadPoolExecutor(workers) as pool:
        for some in in_steps("Decoding", rows[pixels.missing(rows)], few):
            found = pool.map(lambda row: photo_or_problem(files[row], pixels.shape[0], border), some.tolist())
            photos = {}
            for row, photo in zip(some.tolist(), found):
                (damaged if isinstance(photo, str) else photos)[row] = photo
            if photos:
                pixels.write(torch.tensor(list(photos)), torch.from_numpy(np.stack(list(photos.values()))))
    return damaged


# -- The network: ImageNet's ResNet50, its last layer replaced, its first children frozen -----------------------------

def initial_state(spec: str) -> dict[str, torch.Tensor]:
    """The state dict that training starts from.

    Args:
        spec: a torchvision name (fetched once, with a hash check), or the path of a ResNet50 state dict.

    Raises:
        InputError: no network, no such file, or a file that holds something else.
    """
    if spec in ResNet50_Weights.__members__:
        weights = ResNet50_Weights[spec]
        try:
            return weights.get_state_dict(progress=True, check_hash=True)
        except Exception as error:  # no network, a broken transfer, a wrong hash, a full disk
            raise InputError(f"--weights {spec} can't be fetched ({first_line(error)}): download {weights.url} into "
                             f"{torch.hub.get_dir()}/checkpoints, or anywhere and give --weights PATH") from None
    if not os.path.isfile(spec):
        names = ", ".join(member.name for member in ResNet50_Weights)
        raise InputError(f"--weights '{spec}' is no file, nor one of {names}, none")
    return load_tensors(Path(spec), f"--weights '{spec}'", "a state dict, as torch.save(model.state_dict(), PATH) writes it",
                        "fetch or save it again")


def load_tensors(file: Path, name: str, expected: str, advice: str):
    """What torch.save wrote into a file, if that is tensors and plain values. No code in it is run. Raises InputError: the
    file can't be read, is damaged, holds code, or is something else than the `expected`."""
    try:
        with open(file, "rb") as stream:
            if zipfile.is_zipfile(stream) and (part := zipfile.ZipFile(stream).testzip()):  # torch doesn't check
                raise InputError(f"{name} is damaged (in its part {part!r}): {advice}")
            stream.seek(0)
            return torch.load(stream, map_location="cpu", weights_only=True)
    except OSError as error:
        raise InputError(f"{name} can't be read ({error.strerror or error}): {advice}") from None
    except (InputError, MemoryError):
        raise
    except Exception as error:  # what torch says here is how to load a file unsafely
        code = re.search(r"Unsupported (?:global|class)\S*(?: GLOBAL)? (\S+)", str(error))
        if code:
            raise InputError(f"{name} holds code ({code[1]}), not only tensors and plain values: it was refused and "
                             f"nothing of it was run. Expected: {expected}") from None
        raise InputError(f"{name} is not {expected}, or a damaged one: {advice}") from None


def build_network(spec: str, classes: int) -> nn.Module:
    """A torchvision ResNet50 with the weights of `spec` and, whatever its last layer was, a new one for `classes`, which
    starts from small random numbers (uniform within 1 / sqrt(2048) = 0.022 on either side of 0). Raises InputError: the weights
    can't be had, or are another network's."""
    network = resnet50(weights=None)
    if spec != "none":
        load_backbone(network, initial_state(spec), spec)
    network.fc = nn.Linear(network.fc.in_features, classes)
    return network


def small_cnn(classes: int) -> nn.Module:
    """What --from-scratch trains: five blocks of convolution, BatchNorm, ReLU and pooling, with 3 -> 16 -> ... -> 256 channels."""
    network = nn.Sequential()
    for block, (before, after) in enumerate([(3, 16), (16, 32), (32, 64), (64, 128), (128, 256)], 1):
        network.add_module(f"block{block}", nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after),
                                                          nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)))
    network.avgpool, network.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(256, classes)
    return network


def load_backbone(network: nn.Module, state, spec: str) -> None:
    """Give the network all of a state dict but fc, which is replaced. Raises InputError: with what differs, if it is no
    state dict, or another network's."""
    for wrapper in ("model", "state_dict"):  # checkpoints of this script and of many others
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not all(isinstance(key, str) and isinstance(value, torch.Tensor)
                                              for key, value in state.items()):
        raise InputError(f"--weights '{spec}' holds no state dict (names and tensors) but a {type(state).__name__}: save "
                         "one with torch.save(model.state_dict(), PATH)")
    given, needed = ({name: value for name, value in tensors.items()
                      if not name.startswith("fc.") and not name.endswith("num_batches_tracked")}
                     for tensors in (state, network.state_dict()))
    if given.keys() != needed.keys():
        raise InputError(f"--weights '{spec}' is not of a ResNet50: "
                         f"{differences(given, needed, 'the file', 'ResNet50')}")
    try:
        network.load_state_dict(given, strict=False)
    except RuntimeError as error:  # a size that differs, after a headline
        raise InputError(f"--weights '{spec}' is not of a ResNet50: {str(error).splitlines()[1].strip()}") from None


class FineTuned(nn.Module):
    """A network cut in three: a trunk that is frozen, a backbone that learns slowly, a head that learns fast.

    Frozen means more than "no gradients": BatchNorm in train mode goes on averaging the statistics of every batch. The
    trunk is a copy in which each BatchNorm, held as it is, is folded into the convolution before it. With
    `hold_batchnorm` the backbone's BatchNorm layers keep ImageNet's statistics too, and learn scale and shift only.
    """

    def __init__(self, network: nn.Module, freeze: int, precision: torch.dtype = torch.float32,
                 hold_batchnorm: bool = False):
        super().__init__()
        self.network = network  # the same layers under torchvision's names, for checkpoints
        *children, self.head = network.children()
        frozen = nn.Sequential(*children[:freeze]).requires_grad_(False).eval()
        self.trunk = fuse(frozen).to(precision).to(memory_format=layout(self.device))
        self.backbone = nn.Sequential(*children[freeze:])
        self.precision, self.hold_batchnorm = precision, hold_batchnorm
        self.mean, self.std = (torch.tensor(rgb, device=self.device).view(3, 1, 1) for rgb in (MEAN, STD))

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def train(self, mode: bool = True):
        super().train(False)
        self.backbone.train(mode and not self.hold_batchnorm)
        return self

    @torch.no_grad()
    def maps(self, pixels: torch.Tensor) -> torch.Tensor:
        """What the trunk makes of photos: uint8 (batch, size, size, 3) -> (batch, 512, size / 8, size / 8), if it is
        six children long. Scaled with ImageNet's mean and deviation first."""
        images = (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        return self.trunk(images.to(self.precision, memory_format=layout(self.device)))

    def features(self, maps: torch.Tensor) -> torch.Tensor:
        """The trunk's maps -> what the head sees of a photo, float32 (batch, features): 2048 numbers in a ResNet50."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            return self.backbone(maps).flatten(1).float()

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """The trunk's maps -> logits, float32 (batch, classes)."""
        return self.head(self.features(maps))


# -- Batches: photos as the trunk's maps of them, cropped in training -------------------------------------------------

class Photos:
    """Photos ready for the network: as pixels or, once these have been kept, as the trunk's maps of them.

    Args:
        pixels: the decoded photos of a folder.
        rows: which of these the photos are, int64 (photos,).
        labels: int64 (photos,).
        files: where they come from.
    """

    def __init__(self, model: FineTuned, pixels: Store, rows: torch.Tensor, labels: torch.Tensor, files: Sequence[Path] = ()):
        self.model, self.pixels, self.rows, self.labels, self.files = model, pixels, rows, send(labels, model.device), files
        self.kept: Store | torch.Tensor | None = None  # maps of all photos, or their pixels on the GPU

    def checksums(self) -> list[int]:
        """CRC-32 of each photo's pixels: what tells whether the network still learns from the same."""
        return [zlib.crc32(photo) for some in self.rows.split(256) for photo in self.pixels[some].numpy()]

    def look(self, which: torch.Tensor, places: torch.Tensor | None = None, mirrored: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        """The trunk's maps (views, channels, side, side) of these photos and their labels, on the device.

        Args:
            which: int64 (views,).
            places: where the crop of each lies, float32 (views, 2), as in `cut`; None for whole photos.
            mirrored: left and right exchanged.
        """
        device = self.model.device
        on_device = send(which, device)
        if mirrored or self.kept is None:
            seen = self.pixels[self.rows[which]]
            seen = seen.flip(2) if mirrored else seen
        else:
            seen = self.kept[which if isinstance(self.kept, Store) else on_device]
        seen = send(seen if places is None else cut(seen, places), device)
        if seen.dtype == torch.uint8:
            return self.model.maps(seen), self.labels[on_device]
        return seen.permute(0, 3, 1, 2).contiguous(memory_format=layout(device)), self.labels[on_device]

    def keep(self, freeze: int, limit: float, earlier: str = "") -> str:
        """Keep what each step would do again, if there is room: in a GPU's memory (a quarter of what is free) the trunk's
        maps of the photos, or else their pixels; elsewhere the maps, in a store (half of what is free on the disk).

        Args:
            limit: the most that a store of maps may take, in GB.
            earlier: what became of it when a run that is resumed began; it stays so, whatever room there is now.

        Returns:
            What became of it, in words.

        Raises:
            InputError: the disk is full, or another run has deleted the store meanwhile.
        """
        model, everything = self.model, torch.arange(len(self.rows))
        example = self.look(everything[:1])[0].permute(0, 2, 3, 1)[0]
        gigabytes, on_gpu = len(everything) * example.nbytes / 1e9, model.device.type == "cuda"
        room = torch.cuda.mem_get_info()[0] / 4e9 if on_gpu else 0.0
        stepwise = freeze < 5 or earlier.startswith("computed in every step")  # too short a trunk to be worth it; or as it began
        if on_gpu and not stepwise and not any(wished(gigabytes >= room)):
            self.kept = torch.cat([self.look(some)[0].permute(0, 2, 3, 1) for some in everything.split(32)])
            return f"computed once, {gigabytes:.1f} GB of maps on the GPU"
        if stepwise or on_gpu and not earlier:
            if len(everything) * self.pixels.row_bytes / 1e9 < room:
                self.kept = torch.cat([send(self.pixels[rows], model.device) for rows in self.rows.split(256)])
            return earlier or "computed in every step"
        if gigabytes > limit and not earlier:
            return f"computed in every step (its maps would take {gigabytes:.1f} GB, see --cache-gb)"

        trunk = b"".join(value.float().cpu().numpy().tobytes() for value in model.trunk.state_dict().values())
        facts = (self.pixels.file.name, self.rows.tolist(), hashlib.sha256(trunk).hexdigest(), freeze, model.device.type,
                 torch.__version__)
        maps = Store(self.pixels.file.parent, self.pixels.name.replace("pixels", "maps"), facts, len(everything),
                     example.shape, example.dtype)
        lacking = int(maps.missing(everything).sum()) * example.nbytes
        full = lacking > shutil.disk_usage(maps.file.parent).free / 2
        if any(wished(full)) and not earlier:  # on any machine
            return f"computed in every step (its maps would take {gigabytes:.1f} GB, and the disk of --cache is too full)"
        mine = everything[LOCAL_RANK::LOCAL_PROCESSES]
        for some in in_steps("Trunk maps", mine[maps.missing(mine)], 32):
            maps.write(some, self.look(some)[0].permute(0, 2, 3, 1).cpu())
        maps.check(everything)
        self.kept = maps
        return f"computed once, {gigabytes:.1f} GB of maps"


def cut(photos: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """A square of each photo or trunk map, CROP times as high and wide but not of a single place, whose gradients oneDNN gets wrong
    in bfloat16 (a 3 x 3 convolution of stride 2): (views, side, side, channels) -> the same.

    The trunk has stride 8, so that a crop of its map is close to the map of a crop of the photo; near its edges it has seen more.

    Args:
        places: float32 (views, 2), from 0 (at the top, on the left) to 1.
    """
    side = photos.shape[1]
    kept = max(min(2, side), round(CROP * side))
    corners = (places * (side - kept + 1)).long()
    rows, columns = send(corners[:, :, None] + torch.arange(kept), photos.device).unbind(1)  # (views, kept)
    views = send(torch.arange(len(photos)), photos.device)
    return photos[views[:, None, None], rows[:, :, None], columns[:, None, :]]


def draw_epoch(count: int, seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An order of so many photos, int64, and a place for the crop of each. They depend on seed and epoch alone, so that
    several processes agree without talking."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator), torch.rand(count, 2, generator=generator)


def steps_of(count: int, batch_size: int) -> tuple[torch.Tensor, ...]:
    """Which of so many photos are in which step: at most `batch_size`, all of nearly the same size (65 make 33 + 32 rather
    than 64 + 1: one photo alone is a poor gradient, and no BatchNorm statistics)."""
    return torch.arange(count).tensor_split(math.ceil(count / batch_size))


def batches(photos: Photos, which: torch.Tensor, batch_size: int, title: str, places: torch.Tensor | None = None, done: int = 0,
            mirrored: bool = False):
    """Go once through these photos in their order, in steps.

    Args:
        which, places, mirrored: as in `Photos.look`.
        title: what the progress bar says, where standard error is a terminal.
        done: how many steps to leave out at the start.

    Yields:
        This process's share of a step, maps and labels as `Photos.look` gives them, and the size of the whole step.
    """
    steps = steps_of(len(which), batch_size)
    for step in tqdm(steps[done:], title, len(steps), initial=done, unit="step", leave=False, disable=QUIET):
        mine = step[RANK::PROCESSES]
        yield *photos.look(which[mine], None if places is None else places[mine], mirrored), len(step)


# -- The optimiser: a fast head, a slow backbone ----------------------------------------------------------------------

def build_optimizer(model: FineTuned, lr_head: float, lr_backbone: float) -> torch.optim.Optimizer:
    """Adam over exactly the parameters that learn, in two groups: the head's and the backbone's."""
    return torch.optim.Adam([{"params": list(part.parameters()), "lr": rate, "initial_lr": rate}
                             for part, rate in ((model.head, lr_head), (model.backbone, lr_backbone))], fused=True)


def rise_and_fall(step: int, steps: int) -> float:
    """The part of the learning rates that step number `step` (from 0) of `steps` is made with: it rises to 1 in the first
    WARM_UP of them, then falls to 0 along a cosine (Loshchilov and Hutter, SGDR, ICLR 2017)."""
    risen = (step + 1) / (WARM_UP * steps + 1)
    return min(risen, (1 + math.cos(math.pi * max(0, step / steps - WARM_UP) / (1 - WARM_UP))) / 2)


# -- Epochs -----------------------------------------------------------------------------------------------------------

def loss_and_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Mean cross-entropy, and the part of the photos whose largest logit is their label's."""
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()


@torch.no_grad()
def predict(model: FineTuned, loader, layers=None) -> torch.Tensor:
    """What the network, or only its `layers`, makes of every photo: float32 (photos, classes or features), on the CPU."""
    model.eval()
    steps = []
    for maps, _, count in loader:
        if any(wished(bool(ASKED))):
            raise Stopped
        mine = (layers or model)(maps)
        steps.append(mine.new_zeros(count, mine.shape[1]))
        steps[-1][RANK::PROCESSES] = mine
    return summed(torch.cat(steps)).cpu()


def temperature_of(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """What to divide logits by, so that a confidence of 80 % is right four times of five: what gives these photos, which the network
    has not learnt from, the lowest loss (Guo et al., On Calibration of Modern Neural Networks, ICML 2017). From 0.1 to 10; the second
    term keeps it near 1 if the photos are few (30 of them say less than the logits as they are)."""
    candidates = torch.logspace(-1, 1, 401)
    losses = [F.cross_entropy(logits / each, labels) + 10 * each.log().square() / len(labels) for each in candidates]
    return candidates[torch.stack(losses).argmin()].item()


def spread_of(features: torch.Tensor) -> torch.Tensor:
    """What logistic regression divides these centred features (photos, features) by: the geometric mean of each one's deviation and
    of that of all. So PENALTY means the same for any network, and what varies little counts for more, but not for as much as the rest."""
    overall = features.std()
    return (overall * (features.std(0) + overall / 1000)).sqrt()


def probe(model: FineTuned, loaders, labels: torch.Tensor) -> tuple[float, float]:
    """Start the head where logistic regression on the features of the network as it is ends. From noise it would first send
    large gradients into good layers (Kumar et al., Fine-Tuning can Distort Pretrained Features, ICLR 2022).

    Args:
        loaders: one or more, each of all training photos in the same order: as they are, mirrored.
        labels: the photos', int64 (photos,), on the CPU.

    Returns:
        Mean loss and accuracy of the first loader's photos, then.

    Raises:
        InputError: the features can't be told apart.
    """
    features = torch.cat([predict(model, loader, model.features) for loader in loaders])  # (loaders * photos, 2048)
    count, labels = len(labels), labels.repeat(len(loaders))
    centre = features.mean(0)
    spread = spread_of(features.sub_(centre))
    if not (0 < spread.min() and spread.max() < math.inf):
        raise InputError("the network makes no finite numbers of the training photos, or the same of all: check --weights, or "
                         "try --amp off")
    features.div_(spread)
    head = nn.Linear(features.shape[1], model.head.out_features)
    nn.init.zeros_(head.weight), nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(features), labels) + PENALTY * head.weight.square().sum()
        loss.backward()
        return loss.detach()

    optimizer.step(closure)
    with torch.no_grad():
        model.head.weight.copy_(head.weight / spread)
        model.head.bias.copy_(head.bias - head.weight @ (centre / spread))
        return loss_and_accuracy(head(features[:count]), labels[:count])


def train_epoch(model: nn.Module, loader, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, shares,
                totals: torch.Tensor, after_step=lambda losses: None) -> None:
    """One pass over the training photos.

    Args:
        shares: of the learning rates, one a step.
        totals: float32 (2,), to which this adds the sum of the photos' losses and how many were recognised, as they were when the
            network met them (it learns meanwhile, so they lag behind what it can do at the end of the epoch).
        after_step: is called after each step, with the loss of each of its photos.
    """
    model.train()
    for (maps, labels, count), share in zip(loader, shares, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = share * group["initial_lr"]
        logits = model(maps)
        losses = F.cross_entropy(logits, labels, reduction="none")
        optimizer.zero_grad()
        scaler.scale(losses.sum() / count * PROCESSES).backward()  # of several processes DDP takes the mean
        scaler.step(optimizer)
        scaler.update()
        totals += torch.stack([losses.detach().sum(), (logits.argmax(1) == labels).sum()])
        after_step(losses.detach())


# -- The test ---------------------------------------------------------------------------------------------------------

def wilson_interval(correct: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval that a proportion lies in with 95 % confidence (E. B. Wilson, JASA 1927)."""
    if not count:
        return 0.0, 1.0
    share = correct / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def calibration_error(logits: torch.Tensor, labels: torch.Tensor, bins: int = BINS) -> float:
    """Expected calibration error: how far confidence is from the part that is right, among photos of about the same confidence; the
    mean over all photos."""
    confidence, predicted = logits.double().softmax(1).max(1)
    places = (confidence * bins).long().clamp(0, bins - 1)
    gaps = torch.zeros(bins).double().index_add(0, places, confidence - (predicted == labels).double())
    return gaps.abs().sum().item() / len(labels)


def test_report(logits: torch.Tensor, labels: torch.Tensor, classes: list[str], temperature: float = 1.0) -> dict:
    """What goes into test.json. Rows of the confusion matrix are the labels, columns the predictions. The loss is that of the logits
    as they are, like the losses of history.csv.

    A class that is never predicted has precision 0, and F1 is 0 where precision and recall both are.
    """
    predicted = logits.argmax(1)
    confusion = torch.bincount(labels * len(classes) + predicted, minlength=len(classes) ** 2).view(len(classes), -1)
    loss, accuracy = loss_and_accuracy(logits, labels)
    counts = confusion.diag().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist()
    per_class = {name: {"photos": actual, "precision": hits / max(1, claimed), "recall": hits / max(1, actual),
                        "recall_interval_95": wilson_interval(hits, actual), "f1": 2 * hits / max(1, actual + claimed)}
                 for name, hits, actual, claimed in zip(classes, *counts)}
    return {"photos": len(labels), "loss": loss, "accuracy": accuracy,
            "accuracy_interval_95": wilson_interval(int(confusion.trace()), len(labels)), "temperature": temperature,
            "calibration_error": calibration_error(logits / temperature, labels),
            "calibration_error_unscaled": calibration_error(logits, labels),
            "per_class": per_class, "classes": classes, "confusion": confusion.tolist()}


def print_report(report: dict, tested: str) -> None:
    unscaled = f"; {100 * report['calibration_error_unscaled']:.1f} without the temperature of {report['temperature']:.2f}"
    low, high = report["accuracy_interval_95"]
    print(f"\nTest of {tested} on {report['photos']:,} photos: accuracy {report['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f}), "
          f"loss {report['loss']:.4f}\n"
          f"Confidence is off by {100 * report['calibration_error']:.1f} points on average (expected calibration error)"
          f"{unscaled if report['temperature'] != 1 else ''}\n")
    width = max(len("Class"), *(len(name) for name in report["classes"]))
    print(f"{'Class':{width}} | Photos | Precision | Recall (95 % interval) |     F1")
    for name, row in report["per_class"].items():
        low, high = row["recall_interval_95"]
        if row["photos"]:
            print(f"{name:{width}} | {row['photos']:6} | {row['precision']:9.4f} | {row['recall']:6.4f} ({low:.4f}-{high:.4f}) | "
                  f"{row['f1']:6.4f}")


# -- Pictures, where matplotlib is installed --------------------------------------------------------------------------

BLUE, ORANGE = "#0072b2", "#d55e00"  # which the colour-blind can tell apart (Okabe and Ito)


def draw_pictures(out: Path, report: dict, logits: torch.Tensor, photos: Photos, history: list[dict] = ()) -> None:
    """Draw curves.png (of a history), confusion.png, mistakes.png and reliability.png into a run's folder.

    Args:
        report: as `test_report` gives it.
        logits: of the test photos, float32 (photos, classes), on the CPU.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("Pictures    none, for want of matplotlib: pip install matplotlib, and type the command, or --resume, again",
                     flush=True)
    confidence, predicted = (logits / report["temperature"]).softmax(1).max(1)
    report = report | {"classes": [plain(name) for name in report["classes"]]}
    figures = {name: Figure(layout="constrained", dpi=120) for name in PICTURES if history or name != "curves.png"}
    if history:
        draw_curves(figures["curves.png"], history, report["epoch"])
    draw_confusion(figures["confusion.png"], report)
    draw_mistakes(figures["mistakes.png"], photos, confidence, predicted, report["classes"])
    draw_reliability(figures["reliability.png"], confidence, predicted == photos.labels.cpu(), report["calibration_error"])
    for name, figure in figures.items():
        with atomic_write(out / name) as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of names in scripts that its font lacks, or too long to leave room
            figure.savefig(stream, format="png")


def plain(name: str) -> str:
    """A name as matplotlib draws it: no mathematics between dollar signs, no bytes that are no text, and not too long."""
    return name[:40].replace("$", r"\$").encode("utf-8", "replace").decode()


def draw_curves(figure, history: list[dict], best: int) -> None:
    figure.set_size_inches(10, 4)
    epochs = [row["epoch"] for row in history]
    for axes, key, title in zip(figure.subplots(1, 2), ("loss", "acc"), ("Loss", "Accuracy")):
        axes.plot(epochs, [row[f"train_{key}"] for row in history], "o--", color=ORANGE, label="training, while learning")
        axes.plot(epochs, [row[f"val_{key}"] for row in history], "s-", color=BLUE, label="validation")
        axes.axvline(best, color="grey", linestyle=":", label=f"best epoch: {best}")
        axes.set(title=title, xlabel="epoch", ylim=(0, 1.02 if key == "acc" else None))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()


def draw_confusion(figure, report: dict) -> None:
    classes, counts = report["classes"], torch.tensor(report["confusion"])
    shares, side = counts / counts.sum(1, keepdim=True).clamp(min=1), min(40, 3 + 0.5 * len(classes))
    figure.set_size_inches(side + 1, side)
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="part of the class's photos", shrink=0.8)
    axes.set(title=f"Test of epoch {report['epoch']}: accuracy {report['accuracy']:.4f}, photos counted", xlabel="predicted", ylabel="is")
    if len(classes) <= 100:  # more names and numbers could not be read
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
        for row, column in counts.nonzero().tolist():
            axes.text(column, row, int(counts[row, column]), ha="center", va="center",
                      color="white" if shares[row, column] > 0.5 else "black")


def draw_mistakes(figure, photos: Photos, confidence: torch.Tensor, predicted: torch.Tensor, classes: list[str], most: int = 15) -> None:
    wrong = (predicted != photos.labels.cpu()).nonzero().flatten()
    worst = wrong[confidence[wrong].argsort(descending=True)][:most].tolist()
    rows = max(1, math.ceil(len(worst) / 5))
    figure.set_size_inches(12, 3 * rows)
    figure.suptitle(f"The most confident of {len(wrong):,} mistakes, as the network saw them" if worst else "No mistakes")
    for axes, index in zip(figure.subplots(rows, 5, squeeze=False).flatten(), worst + [None] * 5):
        axes.axis("off")
        if index is not None:
            axes.imshow(photos.pixels[photos.rows[index:index + 1]][0].numpy())
            axes.set_title(f"is {classes[photos.labels[index]]}\nseen as {classes[predicted[index]]}, {100 * confidence[index]:.0f} %\n"
                           + plain(photos.files[index].name if photos.files else ""), fontsize=9)


def draw_reliability(figure, confidence: torch.Tensor, right: torch.Tensor, error: float, bins: int = BINS) -> None:
    figure.set_size_inches(6, 7)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    place = (confidence * bins).long().clamp(0, bins - 1)
    counts, hits = (torch.bincount(of, minlength=bins) for of in (place, place[right]))
    upper.plot([0, 1], [0, 1], "--", color="grey", label="as it should be")
    for index in counts.nonzero().flatten().tolist():
        share, (low, high) = int(hits[index]) / int(counts[index]), wilson_interval(int(hits[index]), int(counts[index]))
        upper.errorbar(confidence[place == index].mean().item(), share, [[max(0.0, share - low)], [max(0.0, high - share)]],
                       fmt="o", color=BLUE, capsize=3,
                       label="photos of about this confidence (95 % interval)" if index == int(place.max()) else None)
    upper.set(title=f"Confidence is off by {100 * error:.1f} points on average", ylabel="part that is right", ylim=(-0.02, 1.02))
    upper.legend(loc="upper left")
    lower.bar((np.arange(bins) + 0.5) / bins, counts.numpy(), width=0.9 / bins, color=BLUE)
    lower.set(xlabel="confidence", ylabel="photos", xlim=(0, 1))
    for axes in (upper, lower):
        axes.grid(alpha=0.3)


# -- The run's folder -------------------------------------------------------------------------------------------------

NO_CACHE = ".until-the-run-ends"  # the folder in it that --no-cache takes for a cache
PICTURES = ("curves.png", "confusion.png", "mistakes.png", "reliability.png")
RUN_FILES = ("config.json", "split.json", "history.csv", "last.pt", "best.pt", "test.json", "predictions.csv", "damaged.csv",
             "same_photos.csv", "not_finite.csv", *PICTURES)


@contextmanager
def run_folder(args: argparse.Namespace):
    """The folder of a run, args.out: a new one, or that of --resume, with what a kill may have left cleaned away. Whatever ends
    the run, the message says how to go on; a run that could not begin leaves nothing behind."""
    resumed, default = args.resume is not None, args.out is None
    args.out = on_first(claim_folder, args.out, RUN_FILES, resumed)
    script = sys.argv[0] if __name__ == "__main__" else "Q3.py"
    command = (f"{f'torchrun --nproc-per-node={LOCAL_PROCESSES}' if PROCESSES > 1 else 'python'} {quoted(script)} --resume "
               f"{quoted(str(args.out))}")
    try:
        try:
            yield
        finally:
            if args.no_cache:
                shutil.rmtree(args.out / NO_CACHE, ignore_errors=True)
    except (CannotGoOn, BrokenPipeError):
        raise
    except (InputError, KeyboardInterrupt, OSError) as error:  # OSError: what is printed can't be written
        interrupted = isinstance(error, KeyboardInterrupt)
        if resumed or (args.out / ("config.json" if interrupted else "last.pt")).exists():
            words = f"go on with: {command}" if interrupted else f"{error}. Then go on with: {command}"
        else:
            words = "nothing was kept, type the command again" if interrupted else str(error)
            for name in RUN_FILES if RANK == 0 else ():
                with suppress(OSError):
                    (args.out / name).unlink()
        raise (KeyboardInterrupt if interrupted else InputError)(words) from None
    finally:
        if default and RANK == 0:
            with suppress(OSError):  # of a folder that is not empty
                args.out.rmdir()


def machine(device: torch.device, precision: torch.dtype) -> dict:
    """What a run's figures depend on besides its options."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": device.type, "device_name": name, "threads": torch.get_num_threads(),
            "precision": str(precision).removeprefix("torch."), "processes": PROCESSES,
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__,
                         "numpy": np.__version__, "pillow": PIL.__version__}}


def print_banner(config: dict) -> None:
    options, photos = config["options"], config["photos"]
    network, children = ("a small CNN from scratch", 7) if options["from_scratch"] else (f"ResNet50 from {options['weights']}", 10)
    steps = math.ceil(photos["train"] / options["batch_size"])
    aside = (f"Test        {options['test_fraction']:g} of each class, set aside first, as there is no val/ (--test-fraction)\n"
             if options["test_fraction"] else "")
    unread = unread_part(Path(options["data"]))
    aside += ("Note        frozen layers of random weights learn nothing and see little: add --freeze 0\n"
              if options["weights"] == "none" and options["freeze"] else "")
    aside += f"Note        '{unread}' is not read: test photos belong in val/, validation photos in train/\n" if unread else ""
    print(f"Photos      {photos['train']:,} training, {photos['val']:,} validation, {photos['test']:,} test; "
          f"{len(config['classes'])} classes ({options['data']}, --fraction {options['fraction']:g})\n{aside}"
          f"Network     {network}, {options['image_size']} x {options['image_size']} pixels\n"
          f"Parameters  {config['trainable_parameters']:,} trainable, {config['frozen_parameters']:,} frozen "
          f"(the first {options['freeze']} of {children} children)\n"
          f"Device      {config['device']} ({config['device_name']}), {config['precision']}"
          f"{f', {PROCESSES} processes' if PROCESSES > 1 else ''}\n"
          f"Steps       {steps} an epoch, {steps * options['epochs']:,} in all\n"
          f"Results     {options['out']}", flush=True)


def on_cpu(value):
    """The same nest of dicts and lists, its tensors on the CPU, where every machine can load them."""
    if isinstance(value, torch.Tensor):
        return value.cpu().contiguous()
    if isinstance(value, dict):
        return {key: on_cpu(inner) for key, inner in value.items()}
    return [on_cpu(inner) for inner in value] if isinstance(value, list) else value


def save_checkpoint(file: Path, checkpoint: dict) -> None:
    checkpoint = on_cpu(checkpoint)
    try:
        with atomic_write(file) as stream:
            torch.save(checkpoint, stream)
    except RuntimeError as error:  # how torch reports that it could not write to the end
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise InputError(f"'{file}' can't be written to its end: is the disk full? Make room") from None


CHECKPOINT = {"format": int, "architecture": str, "model": dict, "classes": list, "preprocessing": dict, "options": dict, "epoch": int,
              "history": list, "step": int, "totals": torch.Tensor, "seconds": float, "temperature": float, "checksums": dict,
              "optimizer": dict, "scaler": dict}  # what a checkpoint holds


def load_checkpoint(file: Path) -> dict:
    """A checkpoint that this script wrote, on the CPU. Raises InputError: it can't be read, is damaged, or is something
    else."""
    checkpoint = load_tensors(file, f"'{file}'", "a checkpoint of Q3.py", "put a whole copy back, or start another run")
    if not isinstance(checkpoint, dict) or "format" not in checkpoint:
        tensors = isinstance(checkpoint, dict) and checkpoint and all(isinstance(value, torch.Tensor) for value in checkpoint.values())
        found = "a state dict, which --weights takes" if tensors else f"a {type(checkpoint).__name__}"
        raise InputError(f"'{file}' is no checkpoint of Q3.py but {found}")
    if type(checkpoint["format"]) is not int or checkpoint["format"] != CHECKPOINT_FORMAT:
        raise InputError(f"'{file}' has checkpoint format {checkpoint['format']!r}, this version of Q3.py reads {CHECKPOINT_FORMAT}: use "
                         "the version that wrote it, or start another run")
    wrong = [name for name, kind in CHECKPOINT.items() if not isinstance(checkpoint.get(name), kind)]
    if "temperature" not in wrong and not 0.09 < checkpoint["temperature"] < 11:  # see temperature_of
        wrong.append("temperature")
    if wrong:
        raise InputError(f"'{file}' is no checkpoint of Q3.py: its {', '.join(wrong)} is missing or of the wrong kind")
    return checkpoint


# -- The job ----------------------------------------------------------------------------------------------------------

def open_photos(model: FineTuned, pairs: list[tuple[Path, int]], facts: list[tuple], folder: Path, cache: Path,
                args: argparse.Namespace, may_skip: bool = False) -> tuple[Photos, dict[Path, str]]:
    """The photos of these (file, label) pairs, decoded, and what is wrong with damaged ones, which were left out.

    Args:
        facts: as `file_facts` gives them, of all files of the folder, whose photos share a store.
        may_skip: whether the damaged ones of these photos may be left out.

    Raises:
        InputError: a photo can't be read and is not to be left out, photos change meanwhile, or the disk is full.
    """
    border = preprocessing(args)["border"]
    pixels = pixel_store(cache, folder, facts, args.image_size, border)
    row_of = {Path(name): row for row, (name, *_) in enumerate(facts)}
    rows = torch.tensor([row_of[file] for file, _ in pairs])
    with first_on_this_machine():
        damaged = decode(list(row_of), rows, pixels, args.workers, border)
    if changed := changed_files(facts):
        raise InputError(f"photos of '{folder}' change while they are read, '{changed[0]}' for one: start again when they are complete")
    if damaged and not (may_skip and args.skip_damaged):
        few, more = "; ".join(list(damaged.values())[:3]), f"; and {len(damaged) - 3} more" if len(damaged) > 3 else ""
        advice = ", or leave damaged ones out with --skip-damaged" if may_skip else ""
        remove = "" if folder == train_folder(args.data) and not may_skip else " or remove"  # what the split names has to stay
        raise InputError(f"{few}{more}: replace{remove} {'them' if len(damaged) > 1 else 'it'}{advice}")
    pairs = [(file, label) for file, label in pairs if row_of[file] not in damaged]
    rows = torch.tensor([row_of[file] for file, _ in pairs], dtype=torch.long)
    pixels.check(rows)
    files, labels = [file for file, _ in pairs], torch.tensor([label for _, label in pairs], dtype=torch.long)
    return Photos(model, pixels, rows, labels, files), {file: damaged[row] for file, row in row_of.items() if row in damaged}


def leave_out(damaged: dict[Path, str], photos: Photos, in_train: torch.Tensor, in_val: torch.Tensor, args: argparse.Namespace,
              classes: list[str]) -> None:
    """List damaged photos in damaged.csv. Raises InputError: without them a class has no photo to train with, or none are
    left to validate with."""
    taught = photos.labels[in_train].tolist()
    lack = [f"to train {name!r} with" for label, name in enumerate(classes) if label not in taught]
    if lack or not len(in_val):
        raise InputError(f"without the {len(damaged)} damaged photos none is left {(lack or ['to validate with'])[0]}")
    if damaged and RANK == 0:
        write_csv(args.out / "damaged.csv", [{"path": file.relative_to(args.data).as_posix(), "problem": words}
                                             for file, words in damaged.items()])
        print(f"Damaged     {len(damaged):,} photos left out, see {args.out / 'damaged.csv'}", flush=True)


class CannotGoOn(InputError):
    """An error that --resume would meet again."""


class Training:
    """The epochs of a run, and how far they have come: what a checkpoint holds besides the network.

    Args:
        in_train, in_val: which of the photos are in which part, int64.
        config: the run's config.json.
        test: paths of the test photos that were set aside, where there is no val/.
    """

    def __init__(self, model: FineTuned, photos: Photos, in_train: torch.Tensor, in_val: torch.Tensor, args: argparse.Namespace,
                 config: dict, test: Sequence[str] = ()):
        self.test = list(test)
        self.model, self.photos, self.args, self.config = model, photos, args, config
        self.in_train, self.in_val = in_train, in_val
        paths = [file.relative_to(train_folder(args.data)).as_posix() for file in photos.files]
        self.checksums = dict(zip(paths, photos.checksums(), strict=True))
        self.optimizer = build_optimizer(model, args.lr_head, args.lr_backbone)
        self.scaler = torch.amp.GradScaler(model.device.type, enabled=model.precision == torch.float16)
        self.history: list[dict] = []  # a row for each finished epoch
        self.step = 0  # of the epoch after these, how many are done,
        self.totals = torch.zeros(PROCESSES, 2, device=model.device)  # each process's losses, and how many photos were recognised,
        self.earlier = 0.0  # and the seconds they took before the run was interrupted
        self.start = self.saved = time.perf_counter()
        self.temperature = 1.0  # of the last of these epochs

    @property
    def best(self) -> dict:
        return max(self.history, key=lambda row: (row["val_acc"], -row["val_loss"]))  # of equal ones the first

    @property
    def seconds(self) -> float:
        return self.earlier + time.perf_counter() - self.start

    def save(self, *names: str) -> None:
        """Write checkpoints of this moment; but the last good ones stay if a number is not finite."""
        totals = summed(self.totals.clone())
        numbers = [totals, *(value for value in self.model.parameters() if value.requires_grad)]
        self.saved = time.perf_counter()
        if torch.stack([value.isfinite().all() for value in numbers]).all():
            on_first(self.write, totals, names)

    def write(self, totals: torch.Tensor, names: tuple[str, ...]) -> None:
        checkpoint = {"format": CHECKPOINT_FORMAT, "architecture": "small_cnn" if self.args.from_scratch else "resnet50",
                      "model": self.model.network.state_dict(),
                      **{key: self.config[key] for key in ("classes", "preprocessing", "options")},
                      "epoch": self.history[-1]["epoch"] if self.history else 0, "history": self.history, "step": self.step,
                      "totals": totals, "seconds": self.seconds, "temperature": self.temperature, "checksums": self.checksums,
                      "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(), "test": self.test}
        for name in names:
            save_checkpoint(self.args.out / name, checkpoint)

    def save_epoch(self) -> None:
        self.save("last.pt", *["best.pt"] * (self.best is self.history[-1]))
        on_first(write_csv, self.args.out / "history.csv", self.history)

    def restore(self, checkpoint: dict) -> None:
        """Go on from a checkpoint, whose `model` the network has already. Raises InputError: it is of other photos, or
        damaged."""
        args, before = self.args, checkpoint["checksums"]
        with fitting(args.out / "last.pt"):
            changed = sorted(path for path in {*before, *self.checksums} if before.get(path) != self.checksums.get(path))
            if changed:
                first = (train_folder(args.data) / changed[0]).relative_to(args.data)
                raise CannotGoOn(f"--resume '{args.out}': {len(changed)} of the photos are not those that the run began with (changed, "
                                 f"new, or damaged then or now), the first '{first}': put them back, or start another run")
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            for parameter, state in self.optimizer.state.items():  # Adam needs them in the parameters' layout
                state.update({name: torch.empty_like(parameter).copy_(value) for name, value in state.items() if value.dim()})
            if checkpoint["scaler"] and self.scaler.is_enabled():
                self.scaler.load_state_dict(checkpoint["scaler"])
            self.totals.copy_(own_totals(checkpoint["totals"]))
            self.history, self.step, self.earlier = checkpoint["history"], checkpoint["step"], checkpoint["seconds"]
            self.temperature = checkpoint["temperature"]
            for epoch, row in enumerate(self.history, self.history[0]["epoch"] if self.history else 1):
                if list(row) != HISTORY or row["epoch"] != epoch or not row_text(row):
                    raise ValueError("its history is no table of epochs")
        if self.history and self.step == 0:  # a kill may have come between the files of an epoch
            self.save_epoch()
        if self.history:
            on_first(self.check_best)

    def check_best(self) -> None:
        file = self.args.out / "best.pt"
        try:
            found = own_checkpoint(file, self.config)["epoch"]
        except InputError as error:
            raise CannotGoOn(f"{error} (it held the best epoch so far)") from None
        if found != self.best["epoch"]:
            raise CannotGoOn(f"'{file}' is not of epoch {self.best['epoch']}, the best so far: put that file back, or start another run")

    def run(self) -> None:
        """Train. After each epoch write last.pt, history.csv and, if it is the best so far, best.pt; then print its row.

        Raises:
            InputError: a file can't be written, or the loss is no longer finite.
            Stopped: when a signal asked for it, after saving.
        """
        print("\nEpoch | Train Loss | Train Acc | Val Loss | Val Acc", flush=True)
        for row in self.history:
            print(row_text(row), flush=True)
        model, args = self.model, self.args
        try:
            if starts_from_probe(args) and not self.history:
                loaders = [batches(self.photos, self.in_train, args.batch_size, f"features of {kind}", mirrored=mirrored)
                           for kind, mirrored in (("training photos", False), ("mirrored photos", True))]
                self.finish_epoch(0, *probe(model, loaders, self.photos.labels[self.in_train].cpu()))
            learner = nn.parallel.DistributedDataParallel(model) if PROCESSES > 1 else model  # with the first one's parameters
            for epoch in range(self.history[-1]["epoch"] + 1 if self.history else 1, args.epochs + 1):
                loss_sum, correct = self.train_epoch(learner, epoch)
                self.finish_epoch(epoch, loss_sum / len(self.in_train), correct / len(self.in_train))
        except Stopped:
            if self.history or self.step:
                self.save("last.pt")
            raise
        best = self.best
        print(f"\nBest epoch on {len(self.in_val):,} validation photos: {best['epoch']}, accuracy {best['val_acc']:.4f}", flush=True)

    def train_epoch(self, learner: nn.Module, epoch: int) -> tuple[float, float]:
        """The rest of an epoch's steps. Sum of the photos' losses, and how many were recognised."""
        args, tuned = self.args, self.args.recipe == "tuned"
        order, places = draw_epoch(len(self.in_train), args.seed, epoch)
        which, steps = self.in_train[order], steps_of(len(order), args.batch_size)
        loader = batches(self.photos, which, args.batch_size, f"epoch {epoch}/{args.epochs}",
                         places if tuned and args.freeze < 8 else None, self.step)  # behind layer4 only fc is left to learn
        shares = [rise_and_fall(len(steps) * (epoch - 1) + step, len(steps) * args.epochs) if tuned else 1.0
                  for step in range(self.step, len(steps))]
        first, seen = self.step, []  # the losses of each step's photos

        def after_step(losses: torch.Tensor) -> None:
            self.step += 1
            seen.append(losses)
            bad = losses.device.type == "cpu" and not losses.isfinite().all()  # a GPU would have to be waited for, in every step
            stop, save, bad = wished(bool(ASKED), time.perf_counter() - self.saved >= 60 * args.save_minutes, bad)
            if stop or save or bad:
                checked_totals()
            if stop:
                raise Stopped
            if save:
                self.save("last.pt")

        def checked_totals() -> list[float]:
            totals = summed(self.totals.clone()).sum(0)
            if not totals.isfinite().all():
                self.not_finite(epoch, which, steps[first:], shares, seen)
            return totals.tolist()

        train_epoch(learner, loader, self.optimizer, self.scaler, shares, self.totals[RANK], after_step)
        return tuple(checked_totals())

    def not_finite(self, epoch: int, which: torch.Tensor, steps, shares: list[float], seen: list[torch.Tensor]) -> None:
        """Raise an error that names step, learning rates and photos; the photos that this process has seen."""
        for place, (step, share, losses) in enumerate(zip(steps, shares, seen), self.step - len(seen) + 1):
            if not losses.isfinite().all():
                files = [self.photos.files[index] for index in which[step[RANK::PROCESSES]].tolist()]
                write_csv(self.args.out / "not_finite.csv",
                          [{"path": str(file), "loss": loss} for file, loss in zip(files, losses.tolist())])
                bad = [file for file, finite in zip(files, losses.isfinite().tolist()) if not finite]
                rates = " and ".join(f"{share * group['initial_lr']:.2g}" for group in self.optimizer.param_groups)
                self.diverged(epoch, f" in step {place}, at learning rates {rates}, for '{bad[0]}' and {len(bad) - 1} more of the "
                                     f"{len(files)} photos in {self.args.out / 'not_finite.csv'}")
        self.diverged(epoch, " in another process")

    def finish_epoch(self, epoch: int, train_loss: float, train_acc: float) -> None:
        """Validate, write files, print."""
        args, train_seconds = self.args, self.seconds
        loader = batches(self.photos, self.in_val, args.batch_size, "validation")
        logits, labels = predict(self.model, loader), self.photos.labels[self.in_val].cpu()
        val_loss, val_acc = loss_and_accuracy(logits, labels)
        if not math.isfinite(train_loss + val_loss):
            self.diverged(epoch)
        rates = [group["lr"] if epoch else 0.0 for group in self.optimizer.param_groups]
        row = dict(zip(HISTORY, (epoch, train_loss, train_acc, val_loss, val_acc, *rates, self.seconds,
                                 len(self.in_train) / train_seconds), strict=True))
        self.history.append(row)
        self.temperature = temperature_of(logits, labels) if args.recipe == "tuned" else 1.0
        self.step, self.earlier, self.start = 0, 0.0, time.perf_counter()
        self.totals.zero_()
        self.save_epoch()
        self.start = time.perf_counter()  # writing is no part of an epoch
        print(row_text(row), flush=True)
        if any(wished(bool(ASKED))):
            raise Stopped

    def diverged(self, epoch: int, where: str = "") -> None:
        advice = "lower --lr-head and --lr-backbone" if epoch else "check --weights"
        kept = f". The run up to epoch {self.history[-1]['epoch']} is in '{self.args.out}'" if self.history else ""
        raise CannotGoOn(f"the loss of epoch {epoch} is not a finite number{where}: {advice}, or try --amp off, in another run{kept}")


def own_totals(saved: torch.Tensor) -> torch.Tensor:
    """Of what each process had summed up, this one's row alone: (processes, 2) -> (PROCESSES, 2). If they were more or fewer then, the
    first one gets it all."""
    rows, own = saved.view(-1, 2), torch.zeros(PROCESSES, 2)
    rows = rows if len(rows) == PROCESSES else rows.sum(0, keepdim=True)
    if RANK < len(rows):
        own[RANK] = rows[RANK]
    return own


HISTORY = ["epoch", "train_loss", "train_acc", "val_loss", "val_acc", "lr_head", "lr_backbone", "seconds", "images_per_second"]


def row_text(row: dict) -> str:
    return (f"{row['epoch']:5} | {row['train_loss']:10.4f} | {row['train_acc']:9.4f} | {row['val_loss']:8.4f} | "
            f"{row['val_acc']:7.4f}")


@contextmanager
def fitting(file: Path):
    """What is restored from a checkpoint fits, or the file is damaged."""
    try:
        yield
    except torch.OutOfMemoryError:  # is a RuntimeError
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"'{file}' is of another run or damaged ({first_line(error)}): put the right one back, or start another "
                         "run") from None


def own_checkpoint(file: Path, config: dict) -> dict:
    """A checkpoint of the run that has this config.json, and of no other."""
    checkpoint = load_checkpoint(file)
    with fitting(file):
        had, has = checkpoint["options"], config["options"]
        other = [name for name in has if name not in (*CHANGEABLE, "out") and (had.get(name) or None) != (has[name] or None)]
        if other or checkpoint["classes"] != config["classes"]:
            raise InputError(f"'{file}' and config.json are of different runs: they differ in {', '.join(other) or 'the classes'}: "
                             "put the right one back, or start another run")
    return checkpoint


def print_resumed(before: dict, now: dict, checkpoint: dict | None) -> None:
    """Say from where a run goes on, and on what other machine. Raises InputError: this version of the script prepares photos
    in another way."""
    if before.get("preprocessing") != now["preprocessing"]:
        raise CannotGoOn(f"the run prepares photos in another way than this version of Q3.py ({before.get('preprocessing')}, "
                         f"{now['preprocessing']}): go on with the version that began it")
    left = checkpoint is None or checkpoint["epoch"] < now["options"]["epochs"]
    print("Resumed     " + (f"after epoch {checkpoint['epoch']} and {checkpoint['step']} steps of the next" if left and checkpoint else
                            "from the start: nothing was learnt yet" if left else "at the end: only the test is left, or made again"))
    with fitting(Path(now["options"]["out"], "config.json")):
        other_test = before["photos"]["test"] != now["photos"]["test"]
    if other_test:
        print(f"Note        {now['photos']['test']:,} test photos, other than when the run began: this is another test")
    for name in ("device", "device_name", "threads", "precision", "processes", "versions"):
        if before.get(name) != now[name]:
            print(f"Note        {name}: {now[name]}, was {before.get(name)}; figures may differ from an uninterrupted run's", flush=True)


def test(model: FineTuned, checkpoint: dict, parts: dict[str, list[tuple[Path, int]]], files: list[Path] | None, folder: Path,
         cache: Path, args: argparse.Namespace, history: list[dict] = ()) -> None:
    """Score a checkpoint, whose `model` the network has already, on the photos of parts["test"]; write test.json, predictions.csv and
    pictures.

    Args:
        files: all photos of the folder they are in, if it has others.
        history: of the run, for its curves.
    """
    facts = file_facts(files or [file for file, _ in parts["test"]])
    photos, _ = open_photos(model, parts["test"], facts, folder, cache, args)
    learnt = [file for file, crc in zip(photos.files, photos.checksums())
              if checkpoint["checksums"].get(file.relative_to(folder).as_posix()) == crc]
    if learnt and "train" not in parts and checkpoint.get("test"):
        raise InputError(f"{len(learnt):,} of the photos in '{folder}' are such as the network learnt from, '{learnt[0]}' for one, and some of "
                         "those that were set aside for its test are missing: put these back, or name other photos with --data")
    if learnt:
        print(f"Note        {len(learnt):,} of the photos are such as the network learnt from or was chosen by, the first '{learnt[0]}'",
              flush=True)
    logits = predict(model, batches(photos, torch.arange(len(photos.files)), args.batch_size, "test"))
    if RANK > 0:
        return

    classes, labels = checkpoint["classes"], photos.labels.cpu()
    report = {"epoch": checkpoint["epoch"], **test_report(logits, labels, classes, checkpoint["temperature"])}
    if "train" in parts:
        report["same_photos"] = print_same_photos(parts, args.data, args.out)
    write_json(args.out / "test.json", report)
    confidence, predicted = (logits / checkpoint["temperature"]).softmax(1).max(1)
    write_csv(args.out / "predictions.csv", [
        {"path": file.relative_to(folder).as_posix(), "label": classes[label],
         "predicted": classes[guess], "confidence": f"{share:.6f}"}
        for (file, label), guess, share in zip(parts["test"], predicted.tolist(), confidence.tolist())])
    print_report(report, f"the best epoch ({checkpoint['epoch']})" if "train" in parts else
                 f"epoch {checkpoint['epoch']}" + (f" and {checkpoint['step']} steps of the next" if checkpoint["step"] else ""))
    draw_pictures(args.out, report, logits, photos, history)


# -- A trained network, used ------------------------------------------------------------------------------------------

def trained(file: Path, args: argparse.Namespace) -> tuple[dict, FineTuned]:
    """A checkpoint and its network. Options that were not typed become those of its training. Raises InputError: the file is
    no checkpoint, or damaged, or photos were prepared in another way for it."""
    checkpoint, asked = load_checkpoint(file), dict(vars(args))
    with fitting(file):
        own, classes = typed_again(checkpoint["options"], file) | {"out": None, "no_cache": False}, checkpoint["classes"]
        vars(args).update({name: value for name, value in own.items() if getattr(args, name) is None})
        if checkpoint["preprocessing"] != preprocessing(args):
            raise InputError(f"'{file}' learnt from photos that were prepared in another way than by this version of Q3.py: use the "
                             "version that wrote it")
    try:
        device = pick_device(args.device)
    except InputError:
        device = pick_device(asked["device"] or "auto")  # it may have been trained on another machine
    precision = pick_precision("auto" if args.amp == "fp16" != asked["amp"] and device.type != "cuda" else args.amp, device)
    with memory_advice(args):
        with fitting(file):
            network = small_cnn(len(classes)) if args.from_scratch else build_network("none", len(classes))
            network.load_state_dict(checkpoint["model"])
        network.to(device, memory_format=layout(device))
        return checkpoint, FineTuned(network, args.freeze, precision, holds_batchnorm(args)).eval()


def evaluate(args: argparse.Namespace) -> None:
    """Test a checkpoint again, or on other photos, into a folder of its own. Raises InputError: a checkpoint or photos that
    can't be used."""
    file, typed = args.evaluate, args.data
    checkpoint, model = trained(file, args)
    if not (typed or os.path.isdir(args.data)):
        raise InputError(f"--evaluate '{file}': its photos were in '{args.data}', which is not there, seen from {Path.cwd()}: name a "
                         "folder with --data")
    args.data = find_data(args.data)
    folder = test_folder(args.data) or train_folder(args.data)
    photos, classes = list_photos(folder, least=1), checkpoint["classes"]
    if not photos.keys() <= set(classes):
        raise InputError(f"'{folder}' has classes that '{file}' has not learnt: "
                         f"{differences(classes, photos, 'the checkpoint', 'the folder')}")
    paths = [path for name in photos for path in photos[name]]
    with fitting(file):
        aside = [] if test_folder(args.data) or not set(checkpoint.get("test", [])) <= set(paths) else checkpoint.get("test", [])
    pairs, files = labelled(folder, aside or paths, classes), [folder / path for path in paths]
    refuse_inside_photos(args)
    with run_folder(args), memory_advice(args):
        print(f"Checkpoint  {file}, epoch {checkpoint['epoch']}\n"
              f"Photos      {len(pairs):,} test; {len(photos)} classes ({folder}{', those set aside before training' if aside else ''})\n"
              f"Device      {model.device.type}, {str(model.precision).removeprefix('torch.')}\n"
              f"Results     {args.out}", flush=True)
        if len(photos) < len(classes):
            print(f"Note        {differences(classes, photos, 'the checkpoint', 'the folder')}", flush=True)
        test(model, checkpoint, {"test": pairs}, files, folder, args.out / NO_CACHE if args.no_cache else args.cache, args)


def classify(args: argparse.Namespace) -> None:
    """Print a row for each photo: its path, then the likeliest classes, three at most, each with its confidence.

    Photos are decoded in threads while the network is at the ones before. One that can't be read gets a row that says why.
    """
    file, *places = args.predict
    checkpoint, model = trained(file, args)
    if not places and (sys.stdin is None or sys.stdin.isatty()):
        raise InputError("--predict CKPT PHOTO ...: name photos or folders, or send a list of them to standard input")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # a name may hold any bytes
    listed = (line.rstrip("\r\n") for line in sys.stdin or ()) if not places or places == [Path("-")] else map(str, places)
    files = (photo for place in listed if place for photo in photos_in(Path(place)))
    groups = iter(lambda: list(islice(files, args.batch_size)), [])
    shown, border = min(3, len(checkpoint["classes"])), preprocessing(args)["border"]

    def cells(row: list) -> str:
        return "\t".join(re.sub(r"[\t\r\n]", lambda found: repr(found[0])[1:-1], str(cell)) for cell in row)

    strict_about_photos()
    with printing_to_the_end(), memory_advice(args), ThreadPoolExecutor(args.workers) as pool:
        # a group is begun when it is asked for
        begun = ((group, [pool.submit(photo_or_problem, photo, args.image_size, border) for photo in group]) for group in groups)
        columns = [name for place in ("", "_2", "_3")[:shown] for name in ("class" + place, "confidence" + place)]
        print(cells(["path", *columns]), flush=True)
        coming, total, unread = next(begun, None), 0, 0
        while coming:
            (group, reading), coming = coming, next(begun, None)
            found = [future.result() for future in reading]
            seen = [pixels for pixels in found if not isinstance(pixels, str)]
            rows = iter(likeliest(model, np.stack(seen), checkpoint, shown) if seen else [])
            total, unread = total + len(found), unread + len(found) - len(seen)
            for photo, pixels in zip(group, found):
                print(cells([photo, *(["error", pixels] if isinstance(pixels, str) else next(rows))]))
            sys.stdout.flush()
    if unread:
        print(f"{unread:,} of {total:,} could not be read: see 'error' in their rows", file=sys.stderr)


@contextmanager
def printing_to_the_end():
    """Turn what is said about a full disk behind standard output into one line."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python would try again in the end
        raise InputError(f"the rows can't be written: {error.strerror}") from None


@torch.no_grad()
def likeliest(model: FineTuned, pixels: np.ndarray, checkpoint: dict, count: int) -> list[list[str]]:
    """Name and confidence, alternately, of the `count` likeliest classes of each photo: uint8 (photos, size, size, 3)."""
    logits = model(model.maps(send(torch.from_numpy(pixels), model.device)))
    confidence, labels = (logits.cpu() / checkpoint["temperature"]).softmax(1).topk(count)
    return [[cell for share, label in zip(shares, guesses) for cell in (checkpoint["classes"][label], f"{share:.4f}")]
            for shares, guesses in zip(confidence.tolist(), labels.tolist())]


# -- The whole job ----------------------------------------------------------------------------------------------------

@contextmanager
def memory_advice(args: argparse.Namespace):
    """Turn the many ways to run out of memory into one that says what to try."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory|enough memory|ALLOC", str(error)):
            raise
        advice = f"try --batch-size {args.batch_size // 2}" if args.batch_size > 1 else "try a smaller --image-size"
        raise InputError(f"out of memory with --batch-size {args.batch_size} and --image-size {args.image_size} "
                         f"({first_line(error)}): {advice} in another run, or free memory that other programs hold") from None


def main(args: argparse.Namespace) -> None:
    (evaluate if args.evaluate else classify if args.predict else fine_tune)(args)


def fine_tune(args: argparse.Namespace) -> None:
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # one process prints
    if PROCESSES > 1 and args.no_cache:
        raise InputError("--no-cache: several processes share decoded photos in the cache; give --cache DIR instead")
    if args.download:
        download(args.data)
    if args.demo:
        draw_demo(args.data)

    # Photos and split: which file is in which part, with which label.
    own_split = args.resume / "split.json" if args.resume else None
    manifest, parts, files = load_split(args, own_split if own_split and own_split.exists() else args.split)
    refuse_inside_photos(args)
    classes, count = manifest["classes"], len(parts["train"])
    if PROCESSES > (smallest := count // math.ceil(count / args.batch_size)):
        raise InputError(f"{PROCESSES} processes can't share steps of {smallest} photos: raise --batch-size")

    # Network and precision.
    device = pick_device(args.device)
    precision = pick_precision(args.amp, device)
    synchronise = PROCESSES > 1 and not holds_batchnorm(args)
    if synchronise and device.type == "cpu":
        raise InputError("BatchNorm's statistics are learnt with --recipe reference, --weights none and --from-scratch, and torch "
                         "can't average them over several CPU processes: use one process")
    if PROCESSES > 1:
        join_processes(device)
    torch.manual_seed(args.seed)  # for the first weights of fc
    earlier, checkpoint = (read_config(args.resume) if args.resume else {}), None
    if args.resume and ((last := args.resume / "last.pt").exists() or (args.resume / "history.csv").exists()):
        checkpoint = own_checkpoint(last, {**earlier, "classes": classes})
    with memory_advice(args), first_on_this_machine():
        network = small_cnn(len(classes)) if args.from_scratch else build_network("none" if checkpoint else args.weights, len(classes))
        network = network.to(device, memory_format=layout(device))
    if checkpoint:
        with fitting(args.resume / "last.pt"):
            network.load_state_dict(checkpoint["model"])
    with memory_advice(args):
        model = FineTuned(network, args.freeze, precision, holds_batchnorm(args))
    if synchronise:
        nn.SyncBatchNorm.convert_sync_batchnorm(model.backbone)

    with run_folder(args), memory_advice(args), stopping_between_steps():
        # What is going to happen, on the screen and in the run's folder.
        options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()
                   if name not in ("resume", "download", *USES)}
        config = {"options": options, "classes": classes, "photos": {part: len(pairs) for part, pairs in parts.items()},
                  "preprocessing": preprocessing(args),
                  "trainable_parameters": sum(value.numel() for value in network.parameters() if value.requires_grad),
                  "frozen_parameters": sum(value.numel() for value in network.parameters() if not value.requires_grad),
                  **machine(device, precision)}
        print_banner(config)
        if args.resume:
            print_resumed(earlier, config, checkpoint)
        on_first(write_json, args.out / "config.json", earlier | config)  # from here on the folder holds a run, which can be resumed
        on_first(write_manifest, manifest, args.out / "split.json")
        on_first(print_same_photos, {part: parts[part] for part in ("train", "val")}, args.data, args.out)

        # Pixels, and the trunk's maps of them.
        facts, cache = file_facts(files), args.out / NO_CACHE if args.no_cache else args.cache
        photos, damaged = open_photos(model, parts["train"] + parts["val"], facts, train_folder(args.data), cache, args, may_skip=True)
        held_out = {file for file, _ in parts["val"]}
        in_val = torch.tensor([file in held_out for file in photos.files], dtype=torch.bool)
        in_train, in_val = (~in_val).nonzero().flatten(), in_val.nonzero().flatten()
        leave_out(damaged, photos, in_train, in_val, args, classes)
        config["photos"] |= {"train": len(in_train), "val": len(in_val)}
        config["trunk"] = photos.keep(args.freeze, args.cache_gb, str(earlier.get("trunk", "")))
        print(f"Trunk       {config['trunk']}", flush=True)
        on_first(write_json, args.out / "config.json", config)

        # Epochs, then the test of the best one.
        training = Training(model, photos, in_train, in_val, args, config, manifest.get("test", ()))
        if checkpoint:
            training.restore(checkpoint)
            del checkpoint  # its tensors are the network's and the optimiser's now
        training.run()
        if changed := changed_files(facts):
            print(f"Note        {len(changed):,} photos have changed since they were read, the first '{changed[0]}'; the run learnt from "
                  "what they were", flush=True)
        best = on_first(lambda: load_checkpoint(args.out / "best.pt") | {"optimizer": {}})
        with fitting(args.out / "best.pt"):
            model.network.load_state_dict(best["model"])
        folder = test_folder(args.data)
        try:  # no test photo was opened so far; without a val/ they lie among all the others
            test(model, best, parts, None if folder else files, folder or train_folder(args.data), cache, args, training.history)
        except InputError as error:
            raise InputError(f"{error}. Training is done, and its best epoch is safe in '{args.out / 'best.pt'}'") from None
    print(f"\nCheckpoints, history, predictions and pictures: {args.out}")
    if PROCESSES > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with exit_codes(unsaid=KeyboardInterrupt if RANK else ()):
        main(args)
