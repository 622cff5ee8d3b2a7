#!/usr/bin/env python3
"""Fine-tune an ImageNet ResNet50 on the ten classes of iNaturalist-12K.

    python Q3.py

The script reads from top to bottom in the order in which a run happens:

    photos -> split -> pixels -> network -> optimiser -> epochs -> test -> files

The first six children of the network (conv1 to layer2) stay as ImageNet left them, its last layer is replaced by one
for ten classes and learns fast, and the layers between learn slowly. The best epoch on the validation photos is tested
once. Which photos there are, and which is in which part, is dataset_split.py's business; a list of (file, label) is
all that comes from there.
"""

import argparse
import csv
import io
import json
import math
import os
import platform
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
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
                       help="photos are resized to N x N pixels (default: 224)")
    group.add_argument("--workers", type=number(int, 1, 1024), metavar="N",
                       help="threads that decode photos (default: one for each core)")

    group = parser.add_argument_group("network")
    group.add_argument("--weights", default="IMAGENET1K_V2", metavar="SPEC",
                       help="where training starts: a torchvision name (IMAGENET1K_V1, IMAGENET1K_V2), the path of a "
                            "ResNet50 state dict, or none for random weights (default: IMAGENET1K_V2)")
    group.add_argument("--freeze", type=number(int, 0, 9), default=6, metavar="N",
                       help="the first N of conv1, bn1, relu, maxpool, layer1, layer2, layer3, layer4, avgpool stay as "
                            "they are; 9: only fc learns (default: 6)")

    group = parser.add_argument_group("training")
    group.add_argument("--recipe", choices=("tuned", "reference"), default="tuned",
                       help="reference: plain Adam, photos squashed to a square, constant learning rates; tuned: what "
                            "measured best, which is still the reference recipe (default: tuned)")
    group.add_argument("--epochs", type=number(int, 1, 10**6), default=5, metavar="N",
                       help="passes over the training photos (default: 5)")
    group.add_argument("--batch-size", type=number(int, 1, 10**6), default=64, metavar="N",
                       help="photos a step at most; an epoch's steps share its photos evenly (default: 64)")
    group.add_argument("--lr-head", type=number(float, 0, 100, open_low=True), default=1e-3, metavar="LR",
                       help="learning rate of fc, which starts from noise (default: 1e-3)")
    group.add_argument("--lr-backbone", type=number(float, 0, 100, open_low=True), default=1e-4, metavar="LR",
                       help="learning rate of the other layers that learn (default: 1e-4)")

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
    if args.image_size == 32 and args.batch_size <= 2 and args.freeze < 8:
        parser.error(f"--batch-size {args.batch_size} with --image-size 32 can leave layer4's BatchNorm a single value "
                     "to take the mean of: raise one of them")
    return args


if __name__ == "__main__":
    args = get_args()  # a mistyped option and --help are answered here, before the seconds that torch takes to load

import numpy as np
import torch
import torchvision
from PIL import Image, UnidentifiedImageError
from torch import nn
from torch.nn import functional as F
from torchvision.models import ResNet50_Weights, resnet50
from tqdm import tqdm

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's red, green and blue, in [0, 1]
CHECKPOINT_FORMAT = 1


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# ---------------------------------------------------------------------------------------------------------------------
# The machine
# ---------------------------------------------------------------------------------------------------------------------

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
    return torch.device(name)


def pick_precision(amp: str, device: torch.device) -> torch.dtype:
    """The type that matrix products and convolutions are computed in; float32 means no mixed precision.

    auto is bfloat16 where the hardware multiplies in it, float16 on the NVIDIA GPUs before that (Volta, Turing), and
    float32 elsewhere: a CPU that only emulates bfloat16 is many times slower with it (measured: 10.3 photos/s forward
    in float32, 1.6 in bfloat16, on an AVX2 machine).

    Raises:
        InputError: float16 on a CPU, which is slower still.
    """
    if amp == "fp16" and device.type == "cpu":
        raise InputError("--amp fp16 is for GPUs: on a CPU give --amp bf16 or off")
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


# ---------------------------------------------------------------------------------------------------------------------
# Photos: files -> uint8 pixels, once -> normalised batches on the device
# ---------------------------------------------------------------------------------------------------------------------

UPRIGHT = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
           5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
           8: Image.Transpose.ROTATE_90}  # what undoes each value of EXIF's orientation tag, 0x0112


def read_photo(file: Path, size: int) -> np.ndarray:
    """A photo as the network sees it: upright, RGB, squashed to a square.

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
            return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))
    except UnidentifiedImageError:
        raise InputError(f"'{file}' is no photo, whatever its name says: replace or remove it") from None
    except Exception as error:  # for a damaged file Pillow raises nearly anything: OSError, SyntaxError, struct.error
        raise InputError(f"photo '{file}' can't be read ({first_line(error)}): replace or remove it") from None


def orientation(image: Image.Image) -> int:
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # a photo with damaged EXIF data is still a photo
        return 1


def decode(files: list[Path], size: int, workers: int, folder: Path) -> torch.Tensor:
    """Decode every photo once, in several threads, into a file without a name that is gone with the run.

    Threads rather than processes, because Pillow lets them run side by side (two cores, photos of 800 x 600: 144
    photos/s with one thread, 272 with two, 222 with two processes). A few at a time, so that few wait to be written.

    Args:
        folder: where that file lies: it takes size * size * 3 bytes a photo, on disk rather than in memory.

    Returns:
        uint8 tensor (photos, size, size, 3), mapped from the file.

    Raises:
        InputError: a photo can't be read, or the disk is full.
    """
    warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # of odd metadata; the pixels are fine
    try:
        with (tempfile.TemporaryFile(dir=folder) as store, ThreadPoolExecutor(workers) as pool,
              tqdm(desc="decoding", total=len(files), unit="photo", leave=False, disable=None) as progress):
            few = 16 * workers
            for start in range(0, len(files), few):
                for pixels in pool.map(partial(read_photo, size=size), files[start:start + few]):
                    store.write(pixels)
                    progress.update()
            store.flush()
            return torch.from_numpy(np.memmap(store, np.uint8, "r+", shape=(len(files), size, size, 3)))
    except OSError as error:
        raise InputError(f"the decoded photos can't be kept in '{folder}' ({error.strerror}): {len(files):,} of them "
                         f"take {len(files) * size * size * 3 / 1e6:,.0f} MB. --out chooses another disk") from None


def batches(pixels: torch.Tensor, labels: torch.Tensor, order: torch.Tensor, batch_size: int, device: torch.device,
            title: str):
    """Go once through the photos in the given order, in steps of at most `batch_size`, all of nearly the same size
    (65 photos make 33 + 32 rather than 64 + 1: one photo alone is a poor gradient, and no BatchNorm statistics).

    Args:
        pixels: uint8 (photos, size, size, 3).
        order: int64, the rows of `pixels` and `labels` to go through.
        title: what the progress bar says, where standard error is a terminal.

    Yields:
        Normalised photos, float32 (batch, 3, size, size), and labels, int64 (batch,).
    """
    mean = torch.tensor(MEAN, device=device).view(3, 1, 1)
    std = torch.tensor(STD, device=device).view(3, 1, 1)
    steps = order.tensor_split(math.ceil(len(order) / batch_size))
    for rows in tqdm(steps, desc=title, unit="step", leave=False, disable=None):
        images = pixels[rows].to(device).permute(0, 3, 1, 2).float() / 255
        yield ((images - mean) / std).contiguous(memory_format=layout(device)), labels[rows].to(device)


def epoch_order(photos: int, seed: int, epoch: int) -> torch.Tensor:
    """A shuffle of range(photos), int64, that depends on seed and epoch alone."""
    return torch.randperm(photos, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


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
        network.load_state_dict(backbone_state(state, network, spec), strict=False)
    network.fc = nn.Linear(network.fc.in_features, classes)
    return network


def backbone_state(state, network: nn.Module, spec: str) -> dict[str, torch.Tensor]:
    """All of a state dict that training starts from: not fc, which is replaced, nor BatchNorm's counts of batches.

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

    def relevant(tensors):
        return {name: tensor for name, tensor in tensors.items()
                if not name.startswith("fc.") and not name.endswith("num_batches_tracked")}

    given, needed = relevant(state), relevant(network.state_dict())
    if given.keys() != needed.keys():
        raise InputError(f"--weights '{spec}' is not of a ResNet50: "
                         f"{differences(given, needed, 'the file', 'ResNet50')}")
    for name, value in needed.items():
        if given[name].shape != value.shape:
            raise InputError(f"--weights '{spec}' is not of a ResNet50: {name} is "
                             f"{tuple(given[name].shape)} in the file and {tuple(value.shape)} in ResNet50")
    return given


class FineTuned(nn.Module):
    """A ResNet cut in three: a trunk that is frozen, a backbone that learns slowly, a head that learns fast.

    Frozen means more than "no gradients": BatchNorm in train mode goes on averaging the statistics of every batch, so
    the trunk stays in eval mode whatever mode the others are in.
    """

    def __init__(self, network: nn.Module, freeze: int, precision: torch.dtype = torch.float32):
        super().__init__()
        self.network = network  # the same layers under torchvision's names, for checkpoints
        *children, self.head = network.children()
        self.trunk = nn.Sequential(*children[:freeze]).requires_grad_(False)
        self.backbone = nn.Sequential(*children[freeze:])
        self.precision = precision

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    def train(self, mode: bool = True):
        super().train(mode)
        self.trunk.eval()
        return self

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Photos (batch, 3, size, size) -> logits, float32 (batch, classes)."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            with torch.no_grad():
                maps = self.trunk(images)  # (batch, 512, size / 8, size / 8) behind six children
            features = self.backbone(maps).flatten(1)  # (batch, 2048)
            return self.head(features).float()


# ---------------------------------------------------------------------------------------------------------------------
# The optimiser: a fast head, a slow backbone
# ---------------------------------------------------------------------------------------------------------------------

def build_optimizer(model: FineTuned, lr_head: float, lr_backbone: float) -> torch.optim.Optimizer:
    """Adam over exactly the parameters that learn, in two groups: the head's and the backbone's."""
    return torch.optim.Adam([{"params": list(model.head.parameters()), "lr": lr_head},
                             {"params": list(model.backbone.parameters()), "lr": lr_backbone}])


# ---------------------------------------------------------------------------------------------------------------------
# Epochs
# ---------------------------------------------------------------------------------------------------------------------

def train_epoch(model: nn.Module, loader, optimizer: torch.optim.Optimizer,
                scaler: torch.amp.GradScaler) -> tuple[float, float]:
    """One pass over the training photos.

    Returns:
        Mean loss and accuracy of the photos as they were when the network met them (it learns meanwhile, so they lag
        behind what it can do at the end of the epoch).
    """
    model.train()
    loss_sum, correct, count = 0.0, 0, 0
    for images, labels in loader:
        logits = model(images)
        losses = F.cross_entropy(logits, labels, reduction="none")
        optimizer.zero_grad()
        scaler.scale(losses.mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        loss_sum += losses.detach().sum()
        correct += (logits.argmax(1) == labels).sum()
        count += len(labels)
    return float(loss_sum) / count, float(correct) / count


@torch.inference_mode()
def predict(model: nn.Module, loader) -> torch.Tensor:
    """Logits of every photo, float32 (photos, classes), on the CPU."""
    model.eval()
    return torch.cat([model(images) for images, _ in loader]).cpu()


def loss_and_accuracy(logits: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Mean cross-entropy, and the part of the photos whose largest logit is their label's."""
    return F.cross_entropy(logits, labels).item(), (logits.argmax(1) == labels).double().mean().item()


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


def parameter_counts(network: nn.Module) -> dict:
    counts = {True: 0, False: 0}
    for parameter in network.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    return {"trainable_parameters": counts[True], "frozen_parameters": counts[False]}


def print_banner(config: dict) -> None:
    options, photos = config["options"], config["photos"]
    steps = math.ceil(photos["train"] / options["batch_size"])
    print(f"Photos      {photos['train']:,} training, {photos['val']:,} validation, {photos['test']:,} test; "
          f"{len(config['classes'])} classes ({options['data']})\n"
          f"Network     ResNet50 from {options['weights']}, {options['image_size']} x {options['image_size']} pixels\n"
          f"Parameters  {config['trainable_parameters']:,} trainable, {config['frozen_parameters']:,} frozen "
          f"(the first {options['freeze']} of 10 children)\n"
          f"Device      {config['device']} ({config['device_name']}), {config['precision']}\n"
          f"Steps       {steps} an epoch, {steps * options['epochs']:,} in {options['epochs']} epochs\n"
          f"Results     {options['out']}\n", flush=True)


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

def load_split(args: argparse.Namespace) -> tuple[dict, dict[str, list[tuple[Path, int]]]]:
    """The manifest, and the (file, label) pairs of "train", "val" and "test". No photo is opened.

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
    return manifest, {"train": labelled(data / "train", manifest["train"], classes),
                      "val": labelled(data / "train", manifest["val"], classes),
                      "test": labelled(data / "val", test_paths, classes)}


def fit(model: FineTuned, manifest: dict, parts: dict, args: argparse.Namespace, config: dict) -> None:
    """Train. After each epoch write last.pt, history.csv and, if it is the best so far, best.pt; then print its row.

    Raises:
        InputError: a photo can't be read, a file can't be written, or the loss is no longer finite.
    """
    train, val = parts["train"], parts["val"]
    pixels = decode([file for file, _ in train + val], args.image_size, args.workers, args.out)
    labels = torch.tensor([label for _, label in train + val])
    in_train, in_val = torch.arange(len(labels)).split([len(train), len(val)])
    write_json(args.out / "config.json", config)  # from here on the folder holds a run
    write_manifest(manifest, args.out / "split.json")

    optimizer = build_optimizer(model, args.lr_head, args.lr_backbone)
    scaler = torch.amp.GradScaler(model.device.type, enabled=model.precision == torch.float16)
    print("Epoch | Train Loss | Train Acc | Val Loss | Val Acc", flush=True)
    history, best = [], None
    for epoch in range(1, args.epochs + 1):
        start = time.perf_counter()
        order = in_train[epoch_order(len(train), args.seed, epoch)]
        loader = batches(pixels, labels, order, args.batch_size, model.device, f"epoch {epoch}/{args.epochs}")
        train_loss, train_acc = train_epoch(model, loader, optimizer, scaler)
        train_seconds = time.perf_counter() - start
        loader = batches(pixels, labels, in_val, args.batch_size, model.device, "validation")
        val_loss, val_acc = loss_and_accuracy(predict(model, loader), labels[in_val])
        if not math.isfinite(train_loss + val_loss):
            raise InputError(f"the loss of epoch {epoch} is not a finite number: lower --lr-head and --lr-backbone, "
                             f"or try --amp off. Files of earlier epochs are in '{args.out}'")

        history.append({"epoch": epoch, "train_loss": train_loss, "train_acc": train_acc, "val_loss": val_loss,
                        "val_acc": val_acc, "lr_head": args.lr_head, "lr_backbone": args.lr_backbone,
                        "seconds": time.perf_counter() - start, "images_per_second": len(train) / train_seconds})
        checkpoint = {"format": CHECKPOINT_FORMAT, "architecture": "resnet50", "model": model.network.state_dict(),
                      **{key: config[key] for key in ("classes", "preprocessing", "options")}, "epoch": epoch,
                      "history": history, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        save_checkpoint(args.out / "last.pt", checkpoint)
        if best is None or (val_acc, -val_loss) > (best["val_acc"], -best["val_loss"]):
            best = history[-1]
            save_checkpoint(args.out / "best.pt", checkpoint)
        write_csv(args.out / "history.csv", history)
        print(f"{epoch:5} | {train_loss:10.4f} | {train_acc:9.4f} | {val_loss:8.4f} | {val_acc:7.4f}", flush=True)


def test(model: FineTuned, photos: list[tuple[Path, int]], args: argparse.Namespace) -> None:
    """Score best.pt on the test photos, which nothing has opened so far; write test.json and predictions.csv."""
    checkpoint = torch.load(args.out / "best.pt", map_location=model.device, weights_only=True)
    model.network.load_state_dict(checkpoint["model"])
    classes = checkpoint["classes"]
    try:
        pixels = decode([file for file, _ in photos], args.image_size, args.workers, args.out)
    except InputError as error:
        raise InputError(f"{error}. Training is done, and its best epoch is safe in '{args.out / 'best.pt'}'") from None
    labels = torch.tensor([label for _, label in photos])
    logits = predict(model, batches(pixels, labels, torch.arange(len(photos)), args.batch_size, model.device, "test"))

    report = {"epoch": checkpoint["epoch"], **test_report(logits, labels, classes)}
    write_json(args.out / "test.json", report)
    confidence, predicted = logits.softmax(1).max(1)
    write_csv(args.out / "predictions.csv", [
        {"path": file.relative_to(args.data / "val").as_posix(), "label": classes[label],
         "predicted": classes[guess], "confidence": f"{share:.6f}"}
        for (file, label), guess, share in zip(photos, predicted.tolist(), confidence.tolist())])
    print_report(report)


def main(args: argparse.Namespace) -> None:
    # Photos and split: which file is in which part, with which label.
    manifest, parts = load_split(args)
    classes = manifest["classes"]

    # Network and precision.
    device = pick_device(args.device)
    precision = pick_precision(args.amp, device)
    torch.backends.cudnn.deterministic = True  # the same seed, the same run
    torch.manual_seed(args.seed)  # for the first weights of fc
    network = build_network(args.weights, len(classes)).to(device, memory_format=layout(device))
    model = FineTuned(network, args.freeze, precision)

    # What is going to happen, on the screen and in the run's folder.
    args.out = claim_folder(args.out)
    args.workers = args.workers or torch.get_num_threads()
    config = {"options": {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()},
              "classes": classes, "photos": {part: len(photos) for part, photos in parts.items()},
              "preprocessing": {"image_size": args.image_size, "resize": "squash", "interpolation": "bilinear",
                                "mean": list(MEAN), "std": list(STD)},
              **machine(device, precision), **parameter_counts(network)}
    print_banner(config)

    # Epochs, then the test of the best one.
    fit(model, manifest, parts, args, config)
    test(model, parts["test"], args)
    print(f"\nCheckpoints, history and predictions: {args.out}")


if __name__ == "__main__":
    sys.exit(run(lambda: main(args)))
