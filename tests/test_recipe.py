import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers.data import fashion_mnist
from helpers.errors import BundleError
from helpers.models.architectures import get_architecture
from helpers.models.export import export, load_network
from helpers.models.fashion_cnn import compute_logits
from helpers.models.fashion_resnet import FashionResNet, MirrorAveraged
from helpers.models.runtime import get_model
from helpers.storage import open_storage
from helpers.training.augmentation import augment
from helpers.training.dashboards import read_scalars
from helpers.training.distributed import train_on_spark
from helpers.training.recipe import RecipeSettings, _Selection, measure_accuracy, train
from helpers.training.workers import Worker

SMALL = RecipeSettings(epochs=2, batch_size=64, width=4, train_images=1280, validation_images=1000, learning_rate=0.1)


@pytest.fixture(scope="module")
def reports() -> list[tuple[int, float]]:
    return []


@pytest.fixture(scope="module")
def run(fashion_mnist_root, tmp_path_factory, reports):
    """A small training that ends with the test images: its directory and its result."""
    run_dir = str(tmp_path_factory.mktemp("recipe"))
    settings = dataclasses.replace(SMALL, validation_images=0, train_images=2560)
    return run_dir, train(settings, fashion_mnist_root, run_dir, lambda *report: reports.append(report))


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """An untrained network whose batch norms have seen something, so that training and evaluation differ."""
    path = tmp_path_factory.mktemp("weights") / "untrained.pt"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = FashionResNet()
        network(torch.rand(16, 1, 28, 28))
        torch.save(network.state_dict(), path)
    return path


def numbered(count: int) -> torch.Tensor:
    """Images whose pixels are all different within a row and a column, and none of which is black."""
    return (torch.arange(28)[:, None] * 7 + torch.arange(28) + 1).to(torch.uint8).expand(count, 28, 28).clone()


def test_augmentation_without_choices_changes_nothing():
    images = torch.randint(0, 256, (5, 28, 28), dtype=torch.uint8)
    assert torch.equal(augment(images, torch.Generator(), mirror=False), images)


def test_half_of_the_images_are_mirrored():
    images = numbered(400)
    changed = augment(images, torch.Generator().manual_seed(0))
    mirrored = (changed == images.flip(2)).all(dim=(1, 2))
    same = (changed == images).all(dim=(1, 2))
    assert (mirrored ^ same).all() and 150 < mirrored.sum() < 250


def test_images_move_each_by_its_own_shift_and_black_comes_in():
    images = numbered(300)
    changed = augment(images, torch.Generator().manual_seed(0), mirror=False, shift=2)
    found = set()
    for image in changed:
        (shift,) = [
            (down, right)
            for down in range(-2, 3)
            for right in range(-2, 3)
            if torch.equal(
                image[max(down, 0) : 28 + min(down, 0), max(right, 0) : 28 + min(right, 0)],
                images[0, max(-down, 0) : 28 + min(-down, 0), max(-right, 0) : 28 + min(-right, 0)],
            )
        ]
        found.add(shift)
        assert (image == 0).sum() == 784 - (28 - abs(shift[0])) * (28 - abs(shift[1]))
    assert len(found) == 25


def test_cutout_blackens_one_square():
    changed = augment(numbered(200), torch.Generator().manual_seed(0), mirror=False, cutout=5)
    heights = [int((image == 0).any(dim=1).sum()) for image in changed]
    widths = [int((image == 0).any(dim=0).sum()) for image in changed]
    areas = [int((image == 0).sum()) for image in changed]
    assert areas == [height * width for height, width in zip(heights, widths, strict=True)]
    assert max(heights) == max(widths) == 5 and min(areas) >= 4


def test_the_same_seed_augments_in_the_same_way():
    images = numbered(20)
    first, second, other = (augment(images, torch.Generator().manual_seed(s), shift=3, cutout=4) for s in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_training_learns_and_tests_once(run, reports, fashion_mnist_root):
    run_dir, result = run
    assert result["epochs"][1]["train_loss"] < 0.9 * result["epochs"][0]["train_loss"]
    assert result["test_accuracy"] > 0.5 and result["cpu_minutes"] > 0
    assert "val_accuracy" not in result["epochs"][0] and reports == []
    network = FashionResNet(width=4)
    network.load_state_dict(torch.load(Path(run_dir, "checkpoint.pt"), weights_only=True))
    images, labels = map(torch.as_tensor, fashion_mnist.load(fashion_mnist_root, train=False))
    assert measure_accuracy(network, images, labels) == pytest.approx(result["test_accuracy"], abs=2e-4)
    assert json.loads(Path(run_dir, "result.json").read_text()) == json.loads(json.dumps(result))


def test_held_out_images_are_reported_and_the_test_images_left_alone(monkeypatch, fashion_mnist_root):
    loaded, load, told = [], fashion_mnist.load, []
    monkeypatch.setattr(fashion_mnist, "load", lambda root, train: loaded.append(train) or load(root, train))
    result = train(SMALL, fashion_mnist_root, None, lambda *report: told.append(report))
    assert loaded == [True]
    assert [epoch for epoch, _ in told] == [1, 2] and told[-1][1] == result["val_accuracy"] > 0.3
    assert "test_accuracy" not in result


def test_held_out_images_are_not_trained_on(fashion_mnist_root):
    from helpers.training.recipe import _load

    settings = dataclasses.replace(SMALL, train_images=None, validation_images=10_000)
    (images, _), (held_out, labels) = _load(settings, fashion_mnist_root, torch.device("cpu"))
    assert len(images) == 50_000 and len(held_out) == 10_000
    whole, _ = fashion_mnist.load(fashion_mnist_root, train=True)
    parts = np.concatenate([images.numpy(), held_out.numpy()])
    assert np.array_equal(np.sort(parts.sum(axis=(1, 2))), np.sort(whole.sum(axis=(1, 2))))
    assert np.bincount(labels.numpy(), minlength=10).min() > 800  # all classes


def test_the_same_seed_gives_the_same_training(fashion_mnist_root):
    first, second = (train(SMALL, fashion_mnist_root, None)["epochs"] for _ in range(2))
    assert [epoch["train_loss"] for epoch in first] == [epoch["train_loss"] for epoch in second]


def test_events_hold_every_step(run):
    run_dir, result = run
    scalars = read_scalars(run_dir)
    for measure in ("loss", "gradient_norm", "learning_rate", "images_per_second"):
        assert scalars[f"train/{measure}"]["step"].tolist() == list(range(1, 81))
        assert (scalars[f"train/{measure}"]["value"] > 0).all()
    rates = scalars["train/learning_rate"]["value"]
    assert rates.max() == pytest.approx(0.1, rel=0.1) and rates.iloc[-1] < 0.002


def test_the_projector_has_a_thousand_points_with_pictures(run):
    import cv2
    from google.protobuf import text_format
    from tensorboard.plugins.projector import projector_config_pb2

    run_dir = Path(run[0])
    config = text_format.Parse((run_dir / "projector_config.pbtxt").read_text(), projector_config_pb2.ProjectorConfig())
    (embedding,) = config.embeddings
    points = np.loadtxt(run_dir / embedding.tensor_path, delimiter="\t")
    classes = (run_dir / embedding.metadata_path).read_text().splitlines()
    assert points.shape == (1000, 32) and len(classes) == 1000 and set(classes) == set(fashion_mnist.CLASSES)
    assert points.std(axis=0).max() > 0
    sprite = cv2.imread(str(run_dir / embedding.sprite.image_path), cv2.IMREAD_GRAYSCALE)
    assert list(embedding.sprite.single_image_dim) == [28, 28]
    assert sprite.shape[1] // 28 * (sprite.shape[0] // 28) >= 1000 and max(sprite.shape) <= 8192
    # The first is the first test image: an ankle boot.
    assert classes[0] == "Ankle boot" and sprite[:28, :28].max() > 200


def test_what_is_known_well_is_skipped_and_counts_for_more():
    settings = dataclasses.replace(SMALL, epochs=4, skip=0.75, whole_epochs=1)
    selection = _Selection(settings, Worker(0, 1, torch.device("cpu")), 1000)
    chosen, weights = selection.choose(0)
    assert len(chosen) == 1000 and (weights == 1).all()  # nothing is known yet
    known = torch.arange(1000) % 5 != 0
    selection.record(torch.arange(990), torch.where(known, 0.1, 2.0)[:990])
    selection.exchange()
    chosen, weights = selection.choose(1)
    assert (weights == torch.where(known & (torch.arange(1000) < 990), 4, 1)).all()
    assert torch.isin((~known).nonzero(), chosen).all() and torch.isin(torch.arange(990, 1000), chosen).all()
    assert 0.15 < known[chosen].sum() / known.sum() < 0.35
    # The weights make up for what is left out.
    assert weights[chosen].sum() == pytest.approx(1000, rel=0.15)
    chosen, weights = selection.choose(3)
    assert len(chosen) == 1000 and (weights == 1).all()
    few = _Selection(dataclasses.replace(settings, skip=0.99), Worker(0, 1, torch.device("cpu")), 70)
    few.record(torch.arange(70), torch.cat([torch.full((65,), 0.1), torch.full((5,), 2.0)]))
    few.exchange()
    chosen, weights = few.choose(1)
    assert len(chosen) == 70 and (weights == 1).all()  # less than a batch would be left


def test_the_losses_of_all_workers_decide_together():
    settings = dataclasses.replace(SMALL, epochs=4)
    alone = _Selection(settings, Worker(0, 1, torch.device("cpu")), 100)
    alone.record(torch.arange(100), torch.rand(100))
    alone.exchange()
    again = _Selection(settings, Worker(1, 1, torch.device("cpu")), 100)
    again.losses = alone.losses.clone()
    assert torch.equal(alone.choose(1)[0], again.choose(1)[0])
    assert not torch.equal(alone.choose(1)[0], alone.choose(2)[0])


def test_two_spark_tasks_train_as_one_process(spark, fashion_mnist_root, tmp_path):
    single = train(SMALL, fashion_mnist_root, None)
    both = train_on_spark(spark, SMALL, fashion_mnist_root, str(tmp_path), processes=2, train=train)
    assert both["processes"] == 2
    # Batch norm sees half batches, and each process augments in its own way.
    losses = [run["epochs"][-1]["train_loss"] for run in (single, both)]
    assert losses[1] == pytest.approx(losses[0], rel=0.15) and losses[1] < 0.9 * both["epochs"][0]["train_loss"]
    assert read_scalars(str(tmp_path))["train/loss"]["step"].tolist() == list(range(1, 41))


def test_a_mirror_image_gets_the_same_logits(weights):
    heads = MirrorAveraged(load_network(get_architecture("fashion_resnet"), weights)).eval()
    images = torch.rand(4, 1, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(heads(images), heads(images.flip(3)))


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("fp16", 2e-2)])
def test_the_bundle_gives_the_networks_averaged_logits(precision, tolerance, weights, fashion_mnist_root, tmp_path):
    bundle = export("fashion_resnet", weights, open_storage(str(tmp_path)), precision)
    images = fashion_mnist.load(fashion_mnist_root, train=False)[0][:256]
    network = load_network(get_architecture("fashion_resnet"), weights)
    expected = compute_logits(MirrorAveraged(network), torch.as_tensor(images)).numpy()
    logits = next(get_model(bundle).infer([(None, images[..., None])]))[1]["logits"]
    np.testing.assert_allclose(logits, expected, atol=tolerance)
    assert (logits.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.99
    assert bundle.manifest.architecture == "fashion_resnet" and bundle.manifest.labels == fashion_mnist.CLASSES


def test_weights_of_the_other_network_are_refused(checkpoint):
    with pytest.raises(BundleError, match="fashion_resnet"):
        load_network(get_architecture("fashion_resnet"), checkpoint)
