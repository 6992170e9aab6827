"""The benchmarks' models and images: made here, seeded, so that anyone gets the same."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from helpers import export
from helpers.architectures import Architecture
from helpers.bundle import Bundle, InputSpec
from helpers.storage import open_storage

IMAGENET = {"color": "rgb", "mean": (123.675, 116.28, 103.53), "std": (58.395, 57.12, 57.375)}


def make_images(folder: Path, count: int, seed: int = 0) -> Path:
    """Write JPEG photographs' like: 320 to 1,280 pixels, about 100 KB each."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        path = folder / f"{i:05d}.jpg"
        if not path.exists():
            path.write_bytes(_jpeg(np.random.default_rng([seed, i])))
    return folder


def _jpeg(rng: np.random.Generator) -> bytes:
    width, height = rng.integers(320, 1281, 2)
    # Smooth colours, edges and grain: what a photograph's compressed size and decoding time come from.
    image = cv2.resize(rng.integers(0, 256, (12, 12, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(12):
        centre, axes = rng.integers(0, (width, height)), rng.integers(10, 160, 2)
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        cv2.ellipse(image, centre, axes, int(rng.integers(0, 180)), 0, 360, colour, -1)
    noise = rng.normal(0, 9, image.shape).astype(np.float32)
    image = np.clip(image + cv2.GaussianBlur(noise, (0, 0), 0.8), 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()


def make_bundle(name: str, folder: Path) -> Bundle:
    """Export a network with seeded weights: `light` (MobileNet-v3-large, 224) or `heavy` (ResNet-50, 550)."""
    import torch
    import torchvision

    builders: dict[str, tuple[Callable, int]] = {
        "light": (torchvision.models.mobilenet_v3_large, 224),
        "heavy": (torchvision.models.resnet50, 550),
    }
    build, side = builders[name]
    torch.manual_seed(0)
    network = spread_activations(build(num_classes=1000), side)
    architecture = Architecture(
        name=name,
        task="classification",
        build=build,
        input=InputSpec(height=side, width=side, **IMAGENET),
        outputs=("logits",),
        labels=tuple(f"class {i}" for i in range(1000)),
        postprocess={"top_k": 3},
    )
    checkpoint = folder / f"{name}.pt"
    torch.save(network.state_dict(), checkpoint)
    model = export.to_openvino(export.simplify(export.to_onnx(network, architecture)), architecture)
    return export.make_bundle(model, architecture, checkpoint, open_storage(str(folder / name)), "fp16")


def spread_activations(network, side: int):
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
