"""Networks of torchvision with seeded weights: the pipeline predicts what torchvision itself does."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pytest
import torch
import torchvision
from PIL import Image
from torch import nn

from helpers.bundle.manifest import Bundle
from helpers.errors import BundleError
from helpers.export import checks, library
from helpers.export.architectures import get_architecture
from helpers.export.conversion import export
from helpers.images import rle
from helpers.images.decoding import fit
from helpers.pipeline import stages
from helpers.storage import open_storage
from helpers.tasks import parameters_for

CLASSIFIER = "mobilenet_v3_large"
DETECTORS = ["ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn", "retinanet_resnet50_fpn"]
DETECTORS += ["maskrcnn_resnet50_fpn", "keypointrcnn_resnet50_fpn"]
SEGMENTER = "deeplabv3_mobilenet_v3_large"
NEARBY = 1e-6  # the relative difference of pictures that are the same but for rounding
SIZES = [(240, 360), (300, 210)]  # height, width
# The last layers of heads, and the spread of their outputs that leaves some objects, and most places without.
LAST = {
    r"classifier\.3": 3.0,
    r"classifier\.4|.*cls_score|.*mask_fcn_logits|.*kps_score_lowres": 2.0,
    r".*classification_head\.(cls_logits|module_list\.\d\.1)": 1.5,
    r".*regression_head\.(bbox_reg|module_list\.\d\.1)|rpn\.head\.bbox_pred": 0.3,
    r".*box_predictor\.bbox_pred": 1.0,
}


@dataclass(frozen=True)
class Export:
    """A network, the bundle of it, and pictures as PNG files."""

    network: Any
    bundle: Bundle
    pictures: list[bytes]


def pictures_of(sizes: list[tuple[int, int]]) -> list[np.ndarray]:
    """RGB."""
    sources = checks.generate_pictures(len(sizes))
    return [cv2.resize(p, (w, h))[..., ::-1].copy() for p, (h, w) in zip(sources, sizes, strict=True)]


def to_tensor(picture: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(picture).permute(2, 0, 1).float() / 255


def inputs_of(name: str, pictures: list[np.ndarray]) -> Any:
    if name in DETECTORS:
        return [to_tensor(picture) for picture in pictures]
    rule = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    return torch.stack([rule(Image.fromarray(picture[:520, :520])) for picture in pictures])


@torch.no_grad()
def spread(network: Any, pictures: Any) -> Any:
    """Give random weights outputs that differ from place to place and from class to class.

    Pictures are what the network takes in one call.
    """
    network.eval()
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # running statistics become those of the pictures
            module.train()
    network(pictures)
    network.eval()
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str, output: torch.Tensor) -> None:
        outputs.setdefault(name, output)

    named = {n: m for n, m in network.named_modules() if re.fullmatch("|".join(LAST), n) and hasattr(m, "weight")}
    hooks = [m.register_forward_hook(lambda *call, n=n: keep(n, call[2])) for n, m in named.items()]
    network(pictures)
    for hook in hooks:
        hook.remove()
    for name, output in outputs.items():
        target = next(value for pattern, value in LAST.items() if re.fullmatch(pattern, name))
        named[name].weight *= target / output.std()
        if name.endswith("classification_head.cls_logits"):
            named[name].bias -= 5
        elif "classification_head" in name or "cls_score" in name:
            classes = 2 if "keypoint" in type(network).__name__.lower() else 91
            named[name].bias.view(-1, classes)[:, 0] += 6  # the background
        elif "mask_fcn_logits" in name:
            named[name].bias += 2
    return network


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Callable[[str], Export]:
    """Exports each network once.

    Detectors look at images six times as small as usual, and at a fifth of the objects or fewer where each has a head
    of its own, which takes seconds instead of minutes.
    """
    done: dict[str, Export] = {}
    original = torchvision.models.get_model

    def get_model(name: str, **options: Any) -> nn.Module:
        small = {"min_size": 128, "max_size": 213} if name.endswith("resnet50_fpn") else {}
        few = {"box_detections_per_img": 10 if "keypoint" in name else 20} if "rcnn" in name else {}
        return original(name, **options, **small, **few)

    def make(name: str) -> Export:
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            sizes = [(520, 640), (700, 520)] if name == SEGMENTER else SIZES
            sizes = [(300, 400), (232, 260)] if name == CLASSIFIER else sizes
            pictures = pictures_of(sizes)
            with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
                patch.setattr(torchvision.models, "get_model", get_model)
                torch.manual_seed(0)
                network = spread(get_architecture(f"torchvision:{name}").build(), inputs_of(name, pictures))
                torch.save(network.state_dict(), folder / "weights.pt")
                bundle = export(f"torchvision:{name}", folder / "weights.pt", open_storage(str(folder / "bundle")))
            files = [cv2.imencode(".png", p[..., ::-1])[1].tobytes() for p in pictures]
            done[name] = Export(network, bundle, files)
        return done[name]

    return make


def predict(bundle: Bundle, files: list[bytes], **parameters: Any) -> list[list[dict]]:
    """The three stages after reading."""
    now = datetime.now(UTC)
    rows = [{"path": f"{i}.png", "length": len(f), "modified": now, "content": f} for i, f in enumerate(files)]
    images = pa.RecordBatch.from_pylist(rows, stages.IMAGE_SCHEMA)
    manifest = bundle.manifest
    tensors = stages.preprocess([images], manifest.input, 4, 10**7)
    outputs = stages.infer(tensors, bundle, None, 2)
    results = stages.postprocess(outputs, manifest, parameters_for(manifest, parameters), "m", bundle.read)
    rows = [row for batch in results for row in batch.to_pylist()]
    assert [row["error"] for row in rows] == [None] * len(files)
    return [row["predictions"] for row in rows]


def decode(file: bytes) -> np.ndarray:
    return cv2.imdecode(np.frombuffer(file, np.uint8), cv2.IMREAD_COLOR_RGB)


def test_classes_are_those_of_torchvision(exported):
    made = exported(CLASSIFIER)
    weights = torchvision.models.get_model_weights(CLASSIFIER).DEFAULT
    for file, predictions in zip(made.pictures, predict(made.bundle, made.pictures), strict=True):
        with torch.inference_mode():
            logits = made.network(weights.transforms()(Image.fromarray(decode(file)))[None])
        scores, classes = logits.softmax(1)[0].topk(3)
        assert [p["label"] for p in predictions] == [weights.meta["categories"][c] for c in classes]
        np.testing.assert_allclose([p["score"] for p in predictions], scores, atol=1e-3)
        assert scores[0] > 1.2 * scores[2] > 0.01  # or it would say nothing


@pytest.mark.parametrize("name", DETECTORS)
def test_detections_are_those_of_torchvision(name, exported):
    made = exported(name)
    categories = torchvision.models.get_model_weights(name).DEFAULT.meta["categories"]
    for file, predictions in zip(made.pictures, predict(made.bundle, made.pictures), strict=True):
        picture = to_tensor(decode(file))
        with torch.inference_mode():
            expected, nearby = made.network([picture])[0], made.network([picture * (1 + NEARBY)])[0]
        lowest = made.network.score_thresh if hasattr(made.network, "score_thresh") else 0.05
        # Of no width are boxes that lay outside of the image, before they were moved into it.
        visible = (expected["boxes"][:, 2:] > expected["boxes"][:, :2]).all(1) & (expected["labels"] > 0)
        if len(expected["scores"]) == most_detections(made.network):  # the last ones are as good as what was cut off
            lowest = max(lowest, float(min(expected["scores"])))
        rows = torch.where((expected["scores"] > lowest + 1e-3) & visible)[0].tolist()
        assert 3 < len(rows) <= len(predictions)
        left, equal = list(predictions), []
        for row in rows:
            label, box = categories[expected["labels"][row]], expected["boxes"][row].numpy()
            same = min(left, key=lambda p: differs(p, label, box))
            left.remove(same)
            if not is_decided(expected, row, nearby):  # arbitrary weights leave it to the last digit
                continue
            equal.append(differs(same, label, box) < 1 and abs(same["score"] - float(expected["scores"][row])) < 1e-3)
            if "masks" in expected:
                equal[-1] &= overlap(same["mask"], expected["masks"][row, 0].numpy()) >= 0.99
            if "keypoints" in expected:
                points = torch.tensor([list(point.values()) for point in same["keypoints"]])
                near = distance(points[:, :2], expected["keypoints"][row, :, :2]) < 1
                as_high = (points[:, 2] - expected["keypoints_scores"][row]).abs() < 1e-2  # another peak of a heat map
                equal[-1] &= bool((near | as_high).all() and near.float().mean() > 0.8)
        assert len(equal) > 0.5 * len(rows)
        assert np.mean(equal) >= (0.9 if "keypoints" in expected else 0.97)
        assert sum(p["score"] > lowest + 2e-3 for p in left) <= 0.03 * len(rows) + len(rows) - len(equal)


def is_decided(expected: dict, row: int, nearby: dict) -> bool:
    """Whether a detection is found in a picture too that differs by a few roundings."""
    away = distance(nearby["boxes"], expected["boxes"][row])
    same = (away < 0.5) & ((nearby["scores"] - expected["scores"][row]).abs() < 5e-4)
    return bool((same & (nearby["labels"] == expected["labels"][row])).any())


def distance(places: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The largest difference of coordinates, in pixels."""
    return (places - others).abs().amax(-1)


def most_detections(network: Any) -> int:
    return (
        network.detections_per_img if hasattr(network, "detections_per_img") else network.roi_heads.detections_per_img
    )


def differs(prediction: dict, label: str, box: np.ndarray) -> float:
    """The largest distance of the sides of two boxes, in pixels; infinite for another class."""
    return np.abs(np.array(list(prediction["box"].values())) - box).max() if prediction["label"] == label else np.inf


def overlap(mask: dict, expected: np.ndarray) -> float:
    """Intersection over union with a mask, bool, or with probabilities, of which those of one half are either."""
    decoded = rle.decode(mask)
    if expected.dtype != bool:
        decided = np.abs(expected - 0.5) > 1e-3
        decoded, expected = decoded & decided, (expected > 0.5) & decided
    union = (decoded | expected).sum()
    return (decoded & expected).sum() / union if union else 1.0


def test_segments_are_those_of_torchvision(exported):
    made = exported(SEGMENTER)
    weights = torchvision.models.get_model_weights(SEGMENTER).DEFAULT
    for file, predictions in zip(made.pictures, predict(made.bundle, made.pictures), strict=True):
        with torch.inference_mode():
            scores = made.network(weights.transforms()(Image.fromarray(decode(file)))[None])["out"][0]
        classes = scores.argmax(0).numpy()
        assert {p["class_id"] for p in predictions} == set(np.unique(classes).tolist()) - {0}
        assert len(predictions) > 3
        for prediction in predictions:
            assert prediction["label"] == weights.meta["categories"][prediction["class_id"]]
            assert overlap(prediction["mask"], classes == prediction["class_id"]) >= 0.99
            inside = scores.softmax(0)[prediction["class_id"]].numpy()[classes == prediction["class_id"]]
            assert prediction["score"] == pytest.approx(inside.mean(), abs=1e-3)


def test_published_weights_of_frozen_normalizations_are_taken_exactly():
    frozen = torchvision.ops.FrozenBatchNorm2d(2, eps=0.0)
    frozen.running_var.fill_(1e-3)
    usual = nn.BatchNorm2d(2).eval()
    usual.load_state_dict(library._without_epsilon(frozen.state_dict()))
    images = torch.rand(1, 2, 4, 4)
    torch.testing.assert_close(usual(images), frozen(images))
    weights = usual.state_dict()
    assert library._without_epsilon(weights) is weights


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet5", "no network 'resnet5'; did you mean 'resnet50'"),
        ("raft_small", "raft_small is for OpticalFlow"),
        ("quantized_resnet50", "no task here"),
    ],
)
def test_a_network_that_cannot_be_taken_is_named(name, message):
    with pytest.raises(BundleError, match=message):
        get_architecture(f"torchvision:{name}")


def test_weights_that_cannot_be_fetched_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(
        torch.hub, "download_url_to_file", lambda *_, **__: (_ for _ in ()).throw(OSError("no network"))
    )
    with pytest.raises(BundleError, match="resnet18 cannot be fetched .*no network.*--checkpoint"):
        export("torchvision:resnet18", None, open_storage(str(tmp_path / "bundle")))
    assert not (tmp_path / "bundle").exists()


def test_a_card_gives_the_classes_of_a_network_that_was_trained_further(tmp_path):
    card = Path(tmp_path, "card.yaml")
    card.write_text("labels: [cat, dog]\npostprocess: {top_k: 1}")
    architecture = get_architecture("torchvision:resnet18", card=card)
    assert architecture.labels == ("cat", "dog") and architecture.postprocess == {"top_k": 1}
    assert architecture.build().fc.out_features == 2
    detector = get_architecture("torchvision:ssdlite320_mobilenet_v3_large", card=card)
    assert detector.labels == ("cat", "dog") and detector.postprocess == {"first_class": 1, "top_k": 1}


@pytest.mark.parametrize("name", ["torchvision:squeezenet1_1", "timm:test_efficientnet"])
def test_a_librarys_network_becomes_one_of_8_bits(tmp_path, name):
    torch.manual_seed(0)
    architecture, pictures = get_architecture(name), checks.generate_pictures()
    torch.save(architecture.build().state_dict(), tmp_path / "weights.pt")
    images, target = [fit(picture, architecture.input) for picture in pictures], open_storage(str(tmp_path / "bundle"))
    bundle = export(name, tmp_path / "weights.pt", target, "int8", images)
    assert b"FakeQuantize" in bundle.read("model.xml")
    assert bundle.manifest.quantization["before"] == 1 and bundle.manifest.quantization["after"] >= 0.5
    (predictions,) = predict(bundle, [cv2.imencode(".png", pictures[0])[1].tobytes()])
    assert predictions and all(prediction["label"] in architecture.labels for prediction in predictions)
