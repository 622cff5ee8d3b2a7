#!/usr/bin/env python3
"""Fine-tune an ImageNet ResNet50 on the ten classes of iNaturalist-12K.

    python Q3.py

The script reads from top to bottom in the order in which a run happens:

    photos -> split -> pixels -> network -> trunk maps -> optimiser -> epochs -> test -> files

The first six children of the network (conv1 to layer2) stay as ImageNet left them, its last layer is replaced by one
for ten classes and learns fast, and the layers between learn slowly. The best epoch on the validation photos is tested
once. Which photos there are, and which is in which part, is dataset_split.py's business; a list of (file, label) is
all that comes from there. On several GPUs: torchrun --nproc-per-node=N Q3.py
"""

import argparse
import csv
import errno
import hashlib
import io
import json
import math
import os
import platform
import shutil
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from functools import partial
from pathlib import Path

from dataset_split import (InputError, Parser, add_split_options, atomic_write, differences, find_data, labelled,
                           list_photos, number, read_manifest, run, split, write_manifest)


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------

def get_args_parser() -> Parser:
    parser = Parser(prog="Q3.py", allow_abbrev=False, description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)

    group = parser.add_argument_group("photos")
    group.add_argument("--data", type=Path, default=Path("inaturalist_12k"), metavar="DIR",
                       help="folder with train/<Class>/ and val/<Class>/, the test set (default: inaturalist_12k)")
    add_split_options(group, fraction=0.25)
    group.add_argument("--split", type=Path, metavar="FILE",
                       help="a manifest that dataset_split.py wrote, instead of --fraction and --val-fraction")
    group.add_argument("--image-size", type=number(int, 32, 4096), default=224, metavar="N",
                       help="the network sees N x N pixels of a photo (default: 224)")
    group.add_argument("--workers", type=number(int, 1, 1024), metavar="N",
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
                            "ResNet50 state dict, or none for random weights (default: IMAGENET1K_V2)")
    group.add_argument("--freeze", type=number(int, 0, 9), default=6, metavar="N",
                       help="the first N of conv1, bn1, relu, maxpool, layer1, layer2, layer3, layer4, avgpool stay as "
                            "they are; 9: only fc learns (default: 6)")

    group = parser.add_argument_group("training")
    group.add_argument("--recipe", choices=("tuned", "reference"), default="tuned",
                       help="reference: the plain published protocol; tuned: keeps the photos' proportions, starts fc from "
                            "logistic regression, trains on crops at rates that rise and fall, holds BatchNorm's statistics "
                            "(default: tuned)")
    group.add_argument("--epochs", type=number(int, 1, 10**6), default=5, metavar="N",
                       help="passes over the training photos (default: 5)")
    group.add_argument("--batch-size", type=number(int, 1, 10**6), default=64, metavar="N",
                       help="photos a step at most; an epoch's steps share its photos evenly (default: 64)")
    group.add_argument("--lr-head", type=number(float, 0, 100, open_low=True), metavar="LR",
                       help="learning rate of fc (default: 1e-4; 1e-3 where fc starts from noise)")
    group.add_argument("--lr-backbone", type=number(float, 0, 100, open_low=True), metavar="LR",
                       help="learning rate of the other layers that learn (default: 1e-5; 1e-4 where fc starts from noise)")

    group = parser.add_argument_group("machine")
    group.add_argument("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto",
                       help="auto: the GPU where there is one (default: auto)")
    group.add_argument("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
                       help="mixed precision; auto: where the hardware computes in it (default: auto)")

    group = parser.add_argument_group("results")
    group.add_argument("--out", type=Path, metavar="DIR",
                       help="the run's folder; one that already holds a run is refused (default: runs/<date-time>)")
    return parser


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = get_args_parser()
    args = parser.parse_args(argv, argparse.Namespace(fraction=None, val_fraction=None))
    if args.split and (args.fraction or args.val_fraction):
        parser.error("--split FILE takes the place of --fraction and --val-fraction: give one or the other")
    args.fraction = args.fraction or parser.get_default("fraction")
    args.val_fraction = args.val_fraction or parser.get_default("val_fraction")
    probed = starts_from_probe(args)
    args.lr_head = args.lr_head or (1e-4 if probed else 1e-3)
    args.lr_backbone = args.lr_backbone or (1e-5 if probed else 1e-4)
    if not holds_batchnorm(args) and args.image_size <= (48 if args.recipe == "tuned" else 32) and args.batch_size <= 2:
        parser.error(f"--batch-size {args.batch_size} with --image-size {args.image_size} can leave layer4's BatchNorm a "
                     "single value to take the mean of: raise one of them")
    return args


def starts_from_probe(args: argparse.Namespace) -> bool:
    """Whether fc starts from logistic regression on the features, of which a network of random weights has none."""
    return args.recipe == "tuned" and args.weights != "none"


def holds_batchnorm(args: argparse.Namespace) -> bool:
    """Whether no BatchNorm statistics are learnt: there are none behind the eighth child, and none to hold in noise."""
    return args.freeze >= 8 or starts_from_probe(args)


def border_left_out(args: argparse.Namespace) -> float | None:
    """What `read_photo` takes as `border`: the reference recipe squashes."""
    return BORDER if args.recipe == "tuned" else None


if __name__ == "__main__":
    args = get_args()  # a mistyped option and --help are answered here, before the seconds that torch takes to load

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

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue, in [0, 1]
BORDER = 1 / 16  # of a photo's short side, at either end: its middle 224 of 256 pixels, as IMAGENET1K_V1 was tested
PENALTY = 0.03  # on the squares of the weights of the logistic regression that the head starts from
WARM_UP = 0.1  # part of the steps in which the tuned recipe's learning rates rise
CROP = 5 / 7  # of a photo's side that a step of training sees: 160 of 224 pixels, 20 of 28 places of a trunk map
CHECKPOINT_FORMAT = 2
STORE_FORMAT = 1  # to be raised when read_photo or FineTuned.maps give something else


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------------------------------------------------------------
# The machine, and the processes that torchrun started
# ---------------------------------------------------------------------------------------------------------------------

RANK, LOCAL_RANK, PROCESSES, LOCAL_PROCESSES = (
    int(os.environ.get(name, alone))  # this process among all and on this machine; how many there are of either
    for name, alone in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))
QUIET = True if RANK else None  # for tqdm: one process draws progress bars, and only in a terminal


def join_processes(device: torch.device) -> None:
    """Let the processes that torchrun started talk to each other.

    Raises:
        InputError: on Apple's GPUs, which can't.
    """
    if device.type == "mps":
        raise InputError("several processes need NVIDIA GPUs, or --device cpu")
    backend, device_id = ("nccl", device) if device.type == "cuda" else ("gloo", None)
    warnings.filterwarnings("ignore", message="Grad strides do not match")  # of 1 x 1 convolutions, whose strides say nothing
    # One may wait for a day while another decodes; when one dies, torchrun ends all.
    distributed.init_process_group(backend, timeout=timedelta(days=1), device_id=device_id)


@contextmanager
def first_on_this_machine():
    """What one process of each machine does before the others do: fetch, decode."""
    if LOCAL_RANK > 0:
        wait_for_all()
    yield
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


def pick_device(name: str) -> torch.device:
    """The device called cuda, mps or cpu; for auto the first of these that is there.

    Raises:
        InputError: it is not there.
    """
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
    in float32, 1.6 in bfloat16, on an AVX2 machine).

    Raises:
        InputError: float16 on another device than an NVIDIA GPU.
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


# ---------------------------------------------------------------------------------------------------------------------
# Photos: files -> uint8 pixels, once
# ---------------------------------------------------------------------------------------------------------------------

UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}  # what undoes each value of EXIF's orientation tag, 0x0112


def read_photo(file: Path, size: int, border: float | None) -> np.ndarray:
    """A photo as the network sees it: upright, RGB, and a square: its middle, or all of it squashed.

    Args:
        border: part of the short side that the square in the middle leaves out at either end; None squashes.

    Returns:
        uint8 array (size, size, 3).

    Raises:
        InputError: the file is no photo, or a damaged one.
    """
    try:
        with Image.open(file) as image:
            turn = UPRIGHT.get(orientation(image))
            if image.mode.startswith("I"):  # 16 bits a pixel, which convert() would cut off at 255
                image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
            image = image.convert("RGB")
            image = image if turn is None else image.transpose(turn)
            if border is None:
                return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
            return np.asarray(ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR, border))
    except UnidentifiedImageError:
        raise InputError(f"'{file}' is no photo, whatever its name says: replace or remove it") from None
    except Exception as error:  # for a damaged file Pillow raises nearly anything: OSError, SyntaxError, struct.error
        raise InputError(f"photo '{file}' can't be read ({first_line(error)}): replace or remove it") from None


def orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # a photo with damaged EXIF data is still a photo
        return 1


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
        with disk_errors(folder):
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
        with disk_errors(self.file.parent):
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


@contextmanager
def disk_errors(folder: Path):
    try:
        yield
    except OSError as error:
        room = "make room there, do without maps with --cache-gb 0, or " if error.errno == errno.ENOSPC else ""
        raise InputError(f"decoded photos and their maps can't be kept in '{folder}' ({error.strerror}): {room}choose another "
                         "folder with --cache DIR") from None


def fingerprint(*facts) -> str:
    """A short name for these facts, which changes when one of them does."""
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def in_steps(title: str, rows: torch.Tensor, size: int):
    """Go through the rows a few at a time with a progress bar, and say how long it took."""
    start = time.perf_counter()
    with tqdm(desc=title, total=len(rows), unit="photo", leave=False, disable=QUIET) as progress:
        for some in rows.split(size) if len(rows) else ():
            yield some
            progress.update(len(some))
    if len(rows):
        seconds = time.perf_counter() - start
        print(f"{title:11} {len(rows):,} photos{' in this process' if LOCAL_PROCESSES > 1 else ''} in {seconds:.1f} s "
              f"({len(rows) / seconds:,.0f} a second)", flush=True)


def pixel_store(cache: Path, folder: Path, files: list[Path], size: int, border: float | None) -> Store:
    """The store of a folder's photos, which holds for as long as none of them is added, removed or changed."""
    try:
        facts = [(str(file.relative_to(folder)), (status := os.stat(file)).st_size, status.st_mtime_ns) for file in files]
    except OSError as error:
        raise InputError(f"photo '{error.filename}' can't be read ({error.strerror})") from None
    return Store(cache, f"pixels-{fingerprint(folder.resolve(), size, border)}", (facts, PIL.__version__), len(files),
                 (size, size, 3), torch.uint8)


def decode(files: list[Path], rows: torch.Tensor, pixels: Store, workers: int, border: float | None) -> None:
    """Decode the photos of these rows, unless they are in the store already, in several threads.

    Threads rather than processes, because Pillow lets them run side by side (two cores, photos of 800 x 600: 144
    photos/s with one thread, 272 with two, 222 with two processes). A few at a time, so that few wait to be written.

    Raises:
        InputError: a photo can't be read, or the disk is full.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # of odd metadata; the pixels are fine
    few = max(workers, min(32 * workers, 2**27 // pixels.row_bytes))
    with ThreadPoolExecutor(workers) as pool:
        for some in in_steps("Decoding", rows[pixels.missing(rows)], few):
            photos = pool.map(partial(read_photo, size=pixels.shape[0], border=border), [files[row] for row in some])
            pixels.write(some, torch.from_numpy(np.stack(list(photos))))


# ---------------------------------------------------------------------------------------------------------------------
# The network: ImageNet's ResNet50, its last layer replaced, its first children frozen
# ---------------------------------------------------------------------------------------------------------------------

def initial_state(spec: str) -> dict[str, torch.Tensor] | None:
    """The state dict that training starts from; None for random weights.

    Args:
        spec: a torchvision name (fetched once, with a hash check), the path of a ResNet50 state dict, or "none".

    Raises:
        InputError: no network, no such file, or a file that holds something else.
    """
    if spec == "none":
        return None
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
    try:
        return torch.load(spec, map_location="cpu", weights_only=True)
    except Exception:  # what torch says here is how to load a file unsafely
        raise InputError(f"--weights '{spec}' is not a state dict, as torch.save(model.state_dict(), PATH) writes it, or a "
                         "damaged one: fetch or save it again") from None


def build_network(spec: str, classes: int) -> nn.Module:
    """A torchvision ResNet50 with the weights of `spec` and, whatever its last layer was, a new one for `classes`.

    nn.Linear starts from small random numbers (uniform within 1 / sqrt(2048) = 0.022 on either side of 0).

    Raises:
        InputError: the weights can't be had, or are another network's.
    """
    state = initial_state(spec)
    network = resnet50(weights=None)
    if state is not None:
        load_backbone(network, state, spec)
    network.fc = nn.Linear(network.fc.in_features, classes)
    return network


def load_backbone(network: nn.Module, state, spec: str) -> None:
    """Give the network all of a state dict but fc, which is replaced.

    Raises:
        InputError: with what differs, if it is no state dict, or another network's.
    """
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
    """A ResNet cut in three: a trunk that is frozen, a backbone that learns slowly, a head that learns fast.

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
        """The trunk's maps -> what the head sees of a photo, float32 (batch, 2048)."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            return self.backbone(maps).flatten(1).float()

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """The trunk's maps -> logits, float32 (batch, classes)."""
        return self.head(self.features(maps))


# ---------------------------------------------------------------------------------------------------------------------
# Batches: photos as the trunk's maps of them, cropped in training
# ---------------------------------------------------------------------------------------------------------------------

class Photos:
    """Photos ready for the network: as pixels or, once these have been kept, as the trunk's maps of them.

    Args:
        pixels: the decoded photos of a folder.
        rows: which of these the photos are, int64 (photos,).
        labels: int64 (photos,).
    """

    def __init__(self, model: FineTuned, pixels: Store, rows: torch.Tensor, labels: torch.Tensor):
        self.model, self.pixels, self.rows, self.labels = model, pixels, rows, send(labels, model.device)
        self.kept: Store | torch.Tensor | None = None  # maps of all photos, or their pixels on the GPU

    def look(self, which: torch.Tensor, places: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The trunk's maps (views, channels, side, side) of these photos and their labels, on the device.

        Args:
            which: int64 (views,).
            places: where the crop of each lies, float32 (views, 2), as in `cut`; None for whole photos.
        """
        device = self.model.device
        on_device = send(which, device)
        if self.kept is None:
            seen = self.pixels[self.rows[which]]
        else:
            seen = self.kept[which if isinstance(self.kept, Store) else on_device]
        seen = send(seen if places is None else cut(seen, places), device)
        if seen.dtype == torch.uint8:
            return self.model.maps(seen), self.labels[on_device]
        return seen.permute(0, 3, 1, 2).contiguous(memory_format=layout(device)), self.labels[on_device]

    def keep(self, freeze: int, limit: float) -> str:
        """Keep what each step would do again, if there is room: in a GPU's memory (a quarter of what is free) the trunk's
        maps of the photos, or else their pixels; elsewhere the maps, in a store (half of what is free on the disk).

        Args:
            limit: the most that a store of maps may take, in GB.

        Returns:
            What became of it, in words.

        Raises:
            InputError: the disk is full, or another run has deleted the store meanwhile.
        """
        model, everything = self.model, torch.arange(len(self.rows))
        example = self.look(everything[:1])[0].permute(0, 2, 3, 1)[0]
        gigabytes, short = len(everything) * example.nbytes / 1e9, freeze < 5  # too short to be worth keeping
        if model.device.type == "cuda":
            room = torch.cuda.mem_get_info()[0] / 4e9
            if gigabytes < room and not short:
                self.kept = torch.cat([self.look(some)[0].permute(0, 2, 3, 1) for some in everything.split(256)])
                return f"computed once, {gigabytes:.1f} GB of maps on the GPU"
            if len(everything) * self.pixels.row_bytes / 1e9 < room:
                self.kept = torch.cat([send(self.pixels[rows], model.device) for rows in self.rows.split(256)])
        if model.device.type == "cuda" or short:
            return "computed in every step"
        if gigabytes > limit:
            return f"computed in every step (its maps would take {gigabytes:.1f} GB, see --cache-gb)"

        trunk = b"".join(value.float().cpu().numpy().tobytes() for value in model.trunk.state_dict().values())
        facts = (self.pixels.file.name, self.rows.tolist(), hashlib.sha256(trunk).hexdigest(), freeze, model.device.type,
                 torch.__version__)
        maps = Store(self.pixels.file.parent, self.pixels.name.replace("pixels", "maps"), facts, len(everything),
                     example.shape, example.dtype)
        lacking = int(maps.missing(everything).sum()) * example.nbytes
        full = lacking > shutil.disk_usage(maps.file.parent).free / 2
        if summed(torch.tensor(float(full))):  # on any machine
            return f"computed in every step (its maps would take {gigabytes:.1f} GB, and the disk of --cache is too full)"
        mine = everything[LOCAL_RANK::LOCAL_PROCESSES]
        for some in in_steps("Trunk maps", mine[maps.missing(mine)], 32):
            maps.write(some, self.look(some)[0].permute(0, 2, 3, 1).cpu())
        maps.check(everything)
        self.kept = maps
        return f"computed once, {gigabytes:.1f} GB of maps"


def cut(photos: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """A square of each photo or trunk map, CROP times as high and wide: (views, side, side, channels) -> the same.

    The trunk has stride 8, so that a crop of its map is, but for the borders, the map of a crop of the photo.

    Args:
        places: float32 (views, 2), from 0 (at the top, on the left) to 1.
    """
    side, kept = photos.shape[1], max(1, round(CROP * photos.shape[1]))
    corners = (places * (side - kept + 1)).long()
    rows, columns = send(corners[:, :, None] + torch.arange(kept), photos.device).unbind(1)  # (views, kept)
    views = send(torch.arange(len(photos)), photos.device)
    return photos[views[:, None, None], rows[:, :, None], columns[:, None, :]]


def draw_epoch(count: int, seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An order of so many photos, int64, and a place for the crop of each. They depend on seed and epoch alone, so that
    several processes agree without talking."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator), torch.rand(count, 2, generator=generator)


def batches(photos: Photos, which: torch.Tensor, batch_size: int, title: str, places: torch.Tensor | None = None):
    """Go once through these photos in their order, in steps of at most `batch_size`, all of nearly the same size (65 make
    33 + 32 rather than 64 + 1: one photo alone is a poor gradient, and no BatchNorm statistics).

    Args:
        which, places: as in `Photos.look`.
        title: what the progress bar says, where standard error is a terminal.

    Yields:
        This process's share of a step, maps and labels as `Photos.look` gives them, and the size of the whole step.
    """
    steps = torch.arange(len(which)).tensor_split(math.ceil(len(which) / batch_size))
    for step in tqdm(steps, desc=title, unit="step", leave=False, disable=QUIET):
        mine = step[RANK::PROCESSES]
        yield *photos.look(which[mine], None if places is None else places[mine]), len(step)


# ---------------------------------------------------------------------------------------------------------------------
# The optimiser: a fast head, a slow backbone
# ---------------------------------------------------------------------------------------------------------------------

def build_optimizer(model: FineTuned, lr_head: float, lr_backbone: float) -> torch.optim.Optimizer:
    """Adam over exactly the parameters that learn, in two groups: the head's and the backbone's."""
    return torch.optim.Adam([{"params": list(part.parameters()), "lr": rate, "initial_lr": rate}
                             for part, rate in ((model.head, lr_head), (model.backbone, lr_backbone))], fused=True)


def rise_and_fall(step: int, steps: int) -> float:
    """The part of the learning rates that step number `step` (from 0) of `steps` is made with: it rises to 1 in the first
    WARM_UP of them, then falls to 0 along a cosine (Loshchilov and Hutter, SGDR, ICLR 2017)."""
    risen = (step + 1) / (WARM_UP * steps + 1)
    return min(risen, (1 + math.cos(math.pi * max(0, step / steps - WARM_UP) / (1 - WARM_UP))) / 2)


# ---------------------------------------------------------------------------------------------------------------------
# Epochs
# ---------------------------------------------------------------------------------------------------------------------

def loss_and_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Mean cross-entropy, and the part of the photos whose largest logit is their label's."""
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()


@torch.no_grad()
def predict(model: FineTuned, loader, layers=None) -> torch.Tensor:
    """What the network, or only its `layers`, makes of every photo: float32 (photos, classes or 2048), on the CPU."""
    model.eval()
    steps = []
    for maps, _, count in loader:
        mine = (layers or model)(maps)
        steps.append(mine.new_zeros(count, mine.shape[1]))
        steps[-1][RANK::PROCESSES] = mine
    return summed(torch.cat(steps)).cpu()


def probe(model: FineTuned, loader, labels: torch.Tensor) -> tuple[float, float]:
    """Start the head where logistic regression on the features of the network as it is ends. From noise it would first send
    large gradients into good layers (Kumar et al., Fine-Tuning can Distort Pretrained Features, ICLR 2022).

    Args:
        loader: all training photos in one order, whole.
        labels: theirs, int64 (photos,), on the CPU.

    Returns:
        Mean loss and accuracy of these photos, then.

    Raises:
        InputError: the features can't be told apart.
    """
    features = predict(model, loader, model.features)  # (photos, 2048)
    centre = features.mean(0)
    spread = features.sub_(centre).std()  # one for all features, so that PENALTY means the same for any network
    if not 0 < spread < math.inf:
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
        model.head.bias.copy_(head.bias - head.weight @ centre / spread)
        return loss_and_accuracy(head(features), labels)


def train_epoch(model: nn.Module, loader, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
                shares) -> tuple[float, float]:
    """One pass over the training photos.

    Args:
        shares: of the learning rates, one a step.

    Returns:
        Mean loss and accuracy of the photos as they were when the network met them (it learns meanwhile, so they lag
        behind what it can do at the end of the epoch).
    """
    model.train()
    totals, photos = 0, 0
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
        photos += count
    loss_sum, correct = summed(totals).tolist()
    return loss_sum / photos, correct / photos


# ---------------------------------------------------------------------------------------------------------------------
# The test
# ---------------------------------------------------------------------------------------------------------------------

def wilson_interval(correct: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The interval that a proportion lies in with 95 % confidence (E. B. Wilson, JASA 1927)."""
    share = correct / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def test_report(logits: torch.Tensor, labels: torch.Tensor, classes: list[str]) -> dict:
    """What goes into test.json. Rows of the confusion matrix are the labels, columns the predictions.

    A class that is never predicted has precision 0, and F1 is 0 where precision and recall both are.
    """
    predicted = logits.argmax(1)
    confusion = torch.bincount(labels * len(classes) + predicted, minlength=len(classes) ** 2).view(len(classes), -1)
    loss, accuracy = loss_and_accuracy(logits, labels)
    per_class = {}
    for index, name in enumerate(classes):
        hits, actual = int(confusion[index, index]), int(confusion[index].sum())
        claimed = int(confusion[:, index].sum())
        per_class[name] = {"photos": actual, "precision": hits / max(1, claimed), "recall": hits / max(1, actual),
                           "f1": 2 * hits / max(1, actual + claimed)}
    return {"photos": len(labels), "loss": loss, "accuracy": accuracy,
            "accuracy_interval_95": wilson_interval(int(confusion.trace()), len(labels)),
            "per_class": per_class, "classes": classes, "confusion": confusion.tolist()}


def print_report(report: dict) -> None:
    low, high = report["accuracy_interval_95"]
    print(f"\nTest of the best epoch ({report['epoch']}) on {report['photos']:,} photos: "
          f"accuracy {report['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f}), loss {report['loss']:.4f}\n")
    width = max(len("Class"), *(len(name) for name in report["classes"]))
    print(f"{'Class':{width}} | Photos | Precision | Recall |     F1")
    for name, row in report["per_class"].items():
        print(f"{name:{width}} | {row['photos']:6} | {row['precision']:9.4f} | {row['recall']:6.4f} | {row['f1']:6.4f}")


# ---------------------------------------------------------------------------------------------------------------------
# The run's folder
# ---------------------------------------------------------------------------------------------------------------------

RUN_FILES = ("config.json", "split.json", "history.csv", "last.pt", "best.pt", "test.json", "predictions.csv")


def claim_folder(out: Path | None) -> Path:
    """Make the run's folder: `out`, or runs/<date-time> where that is None.

    Raises:
        InputError: it can't be made or written to, or it holds a run already.
    """
    try:
        if out is None:
            out = new_folder(Path("runs"))
        out.mkdir(parents=True, exist_ok=True)
        if any((out / name).exists() for name in RUN_FILES):
            raise InputError(f"--out '{out}' already holds a run: give another folder, or move that one away")
        tempfile.TemporaryFile(dir=out).close()
        return out
    except OSError as error:
        raise InputError(f"--out '{out or 'runs'}' can't be the run's folder: {error.strerror}") from None


def new_folder(parent: Path) -> Path:
    """A folder that is named after this second; the next one, if another run has taken it."""
    parent.mkdir(parents=True, exist_ok=True)
    while True:
        folder = parent / time.strftime("%Y-%m-%d_%H-%M-%S")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            time.sleep(0.2)


def machine(device: torch.device, precision: torch.dtype) -> dict:
    """What a run's figures depend on besides its options."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": device.type, "device_name": name, "threads": torch.get_num_threads(),
            "precision": str(precision).removeprefix("torch."),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "torchvision": torchvision.__version__, "numpy": np.__version__}}


def print_banner(config: dict) -> None:
    options, photos = config["options"], config["photos"]
    steps = math.ceil(photos["train"] / options["batch_size"])
    print(f"Photos      {photos['train']:,} training, {photos['val']:,} validation, {photos['test']:,} test; "
          f"{len(config['classes'])} classes ({options['data']})\n"
          f"Network     ResNet50 from {options['weights']}, {options['image_size']} x {options['image_size']} pixels\n"
          f"Parameters  {config['trainable_parameters']:,} trainable, {config['frozen_parameters']:,} frozen "
          f"(the first {options['freeze']} of 10 children)\n"
          f"Device      {config['device']} ({config['device_name']}), {config['precision']}"
          f"{f', {PROCESSES} processes' if PROCESSES > 1 else ''}\n"
          f"Steps       {steps} an epoch, {steps * options['epochs']:,} in {options['epochs']} epochs\n"
          f"Results     {options['out']}", flush=True)


def write_json(file: Path, value) -> None:
    with atomic_write(file) as stream:
        stream.write((json.dumps(value, indent=1) + "\n").encode())


def write_csv(file: Path, rows: list[dict]) -> None:
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, rows[0])
    table.writeheader()
    table.writerows(rows)
    with atomic_write(file) as stream:
        stream.write(text.getvalue().encode("utf-8", "surrogateescape"))


def on_cpu(value):
    """The same nest of dicts and lists, its tensors on the CPU, where every machine can load them."""
    if isinstance(value, torch.Tensor):
        return value.cpu().contiguous()
    if isinstance(value, dict):
        return {key: on_cpu(inner) for key, inner in value.items()}
    return [on_cpu(inner) for inner in value] if isinstance(value, list) else value


def save_checkpoint(file: Path, checkpoint: dict) -> None:
    try:
        with atomic_write(file) as stream:
            torch.save(on_cpu(checkpoint), stream)
    except RuntimeError as error:  # how torch reports that it could not write to the end
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise InputError(f"'{file}' can't be written ({first_line(error)}): is the disk full?") from None


# ---------------------------------------------------------------------------------------------------------------------
# The job
# ---------------------------------------------------------------------------------------------------------------------

def load_split(args: argparse.Namespace) -> tuple[dict, dict[str, list[tuple[Path, int]]], list[Path]]:
    """The manifest; the (file, label) pairs of "train", "val" and "test"; and all files of train/, used or not. No
    photo is opened.

    Raises:
        InputError: folders, photos or a manifest that can't be used.
    """
    data = args.data = find_data(args.data)
    photos = list_photos(data / "train")
    if not os.path.isdir(data / "val"):
        raise InputError(f"no val/ in the data folder '{data}': the test photos are expected as "
                         f"{data}/val/<Class>/<photo>.jpg")
    test_photos = list_photos(data / "val")
    if test_photos.keys() != photos.keys():
        raise InputError(f"'{data / 'train'}' and '{data / 'val'}' have different classes: "
                         f"{differences(photos, test_photos, 'train', 'val')}")
    if args.split:
        manifest = read_manifest(args.split, photos)
        args.fraction, args.val_fraction = manifest["fraction"], manifest["val_fraction"]
    else:
        manifest = split(photos, args.fraction, args.val_fraction, args.seed)
    classes, test_paths = manifest["classes"], [path for paths in test_photos.values() for path in paths]
    parts = {"train": labelled(data / "train", manifest["train"], classes),
             "val": labelled(data / "train", manifest["val"], classes),
             "test": labelled(data / "val", test_paths, classes)}
    return manifest, parts, [data / "train" / path for paths in photos.values() for path in paths]


def open_photos(model: FineTuned, pairs: list[tuple[Path, int]], files: list[Path], folder: Path, cache: Path,
                args: argparse.Namespace) -> Photos:
    """The photos of these (file, label) pairs, decoded; `files` are all of the folder, which share a store.

    Raises:
        InputError: a photo can't be read, or the disk is full.
    """
    border = border_left_out(args)
    pixels = pixel_store(Path(cache), folder, files, args.image_size, border)
    row = {file: row for row, file in enumerate(files)}
    rows = torch.tensor([row[file] for file, _ in pairs])
    with first_on_this_machine():
        decode(files, rows, pixels, args.workers, border)
    pixels.check(rows)
    return Photos(model, pixels, rows, torch.tensor([label for _, label in pairs]))


def trained(model: FineTuned, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, photos: Photos,
            in_train: torch.Tensor, args: argparse.Namespace):
    """Train, and yield after each epoch: its number, and mean loss and accuracy of the training photos. Epoch 0 is the start
    of the head, where it isn't noise."""
    tuned, steps = args.recipe == "tuned", math.ceil(len(in_train) / args.batch_size)
    start = None
    if starts_from_probe(args):
        loader = batches(photos, in_train, args.batch_size, "features of the training photos")
        start = probe(model, loader, photos.labels[in_train].cpu())
    learner = nn.parallel.DistributedDataParallel(model) if PROCESSES > 1 else model  # with the first process's parameters
    if start:
        yield 0, *start
    for epoch in range(1, args.epochs + 1):
        order, places = draw_epoch(len(in_train), args.seed, epoch)
        loader = batches(photos, in_train[order], args.batch_size, f"epoch {epoch}/{args.epochs}",
                         places if tuned and args.freeze < 8 else None)  # behind layer4 there is nothing left to crop
        shares = [rise_and_fall(step, steps * args.epochs) if tuned else 1.0
                  for step in range(steps * (epoch - 1), steps * epoch)]
        yield epoch, *train_epoch(learner, loader, optimizer, scaler, shares)


def fit(model: FineTuned, photos: Photos, in_train: torch.Tensor, in_val: torch.Tensor, args: argparse.Namespace,
        config: dict) -> None:
    """Train. After each epoch write last.pt, history.csv and, if it is the best so far, best.pt; then print its row.

    Args:
        in_train, in_val: which of the photos are in which part, int64.

    Raises:
        InputError: a file can't be written, or the loss is no longer finite.
    """
    labels = photos.labels[in_val].cpu()
    optimizer = build_optimizer(model, args.lr_head, args.lr_backbone)
    scaler = torch.amp.GradScaler(model.device.type, enabled=model.precision == torch.float16)
    print("\nEpoch | Train Loss | Train Acc | Val Loss | Val Acc", flush=True)
    history, best, start = [], None, time.perf_counter()
    for epoch, train_loss, train_acc in trained(model, optimizer, scaler, photos, in_train, args):
        train_seconds = time.perf_counter() - start
        loader = batches(photos, in_val, args.batch_size, "validation")
        val_loss, val_acc = loss_and_accuracy(predict(model, loader), labels)
        if not math.isfinite(train_loss + val_loss):
            advice = "lower --lr-head and --lr-backbone, or " if epoch else "check --weights, or "
            raise InputError(f"the loss of epoch {epoch} is not a finite number: {advice}try --amp off" +
                             (f". Files of earlier epochs are in '{args.out}'" if history else ""))

        rates = [group["lr"] if epoch else 0.0 for group in optimizer.param_groups]
        history.append({"epoch": epoch, "train_loss": train_loss, "train_acc": train_acc, "val_loss": val_loss,
                        "val_acc": val_acc, "lr_head": rates[0], "lr_backbone": rates[1],
                        "seconds": time.perf_counter() - start, "images_per_second": len(in_train) / train_seconds})
        if best is None or (val_acc, -val_loss) > (best["val_acc"], -best["val_loss"]):
            best = history[-1]
        if RANK == 0:
            checkpoint = {"format": CHECKPOINT_FORMAT, "architecture": "resnet50", "model": model.network.state_dict(),
                          **{key: config[key] for key in ("classes", "preprocessing", "options")}, "epoch": epoch,
                          "history": history, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            save_checkpoint(args.out / "last.pt", checkpoint)
            if best is history[-1]:
                save_checkpoint(args.out / "best.pt", checkpoint)
            write_csv(args.out / "history.csv", history)
        print(f"{epoch:5} | {train_loss:10.4f} | {train_acc:9.4f} | {val_loss:8.4f} | {val_acc:7.4f}", flush=True)
        start = time.perf_counter()


def test(model: FineTuned, pairs: list[tuple[Path, int]], cache: Path, args: argparse.Namespace) -> None:
    """Score best.pt on the test photos, which nothing has opened so far; write test.json and predictions.csv."""
    if RANK == 0:
        checkpoint = torch.load(args.out / "best.pt", map_location="cpu", weights_only=True)
        model.network.load_state_dict(checkpoint["model"])
    for tensor in model.network.state_dict().values() if PROCESSES > 1 else ():
        distributed.broadcast(tensor, 0)
    try:
        photos = open_photos(model, pairs, [file for file, _ in pairs], args.data / "val", cache, args)
    except InputError as error:
        raise InputError(f"{error}. Training is done, and its best epoch is safe in '{args.out / 'best.pt'}'") from None
    logits = predict(model, batches(photos, torch.arange(len(pairs)), args.batch_size, "test"))
    if RANK > 0:
        return

    classes, labels = checkpoint["classes"], photos.labels.cpu()
    report = {"epoch": checkpoint["epoch"], **test_report(logits, labels, classes)}
    write_json(args.out / "test.json", report)
    confidence, predicted = logits.softmax(1).max(1)
    write_csv(args.out / "predictions.csv", [
        {"path": file.relative_to(args.data / "val").as_posix(), "label": classes[label],
         "predicted": classes[guess], "confidence": f"{share:.6f}"}
        for (file, label), guess, share in zip(pairs, predicted.tolist(), confidence.tolist())])
    print_report(report)


def main(args: argparse.Namespace) -> None:
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # one process prints
    if PROCESSES > 1 and args.no_cache:
        raise InputError("--no-cache: several processes share decoded photos in the cache; give --cache DIR instead")

    # Photos and split: which file is in which part, with which label.
    manifest, parts, files = load_split(args)
    classes, count = manifest["classes"], len(parts["train"])
    if PROCESSES > (smallest := count // math.ceil(count / args.batch_size)):
        raise InputError(f"{PROCESSES} processes can't share steps of {smallest} photos: raise --batch-size")

    # Network and precision.
    device = pick_device(args.device)
    precision = pick_precision(args.amp, device)
    synchronise = PROCESSES > 1 and not holds_batchnorm(args)
    if synchronise and device.type == "cpu":
        raise InputError("BatchNorm's statistics are learnt with --recipe reference, or --weights none, and torch can't average "
                         "them over several CPU processes: use one process")
    if PROCESSES > 1:
        join_processes(device)
    torch.backends.cudnn.deterministic = True  # the same seed, the same run
    torch.manual_seed(args.seed)  # for the first weights of fc
    with first_on_this_machine():
        network = build_network(args.weights, len(classes)).to(device, memory_format=layout(device))
    model = FineTuned(network, args.freeze, precision, holds_batchnorm(args))
    if synchronise:
        nn.SyncBatchNorm.convert_sync_batchnorm(model.backbone)

    # What is going to happen, on the screen and in the run's folder.
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    args.workers = args.workers or len(cores)
    args.out = claim_folder(args.out) if RANK == 0 else args.out or Path("runs")
    config = {"options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
              "classes": classes, "photos": {part: len(pairs) for part, pairs in parts.items()},
              "preprocessing": {"image_size": args.image_size, "border": border_left_out(args), "interpolation": "bilinear",
                                "mean": list(MEAN), "std": list(STD)},
              "trainable_parameters": sum(value.numel() for value in network.parameters() if value.requires_grad),
              "frozen_parameters": sum(value.numel() for value in network.parameters() if not value.requires_grad),
              **machine(device, precision)}
    print_banner(config)

    # Pixels, and the trunk's maps of them.
    passing = tempfile.TemporaryDirectory(dir=args.out, ignore_cleanup_errors=True) if args.no_cache else None
    with passing or nullcontext(args.cache) as cache:
        photos = open_photos(model, parts["train"] + parts["val"], files, args.data / "train", cache, args)
        in_train, in_val = torch.arange(len(photos.rows)).split([len(parts["train"]), len(parts["val"])])
        config["trunk"] = photos.keep(args.freeze, args.cache_gb)
        print(f"Trunk       {config['trunk']}", flush=True)

        # Epochs, then the test of the best one.
        if RANK == 0:
            write_json(args.out / "config.json", config)  # from here on the folder holds a run
            write_manifest(manifest, args.out / "split.json")
        fit(model, photos, in_train, in_val, args, config)
        test(model, parts["test"], cache, args)
    print(f"\nCheckpoints, history and predictions: {args.out}")
    if PROCESSES > 1:
        distributed.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run(lambda: main(args)))
