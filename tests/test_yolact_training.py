import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from trainings import EPOCHS, RATE, SCENES, STEPS, WARM_UP, train_scenes, weights

import train_yolact
from helpers.config import PROJECT
from helpers.errors import TrainingError
from helpers.export.architectures import get_architecture
from helpers.export.conversion import load_network
from helpers.metrics import average_precision
from helpers.tracking.tensorboard import read_scalars
from helpers.yolact import build
from helpers.yolact.detection import decode
from yolact import losses
from yolact.augmentation import augment, make_target
from yolact.evaluation import segment, to_coco_results
from yolact.losses import Target, compute_losses
from yolact.matching import BACKGROUND, IGNORED, encode, match
from yolact.scenes import Scenes, to_coco

WEIGHTS = PROJECT / "notebooks" / "weights" / "yolact_scenes.pt"


@pytest.fixture(scope="module")
def run(fashion_mnist_root, tmp_path_factory):
    """A few steps on one process: the run directory and the result."""
    folder = str(tmp_path_factory.mktemp("yolact"))
    return folder, train_scenes(SCENES, fashion_mnist_root, folder)


def test_anchors_are_matched_by_overlap():
    priors = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.3], [0.5, 0.5, 0.4, 0.18], [0.1, 0.1, 0.1, 0.1]])
    boxes = torch.tensor([[0.3, 0.3, 0.7, 0.7]])
    # Overlaps 1, 0.75, 0.45 and 0.
    assert match(priors, boxes).tolist() == [0, 0, IGNORED, BACKGROUND]
    assert match(priors, boxes[:0]).tolist() == [BACKGROUND] * 4


def test_each_object_has_an_anchor_of_its_own_however_small_the_overlap():
    priors = torch.tensor([[0.2, 0.2, 0.2, 0.2], [0.25, 0.2, 0.2, 0.2], [0.8, 0.8, 0.1, 0.1]])
    boxes = torch.tensor([[0.1, 0.1, 0.3, 0.3], [0.12, 0.1, 0.32, 0.3], [0.7, 0.7, 0.78, 0.78]])
    # The first two both overlap the first anchor most; the third overlaps its best by 0.07 only.
    assert match(priors, boxes).tolist() == [0, 1, 2]


def test_offsets_are_what_detection_decodes():
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 0.5, (20, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.05, 0.5, (20, 2))], axis=1).astype(np.float32)
    priors = rng.uniform(0.1, 0.9, (20, 4)).astype(np.float32)
    offsets = encode(torch.from_numpy(boxes), torch.from_numpy(priors)).numpy()
    np.testing.assert_allclose(decode(offsets, priors), boxes, atol=1e-5)
    one = encode(torch.tensor([[0.4, 0.4, 0.8, 0.8]]), torch.tensor([[0.5, 0.5, 0.4, 0.2]]))
    np.testing.assert_allclose(one, [[2.5, 5, 0, math.log(2) / 0.2]], rtol=1e-5, atol=1e-6)


def test_class_loss_takes_the_three_hardest_negatives_for_each_positive():
    logits = torch.zeros(1, 7, 3)
    logits[0, :, 1] = torch.tensor([0.0, 5, 4, 3, 2, 1, 9])
    classes = torch.tensor([[1, 0, 0, 0, 0, 0, -1]])  # the last, and hardest, is not to be learned
    negatives = [math.log(2 + math.exp(score)) for score in (5, 4, 3)]
    assert losses.class_loss(logits, classes).item() == pytest.approx(math.log(3) + sum(negatives), rel=1e-5)
    assert losses.class_loss(logits, classes.clamp(max=0)).item() == 0


def test_box_loss_is_square_near_and_straight_far():
    priors = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.2, 0.2, 0.1, 0.1]])
    target = Target(torch.tensor([[0.3, 0.3, 0.7, 0.7]]), torch.tensor([0]), torch.zeros(1, 4, 4))
    loc = torch.tensor([[0.5, 0, 0, -3], [99, 99, 99, 99]])
    assert losses.box_loss(loc, torch.tensor([0, BACKGROUND]), target, priors).item() == pytest.approx(0.125 + 2.5)


def test_mask_loss_is_the_mean_over_the_objects_box():
    target = Target(torch.tensor([[0.25, 0.25, 0.75, 0.75]]), torch.tensor([0]), torch.zeros(1, 8, 8))
    target.masks[0, 2:6, 2:6] = 1
    proto, far = torch.zeros(8, 8, 1), torch.zeros(8, 8, 1)
    far[0, 0] = 1e4  # beyond the crop, which reaches a cell beyond the box
    coefficients = torch.ones(3, 1)
    matched = torch.tensor([0, BACKGROUND, IGNORED])
    for maps in (proto, far):
        found = losses.mask_loss(maps, coefficients, matched, target).item()
        assert found == pytest.approx(math.log(2) * 36 / 16)
    proto[...], proto[2:6, 2:6] = -20, 20
    assert losses.mask_loss(proto, coefficients, matched, target).item() == pytest.approx(0, abs=1e-6)
    # Half a cell is learned as one half.
    target.masks[0, 2:6, 2:6] = 0.5
    proto[2:6, 2:6] = 0
    assert losses.mask_loss(proto, coefficients, matched, target).item() == pytest.approx(math.log(2), rel=1e-5)


def test_many_positive_anchors_weigh_as_if_all_masks_were_assembled(monkeypatch):
    target = Target(torch.tensor([[0.0, 0, 1, 1]]), torch.tensor([0]), torch.ones(1, 4, 4))
    arguments = torch.ones(4, 4, 2), torch.ones(30, 2), torch.zeros(30, dtype=torch.int64), target
    whole = losses.mask_loss(*arguments)
    monkeypatch.setattr(losses, "MASKS", 10)
    assert losses.mask_loss(*arguments).item() == pytest.approx(whole.item())


def test_semantic_loss_merges_the_objects_of_a_class():
    masks = torch.zeros(3, 4, 4)
    masks[0, :2], masks[1, 2:], masks[2, :, :2] = 1, 1, 1
    target = Target(torch.zeros(3, 4), torch.tensor([1, 1, 0]), masks)
    logits = torch.full((3, 2, 2), -20.0)
    logits[1], logits[0, :, 0] = 20, 20
    assert losses.semantic_loss(logits, target).item() == pytest.approx(0, abs=1e-6)
    assert losses.semantic_loss(torch.zeros(3, 2, 2), target).item() == pytest.approx(3 * math.log(2))


def test_terms_are_weighted_as_in_the_paper_and_an_empty_image_has_a_loss():
    target = Target(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0, 8, 8))
    outputs = [torch.randn(*shape, requires_grad=True) for shape in ((1, 5, 4), (1, 5, 3), (1, 5, 2))]
    proto, semantic = torch.randn(1, 8, 8, 2), torch.zeros(1, 2, 4, 4)
    terms = compute_losses((*outputs, torch.rand(5, 4), proto, semantic), [target])
    assert losses.WEIGHTS == {"class": 1, "box": 1.5, "mask": 6.125, "semantic": 1}
    assert {name: term.item() for name, term in terms.items() if name != "semantic"} == {
        "class": 0,
        "box": 0,
        "mask": 0,
    }
    assert terms["semantic"].item() == pytest.approx(2 * math.log(2))
    sum(terms.values()).backward()


def test_augmentation_changes_boxes_and_masks_with_the_image(fashion_mnist_root):
    scenes = Scenes(fashion_mnist_root, "train")
    sizes = set()
    for number in range(30):
        image, target = augment(scenes[number], 40, np.random.default_rng(number))
        assert image.shape == scenes[number].image.shape and image.dtype == np.uint8
        assert len(target.boxes) == len(target.labels) == len(target.masks) > 0
        assert target.masks.shape[1:] == (40, 40) and target.masks.min() >= 0 and target.masks.max() <= 1 + 1e-6
        for box, mask in zip(target.boxes * 40, target.masks, strict=True):
            rows, columns = torch.nonzero(mask.amax(1))[:, 0], torch.nonzero(mask.amax(0))[:, 0]
            around = torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
            assert ((box - around).abs() <= 1.01).all()
        sizes.add(len(target.labels) - len(scenes[number].labels))
    assert min(sizes) < 0 == max(sizes)  # crops lose objects


def test_a_target_holds_the_share_of_each_cell():
    mask = np.zeros((1, 8, 8), bool)
    mask[0, 2:5, 2:6] = True
    target = make_target(mask, np.array([3]), 4)
    assert target.masks[0].tolist() == [[0, 0, 0, 0], [0, 1, 1, 0], [0, 0.5, 0.5, 0], [0, 0, 0, 0]]
    assert target.boxes.tolist() == [[0.25, 0.25, 0.75, 0.625]]


def test_a_few_steps_lower_every_loss(run):
    _, result = run
    first, last = result["epochs"]
    assert last["train_loss"] < 0.8 * first["train_loss"]
    assert last["train_class_loss"] < first["train_class_loss"] and last["train_box_loss"] < first["train_box_loss"]
    assert result["parameters"] == 1_453_911 and result["processes"] == 1


def test_the_run_leaves_its_dashboard_and_its_network(run):
    folder, result = run
    scalars, steps = read_scalars(folder), EPOCHS * STEPS
    for name in ("loss", "class_loss", "box_loss", "mask_loss", "semantic_loss", "learning_rate", "scenes_per_second"):
        assert scalars[f"train/{name}"]["step"].tolist() == list(range(1, steps + 1))
    parts = sum(scalars[f"train/{name}_loss"]["value"] for name in losses.WEIGHTS)
    np.testing.assert_allclose(parts, scalars["train/loss"]["value"], rtol=1e-4)
    # A trapezoid, which is the same for any number of epochs until it falls.
    rates = [
        RATE * min((step + 1) / WARM_UP, 1, (steps - step) / (train_yolact.DECAY * steps)) for step in range(steps)
    ]
    np.testing.assert_allclose(scalars["train/learning_rate"]["value"], rates, rtol=1e-5)
    assert scalars["val/AP50"]["step"].tolist() == [STEPS, steps]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert EventAccumulator(folder).Reload().Tags()["images"] == ["predictions/validation"]
    assert json.loads(Path(folder, "result.json").read_text()) == json.loads(json.dumps(result))
    network = load_network(get_architecture("yolact_scenes"), Path(folder, "checkpoint.pt"))
    assert network.proto_net[0].weight.isfinite().all()


def test_two_spark_tasks_train_the_network_of_one_process(run, two_ranks):
    (folder, single), (spark_folder, result) = run, two_ranks["scenes"]
    told = {**single["settings"], "run_dir": spark_folder}
    assert result["processes"] == 2 and result["settings"] == told
    assert result["epochs"][1]["train_loss"] < 0.8 * result["epochs"][0]["train_loss"]
    assert result["epochs"][0]["train_loss"] == pytest.approx(single["epochs"][0]["train_loss"], rel=0.2)
    # Batch norm and hard negatives see half batches, so the two are close rather than equal.
    pyramids = [
        torch.cat([v.flatten() for key, v in weights(path).items() if "fpn" in key]) for path in (folder, spark_folder)
    ]
    assert torch.nn.functional.cosine_similarity(*pyramids, dim=0) > 0.99


def test_a_long_gradient_is_shortened_and_shown_as_it_was(fashion_mnist_root, tmp_path, monkeypatch):
    monkeypatch.setattr(train_yolact, "MAX_GRAD_NORM", 1e-12)
    one_step = [*SCENES, "--epochs", "1", "--train-scenes", "8", "--weight-decay", "0", "--validation-scenes", "1"]
    train_scenes(one_step, fashion_mnist_root, tmp_path)
    assert read_scalars(str(tmp_path))["train/gradient_norm"]["value"].iloc[0] > 1
    torch.manual_seed(0)
    network = build("yolact_scenes")
    train_yolact.initialize(network)
    # So short a gradient moves no weight, which AdamW would otherwise do by about the learning rate.
    torch.testing.assert_close(
        weights(tmp_path)["proto_net.0.weight"], network.proto_net[0].weight, rtol=0, atol=RATE / 20
    )


def test_less_than_one_batch_is_refused(fashion_mnist_root, tmp_path):
    with pytest.raises(TrainingError, match="8 training images are fewer than one batch of 32"):
        train_scenes(["--train-scenes", "8"], fashion_mnist_root, tmp_path)


def test_the_shipped_weights_find_unseen_items(fashion_mnist_root):
    assert WEIGHTS.stat().st_size <= 6_000_000
    network = load_network(get_architecture("yolact_scenes"), WEIGHTS)
    scenes = Scenes(fashion_mnist_root, "test")
    unseen = [scenes[number] for number in range(1000, 1050)]  # not those that the notebook reports
    found = segment(network, [scene.image for scene in unseen])
    precision = average_precision(to_coco(unseen, 1000), to_coco_results(dict(enumerate(found, start=1000))))
    assert precision["AP50"] >= 0.6 and precision["AP"] >= 0.4  # 50 scenes vary more than the notebook's 500


def test_the_shipped_weights_say_how_they_were_made():
    record = json.loads(WEIGHTS.with_suffix(".json").read_text())
    assert record["settings"]["epochs"] == len(record["epochs"])
    assert record["cpu_minutes"] <= 80 and record["val_AP50"] == record["epochs"][-1]["val_AP50"]
