"""Training YOLACT from a checkpoint: with the same classes, with others, and with a file that does not fit."""

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_checkpoints import Killed, interrupted
from test_yolact_datasets import own_classes
from trainings import alone, train_scenes

import train_yolact
from helpers.config import PROJECT
from helpers.errors import BundleError
from helpers.export.architectures import get_architecture
from helpers.export.conversion import load_network
from helpers.metrics import average_precision
from helpers.storage import StorageOptions, open_storage
from helpers.training import Pace
from helpers.yolact import build
from studies.samples import write_scenes
from yolact.evaluation import segment, to_coco_results
from yolact.finetuning import load_initial_weights
from yolact.scenes import Scenes, to_coco

WEIGHTS = PROJECT / "notebooks" / "weights" / "yolact_scenes.pt"
STEPS, SEEN = 2, 12
# A training that learns next to nothing.
FEW = ["--epochs", "1", "--batch-size", "8", "--train-scenes", str(8 * STEPS), "--validation-scenes", str(SEEN)]
FEW += ["--learning-rate", "1e-9", "--precision", "fp32"]
FROM_SHIPPED = [*FEW, "--initial-weights", str(WEIGHTS)]
CLASS_LAYERS = [
    f"{layer}.{kind}"
    for layer in ("prediction_layers.0.conf_layer", "semantic_seg_conv")
    for kind in ("weight", "bias")
]


@pytest.fixture(scope="module")
def shipped() -> dict[str, torch.Tensor]:
    return torch.load(WEIGHTS, weights_only=True)


@pytest.fixture(scope="module")
def precision(fashion_mnist_root) -> float:
    """The AP of the shipped weights on the validation scenes."""
    scenes = [Scenes(fashion_mnist_root, "val")[number] for number in range(SEEN)]
    found = segment(load_network(get_architecture("yolact_scenes"), WEIGHTS), [scene.image for scene in scenes])
    return average_precision(to_coco(scenes), to_coco_results(dict(enumerate(found))))["AP"]


def stop_before_the_first_step(arguments: list[str], root: str, run_dir: Path) -> dict[str, Any]:
    """The parts of a training that is about to take its first step."""
    kept: dict[str, Any] = {}

    class Watched(train_yolact.Checkpoints):
        def __init__(self, place, group, parts, *others):
            kept.update(parts)
            super().__init__(place, group, parts, *others)

    def stop(pace):
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_yolact, "Checkpoints", Watched)
        patch.setattr(Pace, "start", stop)
        with pytest.raises(Killed):
            train_scenes(arguments, root, run_dir)
    return kept


def differences(network: torch.nn.Module, weights: dict[str, torch.Tensor]) -> list[str]:
    state = network.state_dict()
    assert state.keys() == weights.keys()
    return [key for key in state if not torch.equal(state[key], weights[key])]


def test_a_run_starts_from_every_weight_and_statistic(shipped, fashion_mnist_root, tmp_path, capsys):
    parts = stop_before_the_first_step(FROM_SHIPPED, fashion_mnist_root, tmp_path)
    assert differences(parts["network"], shipped) == [] and differences(parts["average"].module, shipped) == []
    assert "backbone.stem.1.running_var" in shipped
    assert f"checkpoint {WEIGHTS}: the training starts from its weights\n" in capsys.readouterr().out


def test_a_training_that_learns_next_to_nothing_keeps_the_precision(precision, fashion_mnist_root, tmp_path):
    started = time.process_time()
    result = train_scenes(FROM_SHIPPED, fashion_mnist_root, tmp_path)
    # Each step moves the statistics of the batch norms by a tenth towards a batch's own.
    assert result["val_AP"] == pytest.approx(precision, abs=0.03) and precision > 0.3
    assert result["settings"]["initial_weights"] == str(WEIGHTS)
    assert 0 < result["cpu_seconds"] <= time.process_time() - started  # not what this process did before


def test_other_classes_have_heads_of_their_own_and_the_rest_of_the_file(shipped, fashion_mnist_root, tmp_path, capsys):
    write_scenes(Scenes(fashion_mnist_root, "train"), str(tmp_path / "scenes"), 20)
    place = own_classes(str(tmp_path / "scenes"), tmp_path / "own")
    sets = ["--training-set", place, "--validation-set", place, "--train-scenes", "8", "--validation-scenes", "2"]
    random = stop_before_the_first_step([*FEW, *sets], "", tmp_path / "random")["network"]
    parts = stop_before_the_first_step([*FROM_SHIPPED, *sets], "", tmp_path / "run")
    assert parts["network"].configuration.labels == ("trousers", "boot", "top")
    own = {key: value for key, value in random.state_dict().items() if key in CLASS_LAYERS}
    assert len(own) == 4 and len(own["semantic_seg_conv.bias"]) == 3
    for network in (parts["network"], parts["average"].module):
        assert differences(network, {**shipped, **own}) == []
    notice = r"weights, but for prediction_layers.0.conf_layer and semantic_seg_conv, .* another number of classes\n"
    assert re.search(notice, capsys.readouterr().out)


def test_a_resumed_run_does_not_start_again(fashion_mnist_root, tmp_path):
    initial, run_dir = tmp_path / "initial.pt", tmp_path / "run"
    initial.write_bytes(WEIGHTS.read_bytes())
    arguments = [*FEW, "--initial-weights", str(initial), "--checkpoint-steps", "1", "--validation-scenes", "1"]
    interrupted(train_scenes, arguments, fashion_mnist_root, run_dir, after=1)
    initial.unlink()  # nobody asks for it again
    assert train_scenes(arguments, fashion_mnist_root, run_dir)["resumed_at"] == [1]


def test_weights_are_read_from_adls_and_stale_ones_left_out(shipped, fashion_mnist_root, adls_root, dfs, tmp_path):
    config = SimpleNamespace(storage=StorageOptions(dfs.endpoint, "env:ADLS_KEY"))
    torch.save({**shipped, "backbone.layer1.0.conv1.weight": torch.zeros(3)}, tmp_path / "old.pth")
    open_storage(adls_root, config).write("start here.pth", (tmp_path / "old.pth").read_bytes())
    reached = [*FEW, "--endpoint", dfs.endpoint, "--credential", "env:ADLS_KEY", "--initial-weights"]
    parts = stop_before_the_first_step([*reached, f"{adls_root}/start here.pth"], fashion_mnist_root, tmp_path / "run")
    assert differences(parts["network"], shipped) == []
    with pytest.raises(BundleError, match=r"abfss.*/gone.pth: this checkpoint cannot be read.*--initial-weights"):
        train_scenes([*reached, f"{adls_root}/gone.pth"], fashion_mnist_root, tmp_path / "none")


WRONG = {
    "another architecture": (lambda w: {"fc.weight": torch.zeros(2)}, "yolact_scenes: backbone.* is missing, expected"),
    "another shape": (
        lambda w: {**w, "fpn.lat_layers.0.bias": torch.zeros(7)},
        r"yolact_scenes: fpn.lat_layers.0.bias is \(7,\), expected \(64,\)",
    ),
    "one more": (lambda w: {**w, "more": torch.zeros(7)}, r"more is \(7,\), expected unknown"),
    "two numbers of classes": (
        lambda w: {**w, "semantic_seg_conv.bias": torch.zeros(80)},
        r"conf_layer.weight is \(33, 64, 3, 3\), expected \(243, 64, 3, 3\)",
    ),
    "no class layer": (lambda w: {k: v for k, v in w.items() if "semantic" not in k}, "semantic_seg_conv.* is missing"),
    "a list": (lambda w: [1], "holds a list, not a state dictionary"),
    "a network": (lambda w: build("yolact_scenes"), "is no PyTorch checkpoint or is damaged"),  # would run code
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_file_that_does_not_fit_names_the_first_difference(shipped, tmp_path, wrong):
    change, message = WRONG[wrong]
    torch.save(change(shipped), tmp_path / "wrong.pt")
    network = build("yolact_scenes")
    with pytest.raises(BundleError, match=f"wrong.pt.*{message}"):
        load_initial_weights(network, str(tmp_path / "wrong.pt"), alone())


def test_a_missing_file_is_named(tmp_path):
    for place, reason in ((tmp_path / "gone.pt", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(BundleError, match=f"{place}: this checkpoint cannot be read .{reason}.*--initial-weights"):
            load_initial_weights(build("yolact_scenes"), str(place), alone())
