#!/usr/bin/env python3
"""What each freezing depth costs for ResNet50: the table of Q2.md.

    python tests/benchmark_freezing.py

It counts rather than measures, so the figures are the same on every machine.

Parameters are those that learn. Arithmetic is billions of floating-point operations (a multiply-add
is two) for one photo in one training step, forward and backward, counted by
torch.utils.flop_counter. Activations are what autograd keeps of one photo for the backward pass.
Optimiser memory is a gradient and Adam's two averages for every parameter that learns. Everything
is float32.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from Q3 import FineTuned, build_network

LEARNING = {9: "fc", 7: "layer4, fc", 6: "layer3, layer4, fc", 5: "layer2 to fc",
            4: "layer1 to fc", 0: "everything"}


def measure(freeze: int, size: int, batch: int = 4) -> tuple[int, float, float]:
    """Parameters that learn; GFLOP and bytes of kept activations a photo, of one training step."""
    network = build_network("resnet50", None, 10)
    model = FineTuned(network, freeze, torch.device("cpu")).train()
    pixels = torch.zeros(batch, size, size, 3, dtype=torch.uint8)
    own = {tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    kept = {}  # address: bytes; a tensor that two operations keep counts once

    def keep(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(model.maps(pixels).permute(0, 3, 1, 2))
            loss = F.cross_entropy(logits, torch.arange(batch))
        loss.backward()
    parameters = sum(value.numel() for value in network.parameters() if value.requires_grad)
    return parameters, counter.get_total_flops() / batch / 1e9, sum(kept.values()) / batch


def get_args_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=224, metavar="N", help="(default: 224)")
    return parser


def main() -> None:
    args = get_args_parser().parse_args()
    print("| Frozen children | Learning | Parameters | GFLOP a photo | Activations a photo "
          "| Optimiser memory |\n|-:|-|-:|-:|-:|-:|")
    for freeze, learning in LEARNING.items():
        parameters, gflop, activations = measure(freeze, args.image_size)
        print(f"| {freeze} | {learning} | {parameters:,} | {gflop:.1f} | {activations / 1e6:.1f} MB"
              f" | {parameters * 12 / 1e6:.0f} MB |")


if __name__ == "__main__":
    main()
