import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data import fashion_mnist
from helpers.models.fashion_cnn import compute_logits
from helpers.models.fashion_resnet import FashionResNet, MirrorAveraged
from helpers.training.augmentation import augment
from helpers.training.classifier import open_sets, train
from helpers.training.dashboards import read_scalars
from helpers.training.distributed import train_on_spark
from helpers.training.muon import HIDDEN_MOMENTUM, HIDDEN_RATE, MOMENTUM, Muon, orthogonalise
from helpers.training.recipe import RECIPE

from helpers.errors import BundleError, TrainingError
from helpers.models.architectures import get_architecture
from helpers.models.export import export, load_network
from helpers.models.runtime import get_model
from helpers.storage import open_storage

SMALL = dataclasses.replace(
    RECIPE, epochs=2, batch_size=64, width=4, train_images=1280, held_out=1000, evaluate_every=1
)


@pytest.fixture(scope="module")
def reports() -> list[tuple[int, float]]:
    return []


@pytest.fixture(scope="module")
def run(fashion_mnist_root, tmp_path_factory, reports):
    """A small training that ends with the test images: its directory and its result."""
    run_dir = str(tmp_path_factory.mktemp("recipe"))
    settings = dataclasses.replace(SMALL, held_out=0, train_images=2560, evaluate_every=2)
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
    assert torch.equal(augment(images), images)


def test_half_of_the_images_are_mirrored_and_the_others_in_the_next_epoch(fashion_mnist_root):
    images = torch.as_tensor(fashion_mnist.load(fashion_mnist_root, train=True)[0][:1000])
    mirrored = []
    for epoch in (3, 4):
        changed = augment(images, epoch, mirror=True)
        mirrored.append((changed == images.flip(2)).all(dim=(1, 2)))
        assert (mirrored[-1] | (changed == images).all(dim=(1, 2))).all()
    assert (mirrored[0] ^ mirrored[1]).sum() > 990  # a few are their own mirror image
    assert 400 < mirrored[0].sum() < 600


def test_images_move_each_by_its_own_shift_and_black_comes_in():
    images = numbered(300)
    changed = augment(images, shift=2)
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
    changed = augment(numbered(200), cutout=5)
    heights = [int((image == 0).any(dim=1).sum()) for image in changed]
    widths = [int((image == 0).any(dim=0).sum()) for image in changed]
    areas = [int((image == 0).sum()) for image in changed]
    assert areas == [height * width for height, width in zip(heights, widths, strict=True)]
    assert max(heights) == max(widths) == 5 and min(areas) >= 4


def test_the_same_seed_augments_in_the_same_way():
    images, changed = numbered(20), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        changed.append(augment(images, mirror=True, shift=3, cutout=4))
    assert torch.equal(changed[0], changed[1]) and not torch.equal(changed[0], changed[2])


def test_a_hidden_convolution_moves_as_torchs_muon_moves_a_matrix_and_the_rest_as_by_sgd():
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.Conv2d(8, 12, 1), torch.nn.Conv2d(12, 6, 1))
    first, tall, wide = network
    hidden = [torch.nn.Parameter(layer.weight.detach().flatten(1).clone()) for layer in (tall, wide)]
    others = [torch.nn.Parameter(p.detach().clone()) for p in (first.weight, first.bias, tall.bias, wide.bias)]
    ours = Muon(network.parameters(), lr=0.1, weight_decay=0.3)
    theirs = torch.optim.Muon(hidden, lr=0.1 * HIDDEN_RATE, weight_decay=0.3, momentum=HIDDEN_MOMENTUM)
    plain = torch.optim.SGD(others, lr=0.1, momentum=MOMENTUM, nesterov=True)
    for _ in range(4):
        for parameter in network.parameters():
            parameter.grad = torch.randn_like(parameter)
        for matrix, layer in zip(hidden, (tall, wide), strict=True):
            matrix.grad = layer.weight.grad.flatten(1)
        for parameter, same in zip(others, (first.weight, first.bias, tall.bias, wide.bias), strict=True):
            parameter.grad = same.grad
        for optimizer in (ours, theirs, plain):
            optimizer.step()
    for matrix, layer in zip(hidden, (tall, wide), strict=True):
        torch.testing.assert_close(layer.weight.flatten(1), matrix, atol=2e-3, rtol=0)  # of steps of about 0.1
    for parameter, same in zip(others, (first.weight, first.bias, tall.bias, wide.bias), strict=True):
        torch.testing.assert_close(same, parameter)


@pytest.mark.parametrize("shape", [(24, 60), (60, 24)])
def test_what_is_made_orthogonal_turns_all_directions_alike(shape):
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape))) / max(1, shape[0] / shape[1]) ** 0.5
    assert values.min() > 0.4 and values.max() < 1.4


def test_training_learns_and_tests_once(run, reports, fashion_mnist_root):
    run_dir, result = run
    assert result["epochs"][1]["train_loss"] < 0.9 * result["epochs"][0]["train_loss"]
    assert result["test_accuracy"] > 0.5 and result["cpu_seconds"] > 0
    assert "test_accuracy" not in result["epochs"][0] and reports == [(2, result["test_accuracy"])]
    network = FashionResNet(width=4)
    network.load_state_dict(torch.load(Path(run_dir, "checkpoint.pt"), weights_only=True))
    images, labels = map(torch.as_tensor, fashion_mnist.load(fashion_mnist_root, train=False))
    predicted = compute_logits(MirrorAveraged(network), images).argmax(dim=1)
    assert (predicted == labels).float().mean().item() == pytest.approx(result["test_accuracy"], abs=2e-4)
    assert json.loads(Path(run_dir, "result.json").read_text()) == json.loads(json.dumps(result))


def test_held_out_images_are_reported_and_the_test_images_left_alone(monkeypatch, fashion_mnist_root, tmp_path):
    opened, map_files, told = [], fashion_mnist.map_files, []
    monkeypatch.setattr(fashion_mnist, "map_files", lambda root, train: opened.append(train) or map_files(root, train))
    result = train(SMALL, fashion_mnist_root, str(tmp_path), lambda *report: told.append(report))
    assert opened == [True]
    assert [epoch for epoch, _ in told] == [1, 2] and told[-1][1] == result["val_accuracy"] > 0.3
    assert "test_accuracy" not in result
    assert read_scalars(str(tmp_path))["val/accuracy"]["value"].tolist() == pytest.approx([value for _, value in told])


def test_held_out_images_are_not_trained_on(fashion_mnist_root):
    settings = dataclasses.replace(SMALL, train_images=None, held_out=10_000)
    rest, held_out = open_sets(settings, fashion_mnist_root)
    assert len(rest) == 50_000 and len(held_out) == 10_000
    whole, _ = fashion_mnist.load(fashion_mnist_root, train=True)
    parts = np.concatenate([rest.images, held_out.images])
    assert np.array_equal(np.sort(parts.sum(axis=(1, 2))), np.sort(whole.sum(axis=(1, 2))))
    assert np.bincount(held_out.labels, minlength=10).min() > 800  # all classes


def test_images_of_a_stored_training_set_are_not_held_out(fashion_mnist_root, tmp_path):
    settings = dataclasses.replace(SMALL, training_set=str(tmp_path))
    with pytest.raises(TrainingError, match="held_out"):
        train(settings, fashion_mnist_root, None)


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
    assert rates.max() == pytest.approx(RECIPE.learning_rate, rel=0.1) and rates.iloc[-1] < 0.002


def test_the_projector_has_a_thousand_points_with_pictures(run):
    import cv2
    from google.protobuf import text_format
    from tensorboard.plugins.projector import projector_config_pb2

    run_dir = Path(run[0])
    config = text_format.Parse((run_dir / "projector_config.pbtxt").read_text(), projector_config_pb2.ProjectorConfig())
    (embedding,) = config.embeddings
    points = np.loadtxt(run_dir / embedding.tensor_path, delimiter="\t")
    classes = (run_dir / embedding.metadata_path).read_text().splitlines()
    assert points.shape == (1000, 64) and len(classes) == 1000 and set(classes) == set(fashion_mnist.CLASSES)
    assert points.std(axis=0).max() > 0
    sprite = cv2.imread(str(run_dir / embedding.sprite.image_path), cv2.IMREAD_GRAYSCALE)
    assert list(embedding.sprite.single_image_dim) == [28, 28]
    assert sprite.shape[1] // 28 * (sprite.shape[0] // 28) >= 1000 and max(sprite.shape) <= 8192
    # The first is the first test image: an ankle boot.
    assert classes[0] == "Ankle boot" and sprite[:28, :28].max() > 200


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
