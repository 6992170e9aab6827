"""Networks of torchvision and timm, described by what these libraries know of them, for which nothing is fetched.

The weights are the library's own, which it fetches, or a user's checkpoint.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from helpers.errors import BundleError, HostError, first_line
from helpers.export.architectures import Architecture
from helpers.export.cards import Entries, merge, nearest, parse_card, read_entries

GRAY_LEVELS = 255.0  # libraries normalize images of 0 to 1
LONGEST = 4  # times its shorter side, a longer image is made smaller, so that memory has a bound
EPSILON = 1e-5  # of a batch normalization
# Their published weights are for normalizations with an epsilon of 0, and without counts of batches.
WITHOUT_EPSILON = [f"{name}_resnet50_fpn" for name in ("fasterrcnn", "keypointrcnn", "maskrcnn", "retinanet")]
DETECTORS = {  # by their output beyond boxes: task, decoder, roles
    "": ("detection", "end_to_end", ()),
    "masks": ("instance_segmentation", "mask_rcnn", ("masks",)),
    "keypoints": ("keypoints", "end_to_end", ("keypoints", "keypoint_scores")),
}


class Detector(nn.Module):
    """A detector of torchvision as a graph: one image in, boxes in that image's pixels out.

    The network, which takes a list of images and returns a dictionary per image, resizes and normalizes the image
    itself, and chooses the boxes. Masks stay as small as it gives them, since each would be as large as the image.
    `others` are what the dictionary has beside boxes, scores and labels.
    """

    def __init__(self, network: Any, others: Sequence[str]):
        super().__init__()
        self.network, self.others = network, others
        network.transform.postprocess = partial(_keep_masks, network.transform.postprocess)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Float32 `[1, 3, H, W]` of 0 to 1 to boxes `[1, N, 4]`, scores and classes `[1, N]`, and the others."""
        (detections,) = self.network([images[0]])
        # Networks without a class for the background number all classes as the others do; 0 is none.
        rows = torch.where(detections["labels"] > 0)[0]
        outputs = [detections[name][rows] for name in ("boxes", "scores", "labels", *self.others)]
        return tuple(output.float().unsqueeze(0) for output in outputs)


class Segmenter(nn.Module):
    """A semantic segmentation of torchvision without its dictionary: `[B, 3, H, W]` to `[B, classes, H, W]`."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns the logits at the images' size."""
        return self.network(images)["out"]


def describe(name: str, card: Path | None = None) -> Architecture:
    """Describe a library's network, `torchvision:NAME` or `timm:NAME`.

    The card changes what the library says; its labels are the classes of a checkpoint. Raises BundleError if there is
    no such network, or no task for it, or the card is wrong, and HostError if the library is not installed.
    """
    library, _, network = name.partition(":")
    describe_network = _describe_timm if library == "timm" else _describe_torchvision
    return describe_network(network, read_entries(card) if card else {}, card or name)


def _describe_torchvision(name: str, changes: Entries, origin: Any) -> Architecture:
    from torchvision import models

    known = models.list_models()
    if name not in known:
        raise BundleError(f"torchvision has no network {name!r}{nearest(name, known, cutoff=0.6)}")
    weights: Any = models.get_model_weights(name).DEFAULT
    kind = type(weights.transforms()).__name__
    if kind not in DESCRIPTIONS or name.startswith("quantized_"):
        raise BundleError(f"torchvision's {name} is for {kind}, and there is no task here for it")
    entries, options = DESCRIPTIONS[kind](name, weights)
    build = partial(_build_torchvision, name, len(changes.get("labels", ())))
    return Architecture.of_card(
        name,
        parse_card(merge(entries, changes), origin),
        build=build,
        build_pretrained=partial(_fetch, lambda: models.get_model(name, weights=weights), f"torchvision:{name}"),
        weights=str(weights),
        **options,
    )


def _build_torchvision(name: str, labels: int) -> nn.Module:
    """Build a network without fetching anything; of so many labels, or with 0 of its own."""
    from torchvision import models

    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None
    if labels:
        has_background = type(models.get_model_weights(name).DEFAULT.transforms()).__name__ == "ObjectDetection"
        options["num_classes"] = labels + has_background
    if name in ("googlenet", "inception_v3"):
        # They were trained with another normalization, and have a way around it.
        options |= {"transform_input": True, "init_weights": False}
    return models.get_model(name, **options)


def _describe_classifier(name: str, weights: Any) -> tuple[Entries, dict[str, Any]]:
    rule = weights.transforms()
    (side,), (shorter,) = rule.crop_size, rule.resize_size
    entries = {
        "task": "classification",
        "labels": weights.meta["categories"],
        "input": {"height": side, "width": side, "resize": "crop", "resize_size": shorter, **_normalization(rule)},
    }
    return entries, {"outputs": ("logits",)}


def _describe_segmenter(name: str, weights: Any) -> tuple[Entries, dict[str, Any]]:
    rule = weights.transforms()
    (shorter,) = rule.resize_size
    size = {"height": shorter, "width": LONGEST * shorter, "resize": "shortest_edge"}
    entries = {
        "task": "semantic_segmentation",
        "decoder": "logits",
        "labels": weights.meta["categories"],
        "input": {**size, **_normalization(rule)},
        "postprocess": {"background": 0},
    }
    return entries, {"outputs": ("scores",), "export_module": Segmenter, "adapt_state_dict": _without_auxiliary}


def _describe_detector(name: str, weights: Any) -> tuple[Entries, dict[str, Any]]:
    other = "keypoints" if "keypoint" in name else "masks" if "mask" in name else ""
    task, decoder, roles = DETECTORS[other]
    with torch.device("meta"):
        transform: Any = _build_torchvision(name, 0).transform
    width, height = transform.fixed_size or (transform.max_size, transform.min_size[-1])
    entries = {
        "task": task,
        "decoder": decoder,
        "labels": weights.meta["categories"][1:],
        "input": {"height": height, "width": width, "color": "rgb", "std": [GRAY_LEVELS] * 3, "resize": "none"},
        "postprocess": {"first_class": 1},
    }
    others = tuple("keypoints_scores" if role == "keypoint_scores" else role for role in roles)
    return entries, {
        "outputs": ("boxes", "scores", "classes", *roles),
        "export_module": partial(Detector, others=others),
        "adapt_state_dict": _without_epsilon if name in WITHOUT_EPSILON else _count_batches,
    }


DESCRIPTIONS: Mapping[str, Callable[[str, Any], tuple[Entries, dict[str, Any]]]] = {
    "ImageClassification": _describe_classifier,
    "SemanticSegmentation": _describe_segmenter,
    "ObjectDetection": _describe_detector,
}


def _describe_timm(name: str, changes: Entries, origin: Any) -> Architecture:
    try:
        import timm
    except ImportError:
        raise HostError("timm is not installed: pip install timm, and export again") from None
    if not timm.is_model(name):
        raise BundleError(f"timm has no network {name!r}{nearest(name, timm.list_models(), cutoff=0.6)}")
    known: Any = timm.get_pretrained_cfg(name)
    rule = timm.data.resolve_data_config(pretrained_cfg=known.to_dict())
    _, height, width = rule["input_size"]
    size = {"height": height, "width": width, "resize": "crop" if rule["crop_mode"] == "center" else "stretch"}
    if size["resize"] == "crop":
        size["resize_size"] = int(min(height, width) / rule["crop_pct"])
    interpolation = "linear" if rule["interpolation"] == "bilinear" else "cubic"
    classes = known.num_classes or 0
    entries = {
        "task": "classification" if classes else "embedding",
        "labels": _labels_of_timm(known, classes),
        "input": {**size, **_scale(rule["mean"], rule["std"]), "interpolation": interpolation, "antialias": True},
    }
    labels = changes.get("labels", ())
    options: dict[str, Any] = {"num_classes": len(labels)} if labels else {}
    return Architecture.of_card(
        name,
        parse_card(merge(entries, changes), origin),
        outputs=("logits",) if classes else ("embedding",),
        build=partial(timm.create_model, name, **options),
        build_pretrained=partial(_fetch, partial(timm.create_model, name, pretrained=True), f"timm:{name}"),
        weights=f"timm {name} {known.tag}",
    )


def _labels_of_timm(known: Any, classes: int) -> list[str]:
    """The names of the classes where timm has them, otherwise their numbers."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(known.to_dict())
    if not subset:
        return [str(number) for number in range(classes)]
    info = ImageNetInfo(subset)
    return [info.index_to_description(number) for number in range(classes)]


def _normalization(rule: Any) -> Entries:
    interpolation = {"bilinear": "linear", "bicubic": "cubic"}[rule.interpolation.value]
    return {**_scale(rule.mean, rule.std), "interpolation": interpolation, "antialias": bool(rule.antialias)}


def _scale(mean: Sequence[float], std: Sequence[float]) -> Entries:
    """Mean and standard deviation of 0 to 1 in gray levels."""
    levels = {"mean": [GRAY_LEVELS * value for value in mean], "std": [GRAY_LEVELS * value for value in std]}
    return {"color": "rgb" if len(mean) == 3 else "gray", **levels}


def _fetch(build: Callable[[], nn.Module], name: str) -> nn.Module:
    try:
        return build()
    except Exception as error:  # what a library raises that reaches no server
        problem = f"the weights of {name} cannot be fetched ({first_line(error)})"
        raise BundleError(f"{problem}: name a file of them with --checkpoint") from None


def _keep_masks(postprocess: Callable[..., Any], result: list[dict[str, Any]], *sizes: Any) -> list[dict[str, Any]]:
    """What follows torchvision's detectors, but for the enlargement of masks."""
    masks = [detections.pop("masks", None) for detections in result]
    done = zip(postprocess(result, *sizes), masks, strict=True)
    return [detections if own is None else {**detections, "masks": own[:, 0]} for detections, own in done]


def _without_auxiliary(weights: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in weights.items() if not str(key).startswith("aux_classifier.")}


def _count_batches(weights: dict[str, Any]) -> dict[str, Any]:
    """Weights with the number of batches that frozen normalizations lack."""
    layers = [key.removesuffix("running_var") for key in weights if str(key).endswith("running_var")]
    return {f"{layer}num_batches_tracked": torch.tensor(0) for layer in layers} | weights


def _without_epsilon(weights: dict[str, Any]) -> dict[str, Any]:
    """Weights whose frozen normalizations have an epsilon of 0, for those that have the usual one."""
    if any(str(key).endswith("num_batches_tracked") for key in weights):
        return weights
    frozen = {key: value - EPSILON for key, value in weights.items() if str(key).endswith("running_var")}
    return _count_batches({**weights, **frozen})
