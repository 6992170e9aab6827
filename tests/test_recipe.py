"""The better network and recipe: the same program with other arguments."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from trainings import HELD_OUT, SMALL_RECIPE, places, train_fashion

import fashion_data
import fashion_sets
from augmentation import augment
from fashion_mnist import RECIPE, compute_logits, parse
from fashion_resnet import FashionResNet
from helpers.bundle.runtime import get_model
from helpers.errors import BundleError, TrainingError
from helpers.export.architectures import get_architecture
from helpers.export.conversion import export, load_network
from helpers.storage import open_storage
from helpers.tracking.tensorboard import read_scalars
from muon import HIDDEN_MOMENTUM, HIDDEN_RATE, MOMENTUM, Muon, orthogonalize


@pytest.fixture(scope="module")
def run(fashion_mnist_root, tmp_path_factory):
    """A small training that ends with the test images: its directory and its result."""
    run_dir = str(tmp_path_factory.mktemp("recipe"))
    arguments = [*SMALL_RECIPE, "--train-images", "1280", "--evaluate-every", "2", "--test-images", "1000"]
    return run_dir, train_fashion(arguments, fashion_mnist_root, run_dir)


@pytest.fixture(scope="module")
def held_out_run(fashion_mnist_root, tmp_path_factory):
    """One that holds images out: its directory, its result, what it reported, and which sets it opened."""
    run_dir, reports, opened = str(tmp_path_factory.mktemp("held_out")), [], []
    load = fashion_data.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fashion_data, "load", lambda root, train: opened.append(train) or load(root, train))
        result = train_fashion(HELD_OUT, fashion_mnist_root, run_dir, lambda *report: reports.append(report))
    return run_dir, result, reports, opened


@pytest.fixture(scope="module")
def untrained(tmp_path_factory) -> Path:
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


def test_half_of_the_images_are_flipped_and_the_others_in_the_next_epoch(fashion_mnist_root):
    images = torch.as_tensor(fashion_data.load(fashion_mnist_root, train=True)[0][:1000])
    mirrored = []
    for epoch in (3, 4):
        changed = augment(images, epoch, horizontal_flip=True)
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
        changed.append(augment(images, horizontal_flip=True, shift=3, cutout=4))
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
    values = torch.linalg.svdvals(orthogonalize(torch.randn(shape))) / max(1, shape[0] / shape[1]) ** 0.5
    assert values.min() > 0.4 and values.max() < 1.4


def test_training_learns_and_tests_once(run, fashion_mnist_root):
    run_dir, result = run
    assert result["epochs"][1]["train_loss"] < 0.9 * result["epochs"][0]["train_loss"]
    assert result["test_accuracy"] > 0.3 and result["cpu_seconds"] > 0
    assert "test_accuracy" not in result["epochs"][0] and "test_accuracy" in result["epochs"][1]
    network = FashionResNet(width=4)
    network.load_state_dict(torch.load(Path(run_dir, "checkpoint.pt"), weights_only=True))
    images, labels = (torch.as_tensor(part[:1000]) for part in fashion_data.load(fashion_mnist_root, train=False))
    predicted = compute_logits(network, images).argmax(dim=1)
    assert (predicted == labels).float().mean().item() == pytest.approx(result["test_accuracy"], abs=2e-3)
    assert json.loads(Path(run_dir, "result.json").read_text()) == json.loads(json.dumps(result))


def test_validation_images_are_reported_and_the_test_images_left_alone(held_out_run):
    run_dir, result, reports, opened = held_out_run
    assert opened == [True]
    assert [epoch for epoch, _ in reports] == [1, 2] and reports[-1][1] == result["val_accuracy"] > 0.3
    assert "test_accuracy" not in result
    assert read_scalars(run_dir)["val/accuracy"]["value"].tolist() == pytest.approx([value for _, value in reports])


def test_validation_images_are_not_trained_on(fashion_mnist_root):
    options = parse(["--validation-images", "10000", *places(fashion_mnist_root)])
    rest, held_out = fashion_sets.open_sets(options)
    assert len(rest) == 50_000 and len(held_out) == 10_000
    whole, _ = fashion_data.load(fashion_mnist_root, train=True)
    parts = np.concatenate([rest.images, held_out.images])
    assert np.array_equal(np.sort(parts.sum(axis=(1, 2))), np.sort(whole.sum(axis=(1, 2))))
    assert np.bincount(held_out.labels, minlength=10).min() > 800  # all classes


def test_images_of_a_stored_training_set_are_not_held_out(fashion_mnist_root, tmp_path):
    with pytest.raises(TrainingError, match=f"validation images come from Fashion-MNIST alone: .*{tmp_path}"):
        train_fashion([*HELD_OUT, "--training-set", str(tmp_path)], fashion_mnist_root)


def test_the_same_seed_gives_the_same_training(held_out_run, fashion_mnist_root):
    again = train_fashion(HELD_OUT, fashion_mnist_root)
    assert [e["train_loss"] for e in again["epochs"]] == [e["train_loss"] for e in held_out_run[1]["epochs"]]


def test_events_hold_every_step(run):
    run_dir, _ = run
    scalars = read_scalars(run_dir)
    for measure in ("loss", "gradient_norm", "learning_rate", "images_per_second"):
        assert scalars[f"train/{measure}"]["step"].tolist() == list(range(1, 41))
        assert (scalars[f"train/{measure}"]["value"] > 0).all()
    rates = scalars["train/learning_rate"]["value"]
    assert rates.max() == pytest.approx(parse(RECIPE).learning_rate, rel=0.1) and rates.iloc[-1] < 0.002


def test_the_projector_has_a_thousand_points_with_pictures(run):
    import cv2
    from google.protobuf import text_format
    from tensorboard.plugins.projector import projector_config_pb2

    run_dir = Path(run[0])
    config = text_format.Parse((run_dir / "projector_config.pbtxt").read_text(), projector_config_pb2.ProjectorConfig())
    (embedding,) = config.embeddings
    points = np.loadtxt(run_dir / embedding.tensor_path, delimiter="\t")
    classes = (run_dir / embedding.metadata_path).read_text().splitlines()
    assert points.shape == (1000, 64) and len(classes) == 1000 and set(classes) == set(fashion_data.CLASSES)
    assert points.std(axis=0).max() > 0
    sprite = cv2.imread(str(run_dir / embedding.sprite.image_path), cv2.IMREAD_GRAYSCALE)
    assert list(embedding.sprite.single_image_dim) == [28, 28]
    assert sprite.shape[1] // 28 * (sprite.shape[0] // 28) >= 1000 and max(sprite.shape) <= 8192
    # The first is the first test image: an ankle boot.
    assert classes[0] == "Ankle boot" and sprite[:28, :28].max() > 200


def test_two_spark_tasks_train_as_one_process(two_ranks, held_out_run):
    run_dir, both = two_ranks["recipe"]
    assert both["processes"] == 2
    # Batch norm sees half batches, and each rank augments in its own way.
    losses = [run["epochs"][-1]["train_loss"] for run in (held_out_run[1], both)]
    assert losses[1] == pytest.approx(losses[0], rel=0.15) and losses[1] < 0.9 * both["epochs"][0]["train_loss"]
    assert read_scalars(run_dir)["train/loss"]["step"].tolist() == list(range(1, 41))


def test_a_mirror_image_gets_the_same_logits_in_evaluation_alone(untrained):
    network = load_network(get_architecture("fashion_resnet"), untrained)
    images = torch.rand(4, 1, 28, 28)
    with torch.inference_mode():
        torch.testing.assert_close(network(images), network(images.flip(3)))
        expected = (network.classifier(network.embed(images)) + network.classifier(network.embed(images.flip(3)))) / 2
        torch.testing.assert_close(network(images), expected)
        network.train()
        assert (network(images) - network(images.flip(3))).abs().max() > 1e-3


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("fp16", 2e-2)])
def test_the_bundle_gives_the_networks_averaged_logits(precision, tolerance, untrained, fashion_mnist_root, tmp_path):
    bundle = export("fashion_resnet", untrained, open_storage(str(tmp_path)), precision)
    images = fashion_data.load(fashion_mnist_root, train=False)[0][:256]
    network = load_network(get_architecture("fashion_resnet"), untrained)
    expected = compute_logits(network, torch.as_tensor(images)).numpy()
    logits = next(get_model(bundle).infer([(None, images[..., None])]))[1]["logits"]
    np.testing.assert_allclose(logits, expected, atol=tolerance)
    assert (logits.argmax(axis=1) == expected.argmax(axis=1)).mean() > 0.99
    assert bundle.manifest.architecture == "fashion_resnet" and bundle.manifest.labels == fashion_data.CLASSES


def test_weights_of_the_other_network_are_refused(checkpoint):
    with pytest.raises(BundleError, match="fashion_resnet"):
        load_network(get_architecture("fashion_resnet"), checkpoint)
