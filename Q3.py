#!/usr/bin/env python3
"""Fine-tune an ImageNet ResNet50 on the ten classes of iNaturalist-12K, or on your own photos.

    python Q3.py --demo                            see transfer learning work, offline
    python Q3.py --data my_photos --fraction 1.0   train on folders of classes, and test
    python Q3.py --resume runs/NAME                resume after an interruption

Each photo is decoded once and goes through the frozen first layers, the trunk, once. Only the
layers after it are trained, on crops of the trunk's feature maps:
    photos -> pixels (uint8) -> frozen trunk -> feature maps -> crops -> layer3, layer4, fc -> loss
"""

import argparse
import hashlib
import importlib.util
import io
import math
import os
import re
import shlex
import shutil
import signal
import struct
import sys
import time
import warnings
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path

try:
    import numpy as np
    import torch
    from PIL import Image, ImageOps, PngImagePlugin
    from torch import distributed, nn
    from torch.fx.experimental.optimization import fuse
    from torch.nn import functional as F
    from torchvision.models import ResNet50_Weights, resnet50
    from tqdm import tqdm

    import dataset_split as disk
    from dataset_split import InputError, write_csv, write_json, write_whole
except ModuleNotFoundError as error:
    print(f"{error}: pip install -r requirements.txt", file=sys.stderr)
    sys.exit(2)

torch.backends.cudnn.deterministic = True  # the same seed, the same run
torch.backends.cudnn.allow_tf32 = False  # float32 is float32
warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # odd metadata
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)  # such a photo is refused
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 2**26  # bytes of text or profile
Image.init()
FORMATS = [*{"JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM", "AVIF"} & Image.OPEN.keys()]
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF's orientation, what Pillow calls it

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's red, green, blue in [0, 1]
PENALTY = 0.03  # on the squared weights of the logistic regression that fc starts from
SOFTER = 0.3  # times fc before epoch 1: an overconfident fc passes hardly any gradient down
WARMUP = 0.1  # fraction of the steps in which the learning rates rise
BINS = 15  # of confidence, in the calibration error and its picture
CACHE_FORMAT = 6  # to be raised when read_photo or FineTuned.maps give something else
CHECKPOINT_FORMAT = 7  # likewise, when something else is read from a checkpoint
ROW = "{epoch:5} | {train_loss:10.4f} | {train_acc:9.4f} | {val_loss:8.4f} | {val_acc:7.4f} | "\
    "{calibrated_loss:10.4f}"
HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None
RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE = (  # what torchrun tells each of its processes
    int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else alone
    for name, alone in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_WORLD_SIZE", 1)))
QUIET = True if RANK else None  # tqdm: rank 0 draws progress bars, and only in a terminal
store = None  # of keys and values, shared by the processes that torchrun started


# -- Options ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Recipe:
    """How a network is trained. Options can change the last four."""
    border: float | None  # fraction of the short side cut at each edge; None: squash the photo
    crop: float  # side of a training crop, as a fraction of the photo's side
    fit_head: bool  # epoch 0: fc starts from logistic regression, not from noise
    hold_batchnorm: bool  # BatchNorm keeps ImageNet's statistics in the layers that learn, too
    cosine: bool  # the learning rates warm up and fall along a cosine, or are constant
    batch_size: int
    lr_head: float
    lr_backbone: float
    epochs: int


RECIPES = {  # border, crop, fit_head, hold_batchnorm, cosine, batch_size, lr_head, lr_backbone
    "tuned": Recipe(1 / 16, 5 / 7, True, True, True, 32, 1e-3, 1e-4, epochs=5),
    "reference": Recipe(None, 1.0, False, False, False, 64, 1e-3, 1e-4, epochs=5),
    "scratch": Recipe(1 / 16, 5 / 7, False, False, True, 64, 1e-3, 1e-3, epochs=40),
}
DEMO_RUNS = Path("runs/demo")
DEMO = {  # its runs, and the options of each besides those that all have
    "pre-trained": "--data demo/source --from-scratch --epochs 12",
    "fine-tuned": "--data demo/target --weights runs/demo/pre-trained/best.pt --freeze 4",
    "from-scratch": "--data demo/target --from-scratch",
}
BESIDE = {  # the options that can be given with each of these
    "demo": set(),
    "resume": {"data", "workers", "cache", "device", "amp"},
    "evaluate": {"data", "workers", "cache", "batch_size", "device", "amp", "out"},
    "predict": {"workers", "batch_size", "device", "amp"},
}


def get_args_parser() -> disk.Parser:
    parser = disk.Parser(prog="Q3.py", allow_abbrev=False, description=__doc__,
                         formatter_class=argparse.RawDescriptionHelpFormatter)
    size, rate = disk.number(int, 1, 10**6), disk.number(float, 1e-12, 100)
    add = (group := parser.add_argument_group("photos")).add_argument
    add("--data", type=Path, default=Path("inaturalist_12k"), metavar="DIR",
        help="has train/<Class>/ and val/<Class>/, the test; or class folders alone")
    add("--download", action="store_true", help="fetch iNaturalist-12K first, if it is missing")
    disk.add_split_options(group, fraction=0.25)
    add("--split", type=Path, metavar="FILE", help="made by dataset_split.py; replaces fractions")
    add("--image-size", type=disk.number(int, 64, 4096), default=224, metavar="N",
        help="the network sees N x N pixels (default: 224)")
    add("--workers", type=size, default=count_cores(), metavar="N", help="threads (one a core)")
    add("--cache", type=Path, default=Path(".cache"), metavar="DIR", help="default .cache; or none")
    group = parser.add_argument_group("network")
    add = group.add_mutually_exclusive_group().add_argument
    add("--weights", default="IMAGENET1K_V2", metavar="SPEC",
        help="IMAGENET1K_V2 (default) or _V1, a ResNet50 state dict, a best.pt, or none (random)")
    add("--from-scratch", action="store_true", help="train a small CNN from random weights instead")
    group.add_argument("--freeze", type=disk.number(int, 0, 9), metavar="N", help="""freeze the
        first N of conv1, bn1, relu, maxpool, layer1-4, avgpool (6; small CNN: 4; random: 0)""")
    add = parser.add_argument_group("training").add_argument
    add("--recipe", choices=RECIPES, help="default: tuned; random weights: scratch")
    add("--epochs", type=size, metavar="N", help="default: 5; scratch: 40")
    add("--batch-size", type=size, metavar="N", help="photos a step (32; other recipes: 64)")
    add("--lr-head", type=rate, metavar="LR", help="learning rate of fc (default: 1e-3)")
    add("--lr-backbone", type=rate, metavar="LR", help="of other layers (1e-4; scratch: 1e-3)")
    add("--device", choices=("auto", "cuda", "mps", "cpu"), default="auto", help="default: auto")
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="mixed precision")
    group = parser.add_argument_group("runs and trained networks")
    group.add_argument("--out", type=Path, metavar="DIR", help="default: runs/<date-time>")
    add = group.add_mutually_exclusive_group().add_argument
    add("--demo", action="store_true", help="transfer learning on drawn pictures, in one minute")
    add("--resume", type=Path, metavar="RUN", help="resume after the last finished epoch")
    add("--evaluate", type=Path, metavar="CKPT", help="score a checkpoint on the test photos")
    add("--predict", nargs="+", metavar=("CKPT", "PHOTO"), help="classify photos and folders")
    return parser


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The options, checked; `typed` holds those that were given, as they replace a checkpoint's."""
    parser = get_args_parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    if "--" in argv:  # photos follow whose names may begin with a dash
        argv[argv.index("--"):] = [os.path.join(".", x) for x in argv[argv.index("--") + 1:]]
    if any(re.match("--local.rank", word) for word in argv):
        parser.error("--local-rank is the old launcher's: use torchrun --nproc-per-node=N Q3.py")
    defaults = vars(parser.parse_args([]))
    typed = vars(parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(defaults))))
    typed = {name: value for name, value in typed.items() if value is not None}
    for option, allowed in BESIDE.items():
        if option in typed and (others := sorted(typed.keys() - allowed - {option})):
            parser.error(f"--{others[0].replace('_', '-')} can't be given with --{option}: "
                         "leave it out, or start a new run")
    args = argparse.Namespace(**defaults | typed, typed=typed)
    args.weights = "none" if args.from_scratch else args.weights
    args.recipe = args.recipe or ("scratch" if args.weights == "none" else "tuned")
    for name in ("batch_size", "lr_head", "lr_backbone", "epochs"):
        setattr(args, name, getattr(args, name) or getattr(RECIPES[args.recipe], name))
    if args.weights == "none" and RECIPES[args.recipe].hold_batchnorm:
        parser.error("--recipe tuned needs trained weights: give --recipe scratch or reference")
    if args.split and typed.keys() & {"fraction", "val_fraction", "test_fraction"}:
        parser.error("--split FILE says which photos are used: leave the fractions out")
    return args


# -- The machine, and the processes that torchrun starts -------------------------------------------
def count_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """How many cores this process may use: its affinity's, or a container's quota (cgroup v2)."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    with suppress(OSError, ValueError):  # no such file, or no limit: "max 100000"
        time_used, period = map(int, quota.read_text().split())
        cores = min(cores, math.ceil(time_used / period))
    return cores


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of this tensor over all processes. They wait for each other here."""
    if WORLD_SIZE > 1:
        distributed.all_reduce(tensor)
    return tensor


def from_rank_0(function, *args):
    """The function's result on rank 0, in every process. If it fails, torchrun ends them all."""
    result = [function(*args) if RANK == 0 else None]
    if WORLD_SIZE > 1:
        distributed.broadcast_object_list(result, 0, device=torch.device("cpu"))
    return result[0]


def end_on_signals() -> None:
    """Let SIGTERM, SIGUSR1 (schedulers send them) and a closed terminal end a run like Ctrl-C."""
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"):
        number = getattr(signal, name, signal.SIGINT)
        if RANK == 0 and signal.getsignal(number) != signal.SIG_IGN:  # as nohup ignores SIGHUP
            signal.signal(number, signal.default_int_handler)


def pick_device(name: str) -> torch.device:
    """The device called cuda, mps or cpu; auto: the first there is. Raises InputError: too few."""
    count = {"cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
             "mps": int(torch.backends.mps.is_available()), "cpu": LOCAL_WORLD_SIZE}
    name = next(kind for kind in count if count[kind]) if name == "auto" else name
    if count[name] < LOCAL_WORLD_SIZE:
        raise InputError(f"--device {name}: {count[name]} of {LOCAL_WORLD_SIZE} found, try cpu")
    return torch.device("cuda", LOCAL_RANK) if name == "cuda" else torch.device(name)


def pick_precision(amp: str, device: torch.device) -> torch.dtype:
    """The type of convolutions; float32: no mixed precision. auto is bfloat16 where the hardware
    has it (emulated, as on AVX2, it is slow: 1.6 photos/s, not 10.3), float16 on older GPUs."""
    if amp == "fp16" and device.type != "cuda":
        raise InputError(f"--amp fp16 is for NVIDIA GPUs: on {device.type} give --amp bf16 or off")
    if amp != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]
    if device.type == "cuda":
        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if bf16 else torch.float16
    has = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    bf16 = any(has.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    return torch.bfloat16 if bf16 and torch.backends.mkldnn.is_available() else torch.float32


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device; a GPU needn't finish its work first."""
    return tensor.to(device, non_blocking=device.type == "cuda")


# -- Photos: files -> uint8 pixels, once -----------------------------------------------------------
def read_photo(file: Path, size: int, border: float | None) -> torch.Tensor | InputError:
    """A photo as the network sees it, upright: uint8 (size, size, 3), RGB. `border` is the fraction
    of the short side cut at each edge of a square in the middle; None squashes the whole photo.
    Returns, not raises, an InputError: no photo, a damaged one, or of over 89 million pixels."""
    if not os.path.isfile(file):  # opening a pipe would wait forever
        return InputError(f"'{file}' is not a file, or is a folder without photos")
    try:
        with Image.open(file, formats=FORMATS) as image:
            image.load()
            with suppress(SyntaxError, ValueError, struct.error):  # damaged; Pillow turns TIFFs
                if image.format != "TIFF" and (tag := image.getexif().get(0x0112)) in TURNS:
                    image = image.transpose(TURNS[tag])
            if image.mode[0] in "IF":  # "I;16" can be 12 bits; floats end at 1 or at 65535
                raise ValueError("grey of more than 8 bits: convert it to 8 bits")
            if "A" in image.getbands() or "transparency" in image.info:  # lay it on white
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            image = image.convert("RGB")
            fit = Image.Image.resize if border is None else partial(ImageOps.fit, bleed=border)
            return torch.from_numpy(np.array(fit(image, (size, size), Image.Resampling.BILINEAR)))
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders raise any kind: OSError, SyntaxError, IndexError
        return InputError(f"photo '{file}' can't be read ({error or type(error)})")


def fingerprint(*facts) -> str:
    """A short hash of these facts."""
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def identity(file: Path) -> str:
    """A name for this photo, which changes when the file moves or is changed."""
    with disk.disk_errors(f"photo '{file}' can't be read"):
        stat = file.stat(follow_symlinks=file.exists())
    return fingerprint(os.path.abspath(file), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns,
                       stat.st_ino)


class Cache:
    """Tensors of one shape, each in a file of its own, which are written once and read by many
    runs. `names` are those of the files: here they are the identities of photos."""

    def __init__(self, folder: Path, names: list[str], shape: tuple[int, ...], dtype: torch.dtype):
        self.folder, self.names, self.shape, self.dtype = folder, names, shape, dtype
        self.nbytes = math.prod(shape) * dtype.itemsize  # of a tensor
        with disk.disk_errors(f"--cache '{folder.parent}' can't be used, give another"):
            folder.mkdir(parents=True, exist_ok=True)

    def missing(self, rank: int = 0, count: int = 1) -> torch.Tensor:
        """Positions (int64) of the files to write; of `count` processes, those for `rank`."""
        with disk.disk_errors(f"--cache '{self.folder.parent}' can't be used"):
            sizes = [file.stat().st_size if file.exists() else None
                     for file in map(self.folder.joinpath, self.names)]
        return torch.tensor([index for index, size in enumerate(sizes)
                             if index % count == rank and size != self.nbytes], dtype=torch.int64)

    def fill(self, title: str, size: int, compute) -> dict[int, InputError]:
        """Write what is missing, `size` at a time: compute(positions) gives a tensor for each, or
        an error; the errors are returned. Each process computes a share, then what others left."""
        for share in ((LOCAL_RANK, LOCAL_WORLD_SIZE), (0, 1))[:WORLD_SIZE]:  # alone: one pass
            missing, errors, start = self.missing(*share), {}, time.perf_counter()
            groups = missing.split(size) if len(missing) else ()
            for some in tqdm(groups, title, unit="group", leave=False, disable=QUIET):
                for position, value in zip(some.tolist(), compute(some)):
                    if isinstance(value, InputError):
                        errors[position] = value
                    else:
                        data = value.contiguous().view(torch.uint8).numpy()
                        write_whole(self.folder / self.names[position], data, sync=False)
            if len(missing):
                print(f"{title:11} {len(missing):,} photos in {time.perf_counter() - start:.1f} s")
            summed(torch.zeros(1))  # wait for the others
        return errors

    def __getitem__(self, positions: torch.Tensor) -> torch.Tensor:
        """The tensors at these positions, int64: (len(positions), *shape)."""
        found = torch.empty(len(positions), *self.shape, dtype=self.dtype)
        with disk.disk_errors(f"--cache '{self.folder.parent}' can't be used"):
            for tensor, position in zip(found, positions.tolist()):
                with open(self.folder / self.names[position], "rb") as file:
                    if file.readinto(tensor.view(torch.uint8).numpy()) < self.nbytes:
                        raise OSError(f"'{file.name}' is truncated: delete it")
        return found


@dataclass
class Photos:
    """The photos of one part: training, validation or test."""
    paths: list[str]  # relative to the folder, with "/"
    labels: torch.Tensor  # int64 (photos,)
    pixels: Cache  # uint8 (size, size, 3)
    checksums: dict[str, str]  # by path: photos with the same pixels have the same
    maps: Cache | torch.Tensor | None = None  # feature maps; a tensor on a GPU


def load_photos(parts: dict[str, list], folders: dict[str, Path], cache: Path, size: int,
                border: float | None, workers: int) -> tuple[list[Photos], dict[Path, str]]:
    """Decode photos that the cache lacks. `parts` has (file, label) pairs, `folders` what paths are
    relative to. Returns the photos of each part, and what is wrong with those left out."""
    place = cache / f"pixels-{fingerprint(size, border, Image.__version__, CACHE_FORMAT)}"
    loaded, damaged = [], {}
    for part, pairs in parts.items():
        files = [file for file, _ in pairs]
        pixels = Cache(place, [*map(identity, files)], (size, size, 3), torch.uint8)
        with ThreadPoolExecutor(workers) as pool:
            errors = pixels.fill("Decoding", 8 * workers, lambda some, files=files: pool.map(
                partial(read_photo, size=size, border=border), [files[index] for index in some]))
        whole = [index for index in range(len(files)) if index not in errors]
        lost = {label for _, label in pairs} - {pairs[index][1] for index in whole}
        if bad := [str(error) for index, error in errors.items()
                   if part == "test" or pairs[index][1] in lost]:
            raise InputError(f"replace {len(bad)} damaged {part} photos: {'; '.join(bad[:3])}")
        damaged |= {files[index]: str(error) for index, error in errors.items()}
        pixels.names = [pixels.names[index] for index in whole]
        paths = [files[index].relative_to(folders[part]).as_posix() for index in whole]
        checksums, plain = {}, []
        for index, path in enumerate(paths):
            image = pixels[torch.tensor([index])][0]
            checksums[path] = hashlib.sha256(image.numpy()).hexdigest()[:16]
            plain += [path] * bool((image == image[0, 0]).all())
        if plain:
            print(f"ONE COLOUR  {len(plain):,} photos in {part}, e.g. '{plain[0]}': check them")
        labels = torch.tensor([pairs[index][1] for index in whole])
        loaded.append(Photos(paths, labels, pixels, checksums))
    return loaded, damaged


# -- The network: ImageNet's ResNet50, its last layer replaced, its first children frozen ----------
def build_network(architecture: str, state: dict | None, classes: int) -> nn.Module:
    """A resnet50 or small_cnn whose last layer is a new one for so many classes. The others have
    the weights of a state dict, or random ones. Raises InputError: it doesn't fit."""
    network = build_small_cnn() if architecture == "small_cnn" else resnet50(weights=None)
    features, network.fc = network.fc.in_features, nn.Identity()  # so that no fc is expected
    if state is not None:
        try:
            network.load_state_dict({name: value for name, value in state.items()
                                     if not name.startswith("fc.")})
        except RuntimeError as error:  # what differs: a line each, after a headline
            raise InputError(f"--weights are not those of a {architecture}, give others: "
                             f"{str(error).splitlines()[1].strip():.200}") from None
    network.fc = nn.Linear(features, classes)  # starts uniform in +-1 / sqrt(features)
    return network


def trained_network(checkpoint: dict) -> nn.Module:
    """The network of a checkpoint of this script, on the CPU."""
    network = build_network(checkpoint["architecture"], None, len(checkpoint["classes"]))
    network.load_state_dict(checkpoint["model"])
    return network


def read_weights(spec: str, scratch: bool = False) -> tuple[str, dict[str, torch.Tensor] | None]:
    """The architecture and the state dict (for none: None) that --weights names. Raises InputError:
    they can't be fetched, or it is not a file of tensors."""
    if spec == "none":
        return "small_cnn" if scratch else "resnet50", None
    file = Path(spec)
    if spec in ResNet50_Weights.__members__:
        url = ResNet50_Weights[spec].url  # its name ends with the start of its SHA-256
        file = Path(torch.hub.get_dir(), "checkpoints", Path(url).name)
        try:
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                torch.hub.download_url_to_file(url, str(file), file.stem[-8:])
        except (OSError, RuntimeError) as error:  # network or disk; a wrong hash
            raise InputError(f"--weights {spec} can't be fetched ({error}): try again, or download "
                             f"{url} and give --weights PATH, or try --demo") from None
    elif not file.is_file():
        raise InputError(f"--weights '{spec}' is not a file, nor one of "
                         f"{', '.join(ResNet50_Weights.__members__)}, none")
    state, architecture = load_tensors(file), "resnet50"
    for wrapper in ("model", "state_dict", "model_state_dict"):  # checkpoints of this and of others
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            architecture, state = state.get("architecture", architecture), state[wrapper]
    state = state if isinstance(state, dict) else {}
    prefix = os.path.commonprefix([*map(str, state)])  # noqa: RUF071 - as "module.", up to a dot
    return architecture, {str(name)[prefix.rfind(".") + 1:]: state[name] for name in state}


def build_small_cnn() -> nn.Module:
    """What --from-scratch trains: five blocks of convolution, BatchNorm, ReLU and pooling."""
    network, channels = nn.Sequential(), (3, 16, 32, 64, 128, 256)
    for block in range(1, 6):
        network.add_module(f"block{block}", nn.Sequential(
            nn.Conv2d(channels[block - 1], channels[block], 3, padding=1, bias=False),
            nn.BatchNorm2d(channels[block]), nn.ReLU(), nn.MaxPool2d(3, stride=2, padding=1)))
    network.avgpool, network.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
    network.fc = nn.Linear(256, 1)
    return network


class FineTuned(nn.Module):
    """A network in three parts: a trunk that is frozen, a backbone that learns, a head (fc).
    Frozen means more than "no gradients": in train mode BatchNorm goes on averaging the statistics
    of every batch. The trunk is a copy in eval mode, BatchNorm folded into its convolutions. With
    `hold_batchnorm` the backbone's BatchNorm keeps its statistics, too; all its weights learn."""

    def __init__(self, network: nn.Module, freeze: int, device: torch.device,
                 precision: torch.dtype = torch.float32, hold_batchnorm: bool = False):
        super().__init__()
        # Channels-last is fastest (2 AVX2 cores, forward: 10.3 photos/s against 7.1); but on
        # Apple's GPUs BatchNorm gets wrong gradients in it (pytorch#175189).
        self.layout = torch.contiguous_format if device.type == "mps" else torch.channels_last
        self.network = network.to(device, memory_format=self.layout)  # for checkpoints
        *children, self.head = (each for each in network.children()
                                if not isinstance(each, nn.Flatten))  # `features` flattens
        frozen = nn.Sequential(*children[:freeze]).requires_grad_(False).eval()
        self.trunk = fuse(frozen).to(precision).to(memory_format=self.layout)
        self.backbone = nn.Sequential(*children[freeze:])
        self.device, self.precision, self.hold_batchnorm = device, precision, hold_batchnorm
        self.mean, self.std = (torch.tensor(x, device=device).view(3, 1, 1) for x in (MEAN, STD))

    def train(self, mode: bool = True):
        super().train(False)  # frozen layers stay in eval mode, whatever happens
        self.backbone.train(mode and not self.hold_batchnorm)
        return self

    @torch.no_grad()
    def maps(self, pixels: torch.Tensor) -> torch.Tensor:
        """Pixels, uint8 (batch, size, size, 3) -> the trunk's feature maps (batch, side, side,
        channels); after layer2 side is size / 8, with 512 channels."""
        images = (pixels.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std
        images = images.to(self.precision, memory_format=self.layout)
        return self.trunk(images).permute(0, 2, 3, 1)

    def features(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps (batch, channels, side, side) -> what the head sees, float32 (batch, 2048)."""
        mixed = self.precision != torch.float32
        with torch.autocast(self.device.type, self.precision, enabled=mixed):
            return self.backbone(maps).flatten(1).float()

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps (batch, channels, side, side) -> logits, float32 (batch, classes)."""
        return self.head(self.features(maps))


# -- Feature maps, once a photo, and batches of their crops ----------------------------------------
def cache_maps(model: FineTuned, parts: list[Photos]) -> str:
    """Compute the maps of these parts once, if half of the free disk and a quarter of an NVIDIA
    GPU's free memory hold them; else each step computes them again. Says which."""
    weights = [hashlib.sha256(value.float().cpu().numpy().tobytes()).hexdigest()
               for value in model.trunk.state_dict().values()]
    pixels, device = parts[0].pixels, model.device
    example = model.maps(send(pixels[torch.tensor([0])], device))[0]
    name = fingerprint(pixels.folder.name, weights, len(model.backbone), example.shape,
                       example.dtype, device.type, torch.__version__)
    caches = [Cache(pixels.folder.with_name(f"maps-{name}"), part.pixels.names, example.shape,
                    example.dtype) for part in parts]
    size = example.nbytes * sum(len(part.labels) for part in parts)
    to_write = example.nbytes * sum(len(maps.missing()) for maps in caches)
    no_room = to_write > shutil.disk_usage(pixels.folder).free / 2 or (
        device.type == "cuda" and size > torch.cuda.mem_get_info()[0] / 4)
    if summed(torch.tensor(int(no_room))):  # in any process
        return f"runs in each step: no room for {size / 1e9:.1f} GB of feature maps"
    for part, maps in zip(parts, caches):
        maps.fill("Trunk maps", 32, lambda some, pixels=part.pixels: model.maps(send(
            pixels[some.repeat(32)[:32]], device)).cpu())  # always 32, as rounding depends on it
        part.maps = maps if device.type != "cuda" else torch.cat(
            [send(maps[some], device) for some in torch.arange(len(part.labels)).split(256)])
    return f"runs once a photo: {size / 1e9:.2f} GB of feature maps"


def crop(maps: torch.Tensor, offsets: torch.Tensor, width: float) -> torch.Tensor:
    """A square of each map (batch, side, side, channels), `width` times as wide: nearly the map of
    a cropped photo. `offsets`, float32 (batch, 2) in [0, 1), say how far down and to the right."""
    side, kept = maps.shape[1], round(width * maps.shape[1])
    corners = (offsets * (side - kept + 1)).long().tolist()
    squares = [each[top:top + kept, left:left + kept] for each, (top, left) in zip(maps, corners)]
    return torch.stack(squares) if squares else maps[:, :kept, :kept]  # a process without a share


def draw_epoch(count: int, seed: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A random order of photos, int64 (count,), and offsets of their crops, float32 (count, 2).
    They depend on seed and epoch alone, so that all processes and a resumed run agree."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator), torch.rand(count, 2, generator=generator)


def batches(model: FineTuned, photos: Photos, batch_size: int, title: str,
            order: torch.Tensor | None = None, offsets: torch.Tensor | None = None,
            width: float = 1.0):
    """Go through the photos once, in `order` (positions, int64), cropped to `width`. Yields this
    process's share of a step, on the device: maps (batch, channels, side, side), labels (batch,);
    and the size of the whole step."""
    positions = torch.arange(len(photos.labels))
    order = positions if order is None else order
    steps = positions.tensor_split(math.ceil(len(order) / batch_size))  # 65: 33 + 32, not 64 + 1
    for step in tqdm(steps, title, unit="step", leave=False, disable=QUIET):
        share = step[RANK::WORLD_SIZE]
        mine = order[share]
        if photos.maps is None:  # there was no room for them
            maps = model.maps(send(photos.pixels[mine], model.device))
        else:
            mine = mine if isinstance(photos.maps, Cache) else send(mine, model.device)
            maps = send(photos.maps[mine], model.device)
        maps = maps if width == 1 else crop(maps, offsets[share], width)
        maps = maps.permute(0, 3, 1, 2).contiguous(memory_format=model.layout)
        yield maps, send(photos.labels[order[share]], model.device), len(step)


# -- Optimiser and epochs: a fast head, a slow backbone --------------------------------------------
def build_optimizer(model: FineTuned, lr_head: float, lr_backbone: float) -> torch.optim.Adam:
    """Adam over exactly the parameters that learn: the head's are the first group of two."""
    groups = ((model.head, lr_head), (model.backbone, lr_backbone))
    return torch.optim.Adam([{"params": list(layers.parameters()), "lr": rate, "initial_lr": rate}
                             for layers, rate in groups], fused=True)


def warmup_cosine(step: int, steps: int) -> float:
    """What the learning rates are multiplied by in step number `step`, from 0: it rises to 1 in
    the first WARMUP of the steps, then falls to 0 along a cosine (SGDR, Loshchilov and Hutter)."""
    rising = (step + 1) / (WARMUP * steps + 1)
    falling = (1 + math.cos(math.pi * max(0, step / steps - WARMUP) / (1 - WARMUP))) / 2
    return min(rising, falling)


def loss_and_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Mean cross-entropy, and the fraction of photos whose largest logit is their label's."""
    correct = (logits.argmax(1) == labels).double().mean()
    return F.cross_entropy(logits, labels).item(), correct.item()


@torch.no_grad()
def predict(model: FineTuned, photos: Photos, batch_size: int, title: str,
            layers=None) -> torch.Tensor:
    """Logits of uncropped photos, or what `layers` give: float32 (photos, classes or features)."""
    model.eval()
    outputs = []
    for maps, _, count in batches(model, photos, batch_size, title):
        output = (layers or model)(maps)
        outputs.append(output.new_zeros(count, output.shape[1]))  # 0: what other processes add
        outputs[-1][RANK::WORLD_SIZE] = output
    return summed(torch.cat(outputs)).cpu()


def fit_head(model: FineTuned, train: Photos, batch_size: int) -> tuple[float, float]:
    """Epoch 0: set fc to the logistic regression fitted on the features of the training photos.
    From noise it would first send large gradients into good layers (Kumar et al., Fine-Tuning can
    Distort Pretrained Features, ICLR 2022). Returns its loss and accuracy on these photos."""
    features = predict(model, train, batch_size, "features", model.features)  # (photos, 2048)
    mean = features.mean(0)
    overall = features.sub_(mean).std()
    if not 1e-6 * mean.abs().max() < overall < math.inf:  # equal, but for rounding
        raise InputError("features equal or not finite: try --cache none, --amp off, new --weights")
    scale = (overall * (features.std(0) + overall / 1000)).sqrt()  # half way to equal deviations
    features.div_(scale)
    head = nn.Linear(features.shape[1], model.head.out_features)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(features), train.labels) + PENALTY * head.weight.square().sum()
        loss.backward()
        return loss.detach()
    optimizer.step(closure)
    with torch.no_grad():
        for value in head.parameters():
            summed(value.mul_(RANK == 0))  # rank 0's, as processors may round differently
        model.head.weight.copy_(head.weight / scale)
        model.head.bias.copy_(head.bias - head.weight @ (mean / scale))
        return loss_and_accuracy(head(features), train.labels)


def train_epoch(learner: nn.Module, loader, optimizer: torch.optim.Optimizer,
                scaler: torch.amp.GradScaler, factors: list[float]) -> tuple[float, float]:
    """One pass over the training photos, in steps as `batches` yields them, each with a factor for
    the learning rates. Mean loss and accuracy over the epoch, during which the network learns."""
    learner.train()
    totals, seen = 0, 0
    for (maps, labels, count), factor in zip(loader, factors, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = factor * group["initial_lr"]
        logits = learner(maps)
        losses = F.cross_entropy(logits, labels, reduction="none")
        optimizer.zero_grad()
        scaler.scale(losses.sum() / count * WORLD_SIZE).backward()  # DDP averages over processes
        scaler.step(optimizer)
        scaler.update()
        totals += torch.stack([losses.detach().sum(), (logits.argmax(1) == labels).sum()])
        seen += count
    loss, correct = summed(totals).tolist()
    return loss / seen, correct / seen


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """The temperature to divide logits by, so that of photos with 80 % confidence about 80 % are
    correct (Guo et al., ICML 2017), nearer to 1 for few photos; the lowest loss at any."""
    candidates = torch.logspace(-1, 1, 401)
    losses = torch.stack([F.cross_entropy(logits / each, labels) for each in candidates])
    fitted = (losses + 10 * candidates.log().square() / len(labels)).argmin()
    return candidates[fitted].item(), losses.min().item()


def best_epoch(history: list[dict]) -> int:
    """The epoch with the lowest calibrated loss: accuracy on few photos is noisy."""
    return min(history, key=lambda row: row["calibrated_loss"])["epoch"]


# -- The job ---------------------------------------------------------------------------------------
def fine_tune(args: argparse.Namespace) -> tuple[FineTuned, list[dict], dict]:
    """Photos, network, feature maps, epochs, test. Returns the model, its history and its test."""
    resumed = {}
    if args.resume:
        args.resume = args.resume.parent if args.resume.is_file() else args.resume
        resumed = from_rank_0(load_checkpoint, args.resume / "last.pt", "optimizer")
        vars(args).update(resumed["options"] | args.typed | {"resume": args.resume})
    recipe = RECIPES[args.recipe]

    # Which photos there are, and which part each is in
    if args.download:
        from_rank_0(disk.download, args.data)
    manifest = resumed.get("split") or (disk.read_manifest(args.split) if args.split else None)
    split = disk.load_split(args, manifest, f"split '{args.resume or args.split}'")

    # The network: a frozen trunk, a backbone that learns slowly, a new head
    device = pick_device(args.device)
    precision = pick_precision(args.amp, device)
    torch.manual_seed(args.seed)  # of random weights
    if resumed:
        network = trained_network(resumed)
    else:
        args.architecture, state = from_rank_0(read_weights, args.weights, args.from_scratch)
        network = build_network(args.architecture, state, len(split.manifest["classes"]))
        if args.freeze is None:
            args.freeze = 0 if state is None else 4 if args.architecture == "small_cnn" else 6
    model = FineTuned(network, args.freeze, device, precision, recipe.hold_batchnorm)
    if WORLD_SIZE > 1 and not recipe.hold_batchnorm:
        raise InputError(f"--recipe {args.recipe} needs one process: start it without torchrun")
    learner = model if WORLD_SIZE == 1 else nn.parallel.DistributedDataParallel(
        model, broadcast_buffers=False)

    with run_folder(args) as (run, cache):
        print_banner(args, split, model)
        (train, val, test), damaged = load_photos(split.parts, split.folders, cache,
                                                  args.image_size, recipe.border, args.workers)
        if RANK == 0:
            disk.report_same_photos(
                run, train=train.checksums, val=val.checksums, test=test.checksums)
        if damaged and RANK == 0:
            print(f"LEFT OUT    {len(damaged)} damaged, e.g. {min(damaged)}: {run / 'damaged.csv'}")
            write_csv(run / "damaged.csv", [{"path": f, "problem": damaged[f]} for f in damaged])
        print(f"Trunk       {cache_maps(model, [train, val])}")

        # The optimiser; a resumed run continues where it was
        optimizer = build_optimizer(model, args.lr_head, args.lr_backbone)
        scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
        facts = describe_run(args, model, split.manifest["classes"])
        checksums = train.checksums | val.checksums
        history = resumed.get("history", [])
        if resumed:
            if differ := dict(resumed["checksums"].items() ^ checksums.items()):
                raise InputError(f"{len(differ)} photos or Pillow changed since the start, e.g. "
                                 f"{min(differ)!r}: start another run")
            optimizer.load_state_dict(resumed["optimizer"])
            for value, state in optimizer.state.items():  # fused Adam needs the weights' layout
                state.update({key: torch.empty_like(value).copy_(old)
                              for key, old in state.items() if old.dim()})
            scaler.load_state_dict(resumed["scaler"] or scaler.state_dict())  # {}: not float16
        if recipe.fit_head:
            print("\nEpoch 0 fits fc alone. Then fc is scaled down, maps are cropped: losses rise."
                  "\nThe epoch with the lowest calibrated loss of validation will be tested.")
        print("\nEpoch | Train Loss | Train Acc | Val Loss | Val Acc | Calibrated", *(
            ROW.format(**row) for row in history), sep="\n")
        first = history[-1]["epoch"] + 1 if history else int(not recipe.fit_head)
        steps = math.ceil(len(train.labels) / args.batch_size)  # as many as `batches` makes
        for epoch in range(first, args.epochs + 1):  # epoch 0 fits fc alone
            start = time.perf_counter()
            if epoch == 0:
                train_loss, train_acc = fit_head(model, train, args.batch_size)
            else:
                if epoch == 1 and recipe.fit_head:
                    for value in model.head.parameters():
                        value.data.mul_(SOFTER)
                loader = batches(model, train, args.batch_size, f"epoch {epoch}/{args.epochs}",
                                 *draw_epoch(len(train.labels), args.seed, epoch), recipe.crop)
                factors = [warmup_cosine(step, steps * args.epochs) if recipe.cosine else 1.0
                           for step in range(steps * (epoch - 1), steps * epoch)]
                train_loss, train_acc = train_epoch(learner, loader, optimizer, scaler, factors)
            trained = time.perf_counter()
            val_logits = predict(model, val, args.batch_size, "validation")
            val_loss, val_acc = loss_and_accuracy(val_logits, val.labels)
            temperature, calibrated_loss = fit_temperature(val_logits, val.labels)
            history.append({
                "epoch": epoch, "train_loss": train_loss, "train_acc": train_acc,
                "val_loss": val_loss, "val_acc": val_acc, "calibrated_loss": calibrated_loss,
                "seconds": time.perf_counter() - start,
                "images_per_second": len(train.labels) / (trained - start)})
            if not math.isfinite(train_loss + val_loss):
                raise InputError(f"the loss of epoch {epoch} is not finite: start again with lower "
                                 "--lr-head and --lr-backbone, or with --amp off")
            if RANK == 0:
                checkpoint = facts | {"split": split.manifest, "checksums": checksums,
                                      "epoch": epoch, "temperature": temperature, "model": {
                    name: value.cpu() for name, value in network.state_dict().items()}}
                if best_epoch(history) == epoch:
                    save_checkpoint(run / "best.pt", checkpoint)
                write_csv(run / "history.csv", history)
                write_json(run / "split.json", split.manifest)
                write_json(run / "config.json", facts)
                save_checkpoint(run / "last.pt", checkpoint | {  # last, as it counts on the others
                    "history": history, "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict()})
            print(ROW.format(**history[-1]), flush=True)

        # The test: once, of the best epoch
        best = from_rank_0(load_checkpoint, run / "best.pt")
        if best["epoch"] != best_epoch(history):
            raise InputError(f"'{run / 'best.pt'}' is not of the best epoch: start another run")
        network.load_state_dict(best["model"])
        return model, history, score(model, test, best, args, history)


def demo(args: argparse.Namespace) -> None:
    """Pre-train a small network on drawn pictures. Then fine-tune it on a few pictures of other
    classes, and train one from scratch on the same. An interrupted demo resumes."""
    disk.draw_demo(Path("demo"))
    results = {}
    for name, options in DEMO.items():
        run = (DEMO_RUNS / name).as_posix()
        words = f"--resume {run}" if os.path.exists(f"{run}/last.pt") else (
            f"{options} --batch-size 32 --fraction 1 --image-size 64 --out {run}")
        print(f"\n== {name}: python Q3.py {words}\n", flush=True)
        results[name] = fine_tune(get_args(words.split()))
    del results["pre-trained"]  # on other classes
    print("\nOf 10 classes | Test (95 % interval)   | Best epoch | Seconds | Parameters that learn")
    for name, (model, history, report) in results.items():
        print("{:13} | {:.4f} ({:.4f}-{:.4f}) | {:5} of {:2} | {:7.1f} | {:21,}".format(
            name, report["accuracy"], *report["accuracy_interval_95"], report["epoch"],
            history[-1]["epoch"], sum(row["seconds"] for row in history),
            sum(value.numel() for value in model.parameters() if value.requires_grad)))
    if HAS_MATPLOTLIB:
        draw_curves(DEMO_RUNS / "comparison.png", {name: results[name][1:] for name in results})
        print(f"Both curves: {DEMO_RUNS / 'comparison.png'}")


# -- What serves the job: several processes, files, the test, use, pictures ------------------------
@contextmanager
def run_folder(args: argparse.Namespace):
    """The folders of the run and of its cache. An interrupted run says how to resume."""
    run = args.out = args.resume or args.out or Path("runs", from_rank_0(
        datetime.now().strftime, "%Y-%m-%d_%H-%M-%S.%f"))
    cache = run / ".cache-of-this-run" if str(args.cache) == "none" else Path(args.cache)
    disk.refuse_inside_photos(args.data, run, cache)
    lock = from_rank_0(disk.claim_folder, run, bool(args.resume))
    try:
        yield run, cache
    except KeyboardInterrupt:
        if WORLD_SIZE > 1:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends it, too
        start = f"torchrun --nproc-per-node={LOCAL_WORLD_SIZE}" if WORLD_SIZE > 1 else "python"
        job = "--demo" if run.parent == DEMO_RUNS else f"--resume {shlex.quote(str(run))}"
        command = f"{start} {shlex.quote(sys.argv[0])} {job}"
        raise KeyboardInterrupt(f"resume with: {command}" if (run / "last.pt").exists() else
                                "nothing was saved, run the command again") from None
    finally:
        if RANK == 0:
            if str(args.cache) == "none":
                shutil.rmtree(cache, ignore_errors=True)
            os.close(lock)
            with suppress(OSError):  # the folder has results
                (run / ".lock").unlink()
                run.rmdir()


def print_banner(args: argparse.Namespace, split: disk.Split, model: FineTuned) -> None:
    learning, frozen = (sum(parameter.numel() for parameter in model.network.parameters()
                            if parameter.requires_grad == learns) for learns in (True, False))
    names, parts = split.manifest["classes"], split.parts.items()
    print(f"Photos      {', '.join(f'{len(pairs):,} {part}' for part, pairs in parts)} "
          f"({args.data}; --fraction {args.fraction:g} leaves out {len(split.unused):,})\n"
          f"Classes     {len(names)}: {', '.join(names[:10])}{' ...' * bool(names[10:])}\n"
          f"Network     {args.architecture} ({args.weights}): "
          f"{learning:,} parameters learn, {frozen:,} are frozen\n"
          f"Machine     {model.device}, {str(model.precision).removeprefix('torch.')}, "
          f"{torch.get_num_threads()} threads, processes: {WORLD_SIZE}\n"
          f"Results     {args.out}", flush=True)


def describe_run(args: argparse.Namespace, model: FineTuned, classes: list[str]) -> dict:
    """What config.json holds, and a checkpoint too."""
    left_out = {"typed", "out", "demo", "download", "workers", "resume", "evaluate", "predict"}
    return {"format": CHECKPOINT_FORMAT, "classes": classes, "architecture": args.architecture,
            "options": {name: str(value) if isinstance(value, Path) else value
                        for name, value in vars(args).items() if name not in left_out},
            "preprocessing": {"image_size": args.image_size, "interpolation": "bilinear",
                              "border": RECIPES[args.recipe].border, "mean": MEAN, "std": STD},
            "machine": {"torch": str(torch.__version__), "pillow": Image.__version__,
                        "device": str(model.device), "precision": str(model.precision)}}


def save_checkpoint(file: Path, checkpoint: dict) -> None:
    content = io.BytesIO()
    torch.save(checkpoint, content)
    write_whole(file, content.getbuffer())


def load_tensors(file: Path):
    """What torch.save wrote, if that is tensors and plain values; no code in it is run. Raises
    InputError: the file can't be read, is damaged, or holds something else."""
    with disk.disk_errors(f"'{file}' can't be read, check its path"):
        content = io.BytesIO(file.read_bytes())
    try:
        damaged = zipfile.is_zipfile(content) and zipfile.ZipFile(content).testzip()  # by CRC
        content.seek(0)
        if not damaged:
            return torch.load(content, map_location="cpu", weights_only=True)
        problem = f"damaged in its part {damaged!r}"
    except Exception as error:  # torch.load raises any kind for other files
        problem = " ".join(re.findall(r"GLOBAL \S+", str(error))) or "not a torch file"
    raise InputError(f"'{file}' can't be used ({problem}): delete it if it was downloaded, or give "
                     "a file of tensors by torch.save, not TorchScript, safetensors or code")


def load_checkpoint(file: Path, part: str = "model") -> dict:
    """A checkpoint of this script, on the CPU. Raises InputError: none, or without this part."""
    checkpoint = load_tensors(file)
    ours = isinstance(checkpoint, dict) and checkpoint.get("format") == CHECKPOINT_FORMAT
    if not ours or part not in checkpoint:
        raise InputError(f"'{file}' has no {part} that this version can use: try it as --weights")
    return checkpoint


def score(model: FineTuned, photos: Photos, checkpoint: dict, args, history=()) -> dict:
    """Test a checkpoint, which the model has loaded; write and return its report."""
    logits = predict(model, photos, args.batch_size, "test")
    if RANK > 0:
        return {}
    classes, temperature = checkpoint["classes"], checkpoint["temperature"]
    report = {"epoch": checkpoint["epoch"], "temperature": temperature,
              **test_report(logits, photos.labels, classes, temperature)}
    confidence, predicted = (logits / temperature).softmax(1).max(1)
    write_csv(args.out / "predictions.csv", [
        {"path": path, "label": classes[label], "predicted": classes[guess],
         "confidence": f"{share:.6f}"} for path, label, guess, share in zip(
             photos.paths, photos.labels, predicted, confidence, strict=True)])
    write_json(args.out / "test.json", report)
    print_report(report)
    if HAS_MATPLOTLIB:
        draw_pictures(args.out, report, photos, confidence, predicted, history)
    print(f"\nResults: {args.out}" + " (pictures: pip install matplotlib)" * (not HAS_MATPLOTLIB))
    return report


def wilson_interval(correct: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % interval of a proportion (E. B. Wilson, JASA 1927)."""
    count = max(1, count)
    share, scale = correct / count, 1 + z * z / count
    centre = (share + z * z / (2 * count)) / scale
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


def test_report(logits: torch.Tensor, labels: torch.Tensor, classes: list[str],
                temperature: float) -> dict:
    """What test.json holds. Rows of `confusion` are labels; the loss is without temperature."""
    n, (loss, accuracy) = len(classes), loss_and_accuracy(logits, labels)
    confusion = torch.bincount(labels * n + logits.argmax(1), minlength=n * n).view(n, n)
    sums = confusion.diag().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist()
    confidence, predicted = (logits.double() / temperature).softmax(1).max(1)
    gaps = torch.zeros(BINS).double().index_add(0, (confidence * BINS).long().clamp(max=BINS - 1),
                                                confidence - (predicted == labels).double())
    return {"photos": len(labels), "loss": loss, "accuracy": accuracy,
            "accuracy_interval_95": wilson_interval(int(confusion.trace()), len(labels)),
            "calibration_error": gaps.abs().sum().item() / len(labels),  # expected, over the bins
            "per_class": {name: {
                "photos": actual, "precision": hits / max(1, guessed),
                "recall": hits / max(1, actual), "f1": 2 * hits / max(1, actual + guessed),
                "recall_interval_95": wilson_interval(hits, actual),
            } for name, hits, actual, guessed in zip(classes, *sums)},
            "classes": classes, "confusion": confusion.tolist()}


def print_report(report: dict) -> None:
    low, high = report["accuracy_interval_95"]
    print(f"\nTest of epoch {report['epoch']} on {report['photos']:,} photos: accuracy "
          f"{report['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f}), loss "
          f"{report['loss']:.4f}, calibration error {100 * report['calibration_error']:.1f} %\n")
    width = max(len("Class"), *(len(name) for name in report["classes"]))
    print(f"{'Class':{width}} | Photos | Precision | Recall (95 % interval) |     F1")
    for name, row in report["per_class"].items():
        low, high = row["recall_interval_95"]
        if row["photos"]:
            print(f"{name:{width}} | {row['photos']:6} | {row['precision']:9.4f} | "
                  f"{row['recall']:6.4f} ({low:.4f}-{high:.4f}) | {row['f1']:6.4f}")


def load_trained(file: str | Path, args: argparse.Namespace) -> tuple[dict, FineTuned]:
    """A checkpoint and its network; options that weren't given become those of its training."""
    checkpoint = load_checkpoint(Path(file))
    vars(args).update(checkpoint["options"] | {"device": "auto"} | args.typed)
    device = pick_device(args.device)
    model = FineTuned(trained_network(checkpoint), args.freeze, device,
                      pick_precision(args.amp, device))
    return checkpoint, model.eval()


def evaluate(args: argparse.Namespace) -> None:
    """Test a checkpoint again, or on other photos, in a new folder."""
    checkpoint, model = load_trained(args.evaluate, args)
    args.data = disk.find_data(args.data)
    train_folder, test_folder = disk.part_folders(args.data)
    folder, classes = test_folder or train_folder, checkpoint["classes"]
    photos = disk.list_photos(folder, least=1)
    if unknown := sorted(photos.keys() - {*classes}):
        raise InputError(f"'{folder}' has classes that the network has not learnt, e.g. "
                         f"{unknown[0]!r}: rename them (accents too: NFC, NFD), or move them away")
    paths = [path for name in photos for path in photos[name]]
    aside = checkpoint["split"].get("test", [])
    chosen = aside if aside and "data" not in args.typed else paths  # the run's own test part
    with run_folder(args) as (_, cache):
        pairs = disk.labelled(folder, chosen, classes)
        (test,), _ = load_photos({"test": pairs}, {"test": folder}, cache, args.image_size,
                                 checkpoint["preprocessing"]["border"], args.workers)
        print(f"Photos      {len(chosen):,} of {len(paths):,} in '{folder}'")
        if learnt := {*test.checksums.values()} & {*checkpoint["checksums"].values()}:
            print(f"Note        {len(learnt):,} of the photos were in training: an optimistic test")
        score(model, test, checkpoint, args)


@torch.no_grad()
def classify(args: argparse.Namespace) -> None:
    """Print a row for each photo: its path, then the likeliest classes, or why it is unreadable."""
    file, *places = args.predict
    checkpoint, model = load_trained(file, args)
    classes, border = checkpoint["classes"], checkpoint["preprocessing"]["border"]
    with redirect_stdout(sys.stderr):  # what is left out
        photos = [photo for place in places for photo in disk.photos_in(Path(place))]
    read = 0

    def print_row(*cells) -> None:
        print("\t".join(re.sub(r"[\t\r\n]", " ", str(cell)) for cell in cells), flush=True)
    print_row("path", *[name + place for place in ("", "_2", "_3")[:len(classes)]
                        for name in ("class", "confidence")])
    with ThreadPoolExecutor(args.workers) as pool:
        for start in range(0, len(photos), args.batch_size):
            group = photos[start:start + args.batch_size]
            found = [*pool.map(partial(read_photo, size=args.image_size, border=border), group)]
            whole = [pixels for pixels in found if isinstance(pixels, torch.Tensor)]
            read += len(whole)
            if whole:
                maps = model.maps(send(torch.stack(whole), model.device))
                logits = model(maps.permute(0, 3, 1, 2)).cpu() / checkpoint["temperature"]
                top = iter(zip(*logits.softmax(1).topk(min(3, len(classes)))))
            for photo, pixels in zip(group, found):
                print_row(photo, *(["error", pixels] if isinstance(pixels, InputError) else [
                    cell for share, label in zip(*next(top))
                    for cell in (classes[label], f"{share:.4f}")]))
    if not read:
        raise InputError("no photo given or readable: give photos or folders after the checkpoint")


@contextmanager
def picture(file: Path, width: float, height: float):
    """A matplotlib figure of this size in inches, saved at the end."""
    import matplotlib.figure
    image = io.BytesIO()
    with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # names in scripts that the font lacks
        figure = matplotlib.figure.Figure((width, height), layout="constrained", dpi=120)
        yield figure
        figure.savefig(image, format="png")
    write_whole(file, image.getbuffer())


def draw_curves(file: Path, runs: dict[str, tuple[list[dict], dict]]) -> None:
    """Draw loss and accuracy of runs, (history, report) by name; a star is the test."""
    with picture(file, 12, 4) as figure:
        for axes, key, title in zip(figure.subplots(1, 2), ("loss", "acc"), ("loss", "accuracy")):
            for number, (name, (history, report)) in enumerate(runs.items()):
                for part, style in (("train", "o--"), ("val", "s-")):
                    axes.plot([row["epoch"] for row in history],
                              [row[f"{part}_{key}"] for row in history],
                              f"{style}C{number}", markersize=3, label=f"{name} {part}".strip())
                axes.plot(report["epoch"], report[title], f"*C{number}", markersize=14,
                          label=f"{name} test, best epoch".strip())
            axes.set(xlabel="epoch", ylabel=title, ylim=0)
            axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))  # beside the second axes


def draw_pictures(out: Path, report: dict, photos: Photos, confidence: torch.Tensor,
                  predicted: torch.Tensor, history: list[dict]) -> None:
    """Draw curves.png of a history, and confusion.png, mistakes.png, reliability.png of a test."""
    if history:
        draw_curves(out / "curves.png", {"": (history, report)})
    names, paths = ([short.encode(errors="replace").decode() for short in (  # as fonts can show
        name if len(name) < 27 else f"{name[:11]}...{name[-12:]}" for name in names)]
                    for names in (report["classes"], photos.paths))
    correct = predicted == photos.labels
    counts, side = torch.tensor(report["confusion"]), min(40, 3 + 0.5 * len(names))
    fractions = counts / counts.sum(1, keepdim=True).clamp(min=1)
    with picture(out / "confusion.png", side + 1, side) as figure:
        axes = figure.subplots()
        figure.colorbar(axes.imshow(fractions, "Blues", vmin=0, vmax=1), label="fraction of class")
        axes.set(title=f"Test of epoch {report['epoch']}: accuracy {report['accuracy']:.4f}",
                 xlabel="predicted class", ylabel="actual class")
        if len(names) <= 100:  # more could not be read
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_yticks(range(len(names)), names)
            for row, column in counts.nonzero().tolist():
                axes.text(column, row, int(counts[row, column]), ha="center", va="center",
                          color="white" if fractions[row, column] > 0.5 else "black")

    wrong = (~correct).nonzero().flatten()
    with picture(out / "mistakes.png", 12, 10) as figure:
        figure.suptitle(f"The most confident of {len(wrong):,} mistakes, as the network saw them")
        for place, index in enumerate(wrong[confidence[wrong].argsort(descending=True)][:15], 1):
            axes = figure.add_subplot(3, 5, place)
            axes.axis("off")
            axes.imshow(photos.pixels[index[None]][0])
            axes.set_title(f"{names[photos.labels[index]]}, predicted {names[predicted[index]]}\n"
                           f"({100 * confidence[index]:.0f} %) {paths[index]}", fontsize=8)

    bins = (confidence * BINS).long().clamp(0, BINS - 1)
    with picture(out / "reliability.png", 6, 6) as figure:
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], "--", color="grey", label="perfectly calibrated")
        for each in bins.unique():
            hits, mean = correct[bins == each], confidence[bins == each].mean()
            axes.plot([mean, mean], wilson_interval(int(hits.sum()), len(hits)), color="C0")
            axes.plot(mean, hits.double().mean(), "o", color="C0")
        axes.set(title="With 95 % intervals", xlabel="confidence", ylabel="fraction correct")
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1))  # below the axes


def main(args: argparse.Namespace) -> None:
    global store
    if WORLD_SIZE > 1:  # let the processes that torchrun started talk to each other
        warnings.filterwarnings("ignore", message="Grad strides|`broadcast_buffers`")  # harmless
        if gpus := torch.cuda.is_available():
            torch.cuda.set_device(LOCAL_RANK % torch.cuda.device_count())
        store, rank, world_size = next(distributed.rendezvous("env://"))
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo", store=store, rank=rank,
            world_size=world_size, timeout=timedelta(days=1))  # a download can take hours
    if RANK > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - rank 0 prints
    try:
        torch.set_num_threads(min(torch.get_num_threads(), count_cores()))
        (demo if args.demo else evaluate if args.evaluate else
         classify if args.predict else fine_tune)(args)
        if WORLD_SIZE > 1:
            distributed.destroy_process_group()
    except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if store and store.add("said", 0):
            sys.exit(2)  # this process waited for one that has ended
        if not re.search("MemoryError|out of memory|allocate memory|start new thread", repr(error)):
            raise
        raise InputError(f"too little memory or threads ({error}): lower --workers, or "
                         "in a new run --batch-size or --image-size") from None


if __name__ == "__main__":
    end_on_signals()
    # Only the first process that fails says why.
    with disk.exit_codes(silent=lambda error: store.add("said", 1) > 1 if store else RANK > 0):
        main(get_args())
