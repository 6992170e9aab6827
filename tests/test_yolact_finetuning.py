"""Training YOLACT from a checkpoint: with the same classes, with others, and with a file that does not fit."""

import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.data.scenes import Scenes, to_coco, write_scenes
from helpers.yolact.evaluation import segment, to_coco_results
from helpers.yolact.training import SceneSettings, train
from test_checkpoints import Killed, interrupted
from test_yolact_datasets import own_classes

from helpers.config import PROJECT
from helpers.errors import BundleError
from helpers.metrics import average_precision
from helpers.models.architectures import get_architecture
from helpers.models.export import load_network
from helpers.storage import StorageOptions, open_storage
from helpers.yolact import build, training

WEIGHTS = PROJECT / "notebooks" / "weights" / "yolact_scenes.pt"
STEPS, SEEN = 2, 12
SETTINGS = SceneSettings(
    epochs=1,
    batch_size=8,
    train_scenes=8 * STEPS,
    val_scenes=SEEN,
    learning_rate=1e-9,
    schedule="constant",
    precision="fp32",
    initial_weights=str(WEIGHTS),
)
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


def stop_before_the_first_step(settings: SceneSettings, root: str, run_dir: Path) -> training._Run:
    """A run that is about to take its first step."""
    runs = []

    def stop(run, batch):
        runs.append(run)
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Run, "step", stop)
        with pytest.raises(Killed):
            train(settings, root, str(run_dir))
    return runs[0]


def differences(network: torch.nn.Module, weights: dict[str, torch.Tensor]) -> list[str]:
    state = network.state_dict()
    assert state.keys() == weights.keys()
    return [key for key in state if not torch.equal(state[key], weights[key])]


def test_a_run_starts_from_every_weight_and_statistic(shipped, precision, fashion_mnist_root, tmp_path, capsys):
    run = stop_before_the_first_step(SETTINGS, fashion_mnist_root, tmp_path)
    assert differences(run.network, shipped) == [] and differences(run.averaged, shipped) == []
    assert "backbone.stem.1.running_var" in shipped
    assert run.evaluate(0)["val_AP"] == precision > 0.3
    assert f"checkpoint {WEIGHTS}: the training starts from its weights\n" in capsys.readouterr().out


def test_a_training_that_learns_next_to_nothing_keeps_the_precision(precision, fashion_mnist_root, tmp_path):
    started = time.process_time()
    result = train(SETTINGS, fashion_mnist_root, str(tmp_path))
    # Each step moves the statistics of the batch norms by a tenth towards a batch's own.
    assert result["val_AP"] == pytest.approx(precision, abs=0.03)
    assert result["settings"]["initial_weights"] == str(WEIGHTS)
    assert 0 < result["cpu_seconds"] <= time.process_time() - started  # not what this process did before


def test_other_classes_have_heads_of_their_own_and_the_rest_of_the_file(shipped, fashion_mnist_root, tmp_path, capsys):
    write_scenes(Scenes(fashion_mnist_root, "train"), str(tmp_path / "scenes"), 20)
    place = own_classes(str(tmp_path / "scenes"), tmp_path / "own")
    settings = replace(SETTINGS, training_set=place, validation_set=place, train_scenes=8, val_scenes=2)
    random = stop_before_the_first_step(replace(settings, initial_weights=None), "", tmp_path / "random").network
    run = stop_before_the_first_step(settings, "", tmp_path / "run")
    assert run.labels == ("trousers", "boot", "top")
    own = {key: value for key, value in random.state_dict().items() if key in CLASS_LAYERS}
    assert len(own) == 4 and len(own["semantic_seg_conv.bias"]) == 3
    assert differences(run.network, {**shipped, **own}) == [] and differences(run.averaged, {**shipped, **own}) == []
    notice = r"weights, but for prediction_layers.0.conf_layer and semantic_seg_conv, .* another number of classes\n"
    assert re.search(notice, capsys.readouterr().out)


def test_a_resumed_run_does_not_start_again(fashion_mnist_root, tmp_path):
    initial, run_dir = tmp_path / "initial.pt", tmp_path / "run"
    initial.write_bytes(WEIGHTS.read_bytes())
    settings = replace(SETTINGS, initial_weights=str(initial), checkpoint_steps=1, val_scenes=1)
    interrupted(train, settings, fashion_mnist_root, run_dir, after=1)
    initial.unlink()  # nobody asks for it again
    assert train(settings, fashion_mnist_root, str(run_dir))["resumed_at"] == [1]


def test_weights_are_read_from_adls_and_stale_ones_left_out(shipped, fashion_mnist_root, adls_root, dfs, tmp_path):
    settings = replace(
        SETTINGS, initial_weights=f"{adls_root}/start here.pth", storage=StorageOptions(dfs.endpoint, "env:ADLS_KEY")
    )
    torch.save({**shipped, "backbone.layer1.0.conv1.weight": torch.zeros(3)}, tmp_path / "old.pth")
    open_storage(adls_root, settings).write("start here.pth", (tmp_path / "old.pth").read_bytes())
    run = stop_before_the_first_step(settings, fashion_mnist_root, tmp_path / "run")
    assert differences(run.network, shipped) == []
    with pytest.raises(BundleError, match=r"abfss.*/gone.pth: this checkpoint cannot be read.*initial_weights"):
        train(replace(settings, initial_weights=f"{adls_root}/gone.pth"), fashion_mnist_root, str(tmp_path / "none"))


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
def test_a_file_that_does_not_fit_names_the_first_difference(shipped, fashion_mnist_root, tmp_path, wrong):
    change, message = WRONG[wrong]
    torch.save(change(shipped), tmp_path / "wrong.pt")
    settings = replace(SETTINGS, initial_weights=str(tmp_path / "wrong.pt"))
    with pytest.raises(BundleError, match=f"wrong.pt.*{message}"):
        train(settings, fashion_mnist_root, str(tmp_path / "run"))


def test_a_missing_file_is_named(fashion_mnist_root, tmp_path):
    for place, reason in ((tmp_path / "gone.pt", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(BundleError, match=f"{place}: this checkpoint cannot be read .{reason}.*initial_weights"):
            train(replace(SETTINGS, initial_weights=str(place)), fashion_mnist_root, str(tmp_path / "run"))
