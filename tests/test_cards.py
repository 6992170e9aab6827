"""A model card makes any network of a user's own program one that can be exported."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from helpers.config import PROJECT
from helpers.errors import BundleError
from helpers.export.architectures import get_architecture
from helpers.export.cards import CARDS, find_cards, merge, read_labels
from helpers.export.conversion import export
from helpers.images.spec import InputSpec
from helpers.storage import open_storage

NETWORK = """
from torch import nn
from parts import CHANNELS

class Tiny(nn.Sequential):
    def __init__(self, classes=3):
        super().__init__(nn.Conv2d(3, CHANNELS, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(CHANNELS, classes))

class Needy(nn.Linear):
    pass

number = 5
"""
CARD = {
    "task": "classification",
    "network": "network.py:Tiny",
    "labels": ["a", "b", "größer"],
    "input": {"height": 8, "width": 10, "color": "rgb", "mean": [1, 2, 3], "std": [4, 5, 6], "resize": "crop"},
}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A user's program, of two files."""
    (tmp_path / "network.py").write_text(NETWORK)
    (tmp_path / "parts.py").write_text("CHANNELS = 4")
    return tmp_path


def write(folder: Path, **changes) -> str:
    """The path of a card; a change to None leaves the entry out."""
    entries = {name: value for name, value in {**CARD, **changes}.items() if value is not None}
    (folder / "mine.yaml").write_text(yaml.safe_dump(entries))
    return str(folder / "mine.yaml")


def test_a_card_says_what_its_architecture_is(folder):
    architecture = get_architecture(write(folder, postprocess={"top_k": 1}))
    assert (architecture.name, architecture.task, architecture.labels) == (
        "mine",
        "classification",
        ("a", "b", "größer"),
    )
    assert architecture.input == InputSpec(8, 10, "rgb", (1.0, 2.0, 3.0), (4.0, 5.0, 6.0), "crop")
    assert (architecture.outputs, architecture.postprocess) == (("logits",), {"top_k": 1})
    assert architecture.build()(torch.zeros(2, 3, 8, 10)).shape == (2, 3)
    assert str(folder) not in sys.path


def test_labels_may_be_a_file(folder):
    (folder / "labels.txt").write_text("a\nb\ngrößer\n", encoding="utf-8")
    assert get_architecture(write(folder, labels="labels.txt")).labels == ("a", "b", "größer")


LABEL_FILES = {
    "one per line": ("a\nb\n\ngrößer", ["a", "b", "größer"]),
    "numbers of ImageNet before them": ("n01440764 tench, Tinca\nn01443537 goldfish\n", ["tench, Tinca", "goldfish"]),
    "a map of TensorFlow's": (
        'item {\n name: "/m/1"\n id: 1\n display_name: "person"\n}\nitem { id: 3 name: \'car\' }',
        ["person", "2", "car"],
    ),
}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.json", '["a", "b", "c"]'),
        ("config.json", '{"architectures": ["Net"], "id2label": {"0": "a", "2": "c", "1": "b"}}'),
        ("data.yaml", "path: images\nnames:\n  0: a\n  1: b\n  2: c"),
        ("numbers.yml", "{2: c, 1: b, 0: a}"),
        ("class_indices.json", '{"a": 0, "c": 2, "b": 1}'),
    ],
)
def test_labels_of_other_programs_files_are_read(folder, name, text):
    (folder / name).write_text(text)
    assert get_architecture(write(folder, labels=name)).labels == ("a", "b", "c")
    assert get_architecture(write(folder, labels={1: "b", 0: "a", 2: "c"})).labels == ("a", "b", "c")
    for wrong, message in (
        ("{1: a, 2: b}", "labels lack class 0"),
        ("{a: b}", "a map from each"),
        ("a: [", "holds no"),
    ):
        (folder / name).write_text(wrong)
        with pytest.raises(BundleError, match=message) as error:
            read_labels(folder / name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", LABEL_FILES)
def test_files_of_labels_may_be_of_several_kinds(tmp_path, kind):
    text, labels = LABEL_FILES[kind]
    (tmp_path / "labels.txt").write_text(text, encoding="utf-8")
    assert read_labels(tmp_path / "labels.txt") == labels


def test_a_file_without_labels_is_named(tmp_path):
    (tmp_path / "labels.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text("\n")
    for name in ("labels.txt", "empty.txt"):
        with pytest.raises(BundleError, match=f"{name} holds no labels"):
            read_labels(tmp_path / name)


def test_another_decoders_parameters_are_not_kept():
    own = {"decoder": "yolo", "postprocess": {"nms_threshold": 0.4}, "input": {"height": 8, "resize": "letterbox"}}
    assert merge(own, {"postprocess": {"top_k": 2}})["postprocess"] == {"nms_threshold": 0.4, "top_k": 2}
    merged = merge(own, {"decoder": "detr", "input": {"height": 9}})
    assert merged["postprocess"] == {} and merged["input"] == {"height": 9, "resize": "letterbox"}


def test_the_command_exports_a_network_by_the_path_of_its_card(folder):
    card = write(folder)
    torch.manual_seed(0)
    torch.save(get_architecture(card).build().state_dict(), folder / "mine.pt")
    command = [sys.executable, "-m", "helpers", "export", "--architecture", "mine.yaml", "--checkpoint", "mine.pt"]
    answer = subprocess.run([*command, "--output", "bundle"], cwd=folder, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    manifest = json.loads((folder / "bundle" / "manifest.json").read_text())
    assert manifest["architecture"] == "mine" and manifest["labels"] == CARD["labels"]
    assert [output["shape"] for output in manifest["outputs"]] == [[3]]


def test_labels_that_are_not_as_many_as_the_outputs_are_refused(folder):
    card = write(folder, labels=["a", "b"])
    torch.save(get_architecture(card).build().state_dict(), folder / "mine.pt")
    with pytest.raises(BundleError, match=r"mine: its output logits is \[3\], and 2 labels need .*correct the labels"):
        export(card, folder / "mine.pt", open_storage(str(folder / "bundle")))
    assert not (folder / "bundle").exists()


WRONG = {
    "no file": ({"network": "gone.py:Tiny"}, "network names 'gone.py', which is in none of "),
    "no class": ({"network": "network.py:Huge"}, "network.py has no class 'Huge', which .*mine.yaml names"),
    "no colon": ({"network": "network.py"}, "network is 'network.py': write FILE.py:CLASS"),
    "no class but a number": ({"network": "network.py:number"}, "network.py has no class 'number'"),
    "arguments": ({"network": "network.py:Needy"}, "Needy in .*network.py needs arguments .*in_features"),
    "no labels file": ({"labels": "labels.txt"}, "labels names 'labels.txt', which is in none of "),
    "no labels": ({"labels": None}, "labels is missing"),
    "no network": ({"network": None}, "network is missing"),
    "no height": (
        {"input": {"width": 3, "color": "rgb", "mean": [1, 2, 3], "std": [4, 5, 6]}},
        "input.height is missing",
    ),
    "an unknown entry": ({"postprocessing": {}}, "postprocessing: no such entry; did you mean 'postprocess'"),
    "an unknown task": ({"task": "poetry"}, "task is 'poetry'; there are .*classification"),
    "a task of nearly that name": ({"task": "clasification"}, "did you mean 'classification'"),
    "an unknown decoder": ({"decoder": "softmx"}, "decoder is 'softmx'; did you mean 'softmax'"),
    "an unknown color": ({"input": {**CARD["input"], "color": "cmyk"}}, "input.color: .*rgb"),
    "an unknown input": (
        {"input": {**CARD["input"], "depth": 3}},
        "input.depth: no such entry; there are height, width",
    ),
    "too few means": ({"input": {**CARD["input"], "mean": [1]}}, "input: .*mean and std need 3 values"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_entry_is_named_in_one_sentence(folder, wrong):
    changes, message = WRONG[wrong]
    with pytest.raises(BundleError, match=message) as error:
        get_architecture(write(folder, **changes))
    assert "\n" not in str(error.value) and str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"), [("a: [", "not valid YAML"), ("- a", "holds no entries"), ("", "holds no entries")]
)
def test_a_file_that_is_no_card_is_named(tmp_path, content, message):
    (tmp_path / "mine.yaml").write_text(content)
    with pytest.raises(BundleError, match=f"mine.yaml .*{message}|mine.yaml is {message}"):
        get_architecture(str(tmp_path / "mine.yaml"))
    with pytest.raises(BundleError, match="there is no model card .*gone.yaml"):
        get_architecture(str(tmp_path / "gone.yaml"))


def test_a_program_that_cannot_be_imported_is_named_with_its_error(folder):
    (folder / "broken.py").write_text("import nothing_of_that_name")
    with pytest.raises(BundleError, match="broken.py cannot be imported: ModuleNotFoundError: No module"):
        get_architecture(write(folder, network="broken.py:Tiny"))


def test_the_projects_own_cards_name_networks_and_labels_that_are_there():
    assert find_cards() == ["fashion_cnn", "fashion_resnet"] and CARDS == PROJECT / "conf" / "cards"
    from fashion_data import CLASSES
    from fashion_mnist import MEAN, NETWORKS, STD

    for name in find_cards():
        architecture = get_architecture(name)
        assert architecture.build.__name__ == NETWORKS[name].__name__ and architecture.labels == CLASSES
        assert architecture.input == InputSpec(28, 28, "gray", (MEAN,), (STD,))
        # The network takes what training gives it.
        assert architecture.build().eval()(torch.zeros(1, 1, 28, 28)).shape == (1, len(CLASSES))


def test_the_scenes_have_the_same_classes():
    from fashion_data import CLASSES

    assert get_architecture("yolact_scenes").labels == CLASSES
