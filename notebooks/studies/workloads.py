"""Seeded images and models for measurements, so that anyone gets the same."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from helpers.bundle.manifest import Bundle, load_bundle
from helpers.images.spec import InputSpec
from helpers.storage import open_storage

IMAGENET_MEAN, IMAGENET_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)
NETWORKS = {"light": ("mobilenet_v3_large", 224), "heavy": ("resnet50", 550)}  # of torchvision, and the input's side
SIDES = (320, 1280)  # of photographs, the smallest and the largest, in pixels
YOLACT = "yolact_resnet50"
PROBABLE = 12  # anchors per photograph, about, that a YOLACT with arbitrary weights takes for objects


def make_photographs(
    folder: Path, count: int, seed: int = 0, sides: tuple[int, int] = SIDES, different: int | None = None
) -> Path:
    """Write JPEG files that are like photographs to a decoder; existing files are kept.

    Args:
        folder: where `00000.jpg` and so on go.
        count: how many.
        seed: of the pictures.
        sides: the smallest and largest width and height in pixels; by default a file has about 100 KB.
        different: how many are drawn, because drawing takes longer than classification; the others are copies in turn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        path = folder / f"{i:05d}.jpg"
        if different and i >= different:
            shutil.copyfile(folder / f"{i % different:05d}.jpg", path)
        elif not path.exists():
            path.write_bytes(_jpeg(np.random.default_rng([seed, i]), sides))
    return folder


def make_bundle(name: str, folder: Path) -> Bundle:
    """Export a network with seeded weights, or load it if it exists.

    Args:
        name: `light` (MobileNet-v3-large, 224 x 224), `heavy` (ResNet-50, 550 x 550) or `yolact` (the published
            network with a ResNet-50, 550 x 550, of which most photographs have 100 detections, the most there are).
        folder: where the bundle's folder of that name goes.
    """
    target = open_storage(str(folder / name))
    if target.exists("manifest.json"):
        return load_bundle(target)
    import torch

    from helpers.export import conversion as export

    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"{name}.pt"
    network, architecture = _yolact() if name == "yolact" else _classifier(name)
    torch.save(network.state_dict(), checkpoint)
    model = export.to_openvino(export.simplify(export.to_onnx(network, architecture)), architecture)
    return export.make_bundle(model, architecture, checkpoint, target, "fp16")


def _classifier(name: str) -> tuple[Any, Any]:
    """A network of torchvision with seeded weights, and its architecture."""
    import torch
    import torchvision

    from helpers.export.architectures import Architecture

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
    return network, architecture


def _yolact() -> tuple[Any, Any]:
    """YOLACT with seeded weights that keep the signal's size through the layers, and its architecture."""
    import torch
    from torch import nn

    from helpers.export.architectures import get_architecture

    architecture = get_architecture(YOLACT)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: Any = architecture.build()
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # running statistics become those of the photographs below
    spec = architecture.input
    rng = np.random.default_rng(0)
    files = [np.frombuffer(_jpeg(rng, SIDES), np.uint8) for _ in range(6)]
    pictures: list[Any] = [cv2.imdecode(file, cv2.IMREAD_COLOR_RGB) for file in files]
    pixels = np.stack([cv2.resize(picture, (spec.width, spec.height)) for picture in pictures])
    images = torch.from_numpy((pixels - np.array(spec.mean)) / np.array(spec.std)).float().permute(0, 3, 1, 2)
    head = network.prediction_layers[0]
    with torch.inference_mode():
        network.train()(images)
        loc, conf, mask, _, proto = network.eval()(images)
        scale = 2.0 / conf.log().std(dim=2).mean()  # classes that differ enough for one to stand out
        head.conf_layer.weight *= scale
        head.conf_layer.bias *= scale
        conf = (scale * conf.log()).softmax(dim=2)
        head.bbox_layer.weight *= 1.0 / loc.std()
        head.mask_layer.weight *= 0.7 / mask.std()
        network.proto_net[10].weight *= 1.0 / proto.std()
        # For each anchor, the gain of the background that pushes its best class below the threshold.
        best, background = conf[..., 1:].amax(dim=2), conf[..., 0]
        room = best / architecture.postprocess["score_threshold"] - conf[..., 1:].sum(dim=2)
        gain = (room.clamp(min=1e-6) / background).log().flatten().sort(descending=True).values
        classes = len(architecture.labels) + 1
        head.conf_layer.bias.view(-1, classes)[:, 0] += gain[PROBABLE * len(images)]
    return network, architecture


def _jpeg(rng: np.random.Generator, sides: tuple[int, int]) -> bytes:
    width, height = rng.integers(sides[0], sides[1] + 1, 2)
    # Smooth colors, edges and grain decide a photograph's compressed size and decoding time.
    image = cv2.resize(rng.integers(0, 256, (12, 12, 3), np.uint8), (width, height), interpolation=cv2.INTER_CUBIC)
    for _ in range(12):
        center, axes = rng.integers(0, (width, height)).tolist(), rng.integers(10, 160, 2).tolist()
        color = tuple(int(c) for c in rng.integers(0, 256, 3))
        cv2.ellipse(image, center, axes, int(rng.integers(0, 180)), 0, 360, color, -1)
    noise = np.asarray(rng.normal(0, 9, image.shape), np.float32)
    image = np.clip(image + cv2.GaussianBlur(noise, (0, 0), 0.8), 0, 255).astype(np.uint8)
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 85])[1].tobytes()


def _spread_activations(network: Any, side: int) -> Any:
    """Give random weights outputs that differ from image to image, so that a comparison means something."""
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
