"""Images and models to measure with: made here, seeded, so that anyone gets the same."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from helpers.models.bundle import Bundle, InputSpec, load_bundle
from helpers.storage import open_storage

IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
NETWORKS = {"light": ("mobilenet_v3_large", 224), "heavy": ("resnet50", 550)}  # of torchvision, and the input's side


def make_photographs(folder: Path, count: int, seed: int = 0, sides: tuple[int, int] = (320, 1280)) -> Path:
    """Write JPEG files that are to a decoder what photographs are; files that are there already are kept.

    Args:
        folder: where `00000.jpg` and so on go.
        count: how many.
        seed: of the pictures.
        sides: the smallest and largest width and height in pixels; by default a file has about 100 KB.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        path = folder / f"{i:05d}.jpg"
        if not path.exists():
            path.write_bytes(_jpeg(np.random.default_rng([seed, i]), sides))
    return folder


def make_bundle(name: str, folder: Path) -> Bundle:
    """Export a network with seeded weights, or load it where it is already.

    Args:
        name: `light` (MobileNet-v3-large, 224 x 224) or `heavy` (ResNet-50, 550 x 550).
        folder: where the bundle's folder of that name goes.
    """
    target = open_storage(str(folder / name))
    if target.exists("manifest.json"):
        return load_bundle(target)
    import torch
    import torchvision

    from helpers.models import export
    from helpers.models.architectures import Architecture

    network_name, side = NETWORKS[name]
    build: Callable = getattr(torchvision.models, network_name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = _spread_activations(build(num_classes=1000), side)
    architecture = Architecture(
        name=name,
        task="classification",
        build=build,
        input=InputSpec(height=side, width=side, color="rgb", mean=IMAGENET_MEAN, std=IMAGENET_STD),
        outputs=("logits",),
        labels=tuple(f"class {i}" for i in range(1000)),
        postprocess={"top_k": 3},
    )
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"{name}.pt"
    torch.save(network.state_dict(), checkpoint)
    model = export.to_openvino(export.simplify(export.to_onnx(network, architecture)), architecture)
    return export.make_bundle(model, architecture, checkpoint, target, "fp16")


def _jpeg(rng: np.random.Generator, sides: tuple[int, int]) -> bytes:
    width, height = rng.integers(sides[0], sides[1] + 1, 2)
    # Smooth colours, edges and grain: what a photograph's compressed size and decoding time come from.
    image = cv2.resize(rng.integers(0, 256, (12, 12, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(12):
        centre, axes = rng.integers(0, (width, height)).tolist(), rng.integers(10, 160, 2).tolist()
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        cv2.ellipse(image, centre, axes, int(rng.integers(0, 180)), 0, 360, colour, -1)
    noise = np.asarray(rng.normal(0, 9, image.shape), np.float32)
    image = np.clip(image + cv2.GaussianBlur(noise, (0, 0), 0.8), 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()


def _spread_activations(network: Any, side: int) -> Any:
    """Give random weights outputs that differ from image to image, so that comparing them means something."""
    import torch

    images = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(0))
    images += torch.linspace(-1, 1, 8)[:, None, None, None]
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # running statistics become those of the batches below
    with torch.no_grad():
        network.train()(images)
        logits = network.eval()(images)
        last = [module for module in network.modules() if isinstance(module, torch.nn.Linear)][-1]
        last.weight *= 3 / (logits - last.bias).std()
    return network
