import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fashion_data import CLASSES
from helpers.errors import BundleError
from helpers.export import conversion as export
from helpers.export.architectures import drop_stale_keys, get_architecture
from helpers.yolact import build
from helpers.yolact.configurations import COCO_CLASSES, CONFIGURATIONS
from helpers.yolact.network import _by_anchor
from helpers.yolact.priors import level_sizes, make_priors

# Of the published checkpoints: entries, parameters, and anchors.
PUBLISHED = {
    "yolact_base": (660, 50_157_071, 19_248),
    "yolact_resnet50": (354, 31_164_943, 19_248),
    "yolact_darknet53": (348, 47_783_087, 19_248),
    "yolact_im700": (660, 50_157_071, 30_963),
}
LISTINGS = Path(__file__).parent / "yolact_keys"
each_network = pytest.mark.parametrize("name", PUBLISHED)


def empty(name: str) -> torch.nn.Module:
    """A network without memory for its weights, which is made at once."""
    with torch.device("meta"):
        return build(name)


@each_network
def test_weights_have_the_names_shapes_and_types_of_the_published(name):
    lines = (LISTINGS / f"state_dict_{name}.txt").read_text().splitlines()
    expected = [line for line in lines if not line.startswith("#")]
    assert len(expected) == PUBLISHED[name][0]
    found = [
        f"{key} {'x'.join(map(str, value.shape)) or 'scalar'} {str(value.dtype).removeprefix('torch.')}"
        for key, value in empty(name).state_dict().items()
    ]
    assert found == expected


@each_network
def test_a_network_has_as_many_parameters_and_anchors_as_the_published(name):
    network = empty(name)
    _, parameters, anchors = PUBLISHED[name]
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert network.priors.shape == (anchors, 4)


def test_every_published_network_can_be_exported():
    assert set(CONFIGURATIONS) == {*PUBLISHED, "yolact_scenes"}
    for name in PUBLISHED:
        configuration = CONFIGURATIONS[name]
        architecture = get_architecture(name)
        assert architecture.input.shape == (configuration.size, configuration.size, 3)
        assert (architecture.input.color, architecture.input.resize) == ("rgb", "stretch")
        assert architecture.labels == COCO_CLASSES and len(set(COCO_CLASSES)) == 80
    assert (COCO_CLASSES[0], COCO_CLASSES[61], COCO_CLASSES[79]) == ("person", "toilet", "toothbrush")
    assert get_architecture("yolact_darknet53").input.std == (255, 255, 255)


def test_the_small_network_has_a_level_for_each_scale_and_fits_the_repository():
    configuration = CONFIGURATIONS["yolact_scenes"]
    network = build("yolact_scenes").eval()
    assert sum(value.nbytes for value in network.state_dict().values()) <= 6_000_000
    with torch.no_grad():
        loc, conf, mask, priors, proto = network(torch.zeros(2, 3, 160, 160))
    anchors = 3 * (20 * 20 + 10 * 10 + 5 * 5)
    assert (loc.shape, conf.shape, mask.shape) == ((2, anchors, 4), (2, anchors, 11), (2, anchors, 16))
    assert priors.shape == (anchors, 4) and proto.shape == (2, 40, 40, 16)
    np.testing.assert_allclose(
        priors[-1, 2:], np.float32([2**0.5, 0.5**0.5]) * configuration.scales[2] / 160, rtol=1e-6
    )
    assert get_architecture("yolact_scenes").labels == CLASSES


def test_an_unknown_network_lists_the_known():
    with pytest.raises(BundleError, match="'yolact_plus'.*yolact_resnet50"):
        build("yolact_plus")


@pytest.mark.parametrize(
    ("size", "levels"), [(550, [69, 35, 18, 9, 5]), (700, [88, 44, 22, 11, 6]), (64, [8, 4, 2, 1, 1])]
)
def test_levels_are_halves_rounded_up(size, levels):
    assert level_sizes(size) == levels


def test_anchors_are_squares_around_the_cells_centres():
    priors = make_priors(CONFIGURATIONS["yolact_resnet50"])
    assert priors.dtype == np.float32
    centre = 0.5 / 69
    sides = [24 / 550, 24 / 550 / 2**0.5, 24 / 550 * 2**0.5]
    np.testing.assert_allclose(priors[:3], [[centre, centre, side, side] for side in sides], rtol=1e-6)
    np.testing.assert_allclose(priors[:3, 2], [0.0436364, 0.0308556, 0.0617111], atol=1e-7)
    np.testing.assert_allclose(priors[3, :2], [3 * centre, centre], rtol=1e-6)  # columns before rows
    np.testing.assert_allclose(priors[69 * 3, :2], [centre, 3 * centre], rtol=1e-6)
    np.testing.assert_allclose(priors[69 * 69 * 3], [0.5 / 35, 0.5 / 35, 48 / 550, 48 / 550], rtol=1e-6)
    np.testing.assert_allclose(priors[-1], [0.9, 0.9, 384 / 550 * 2**0.5, 384 / 550 * 2**0.5], rtol=1e-6)


def test_anchors_without_the_slip_have_their_ratios():
    priors = make_priors(replace(CONFIGURATIONS["yolact_base"], square_anchors=False))
    np.testing.assert_allclose(priors[:3, 2] / priors[:3, 3], [1, 0.5, 2], rtol=1e-6)
    np.testing.assert_allclose(priors[:3, 2] * priors[:3, 3], (24 / 550) ** 2, rtol=1e-6)


@pytest.mark.parametrize("name", ["yolact_resnet50", "yolact_darknet53"])
def test_the_raw_heads_have_their_shapes_and_ranges_for_any_size_of_image(name):
    network = build(name).eval()
    with torch.inference_mode():
        loc, conf, mask, priors, proto = network(torch.randn(2, 3, 200, 200))
    anchors = 3 * sum(side**2 for side in level_sizes(200))
    assert loc.shape == (2, anchors, 4) and conf.shape == (2, anchors, 81) and mask.shape == (2, anchors, 32)
    assert priors.shape == (anchors, 4) and proto.shape == (2, 50, 50, 32)
    assert {t.dtype for t in (loc, conf, mask, priors, proto)} == {torch.float32}
    torch.testing.assert_close(conf.sum(dim=2), torch.ones(2, anchors))
    assert mask.abs().max() < 1 and proto.min() == 0


def test_in_training_classes_are_logits_and_the_semantic_segmentation_is_there():
    network = build("yolact_resnet50").train()
    loc, conf, mask, priors, proto, semantic = network(torch.randn(2, 3, 100, 100))
    assert semantic.shape == (2, 80, 13, 13) and proto.shape == (2, 26, 26, 32)
    assert (conf.sum(dim=2) - 1).abs().max() > 1e-3


def test_outputs_go_by_row_column_and_anchor():
    maps = torch.arange(2 * 6 * 3 * 5).reshape(2, 6, 3, 5)  # 2 anchors of 3 values
    found = _by_anchor(maps, 3)
    assert found.shape == (2, 30, 3)
    for row, column, anchor in ((0, 0, 0), (0, 1, 1), (2, 4, 1)):
        place = (row * 5 + column) * 2 + anchor
        assert found[1, place].tolist() == maps[1, anchor * 3 : anchor * 3 + 3, row, column].tolist()


def test_importing_what_executors_need_does_not_import_torch():
    script = (
        "import sys, helpers.yolact.detection, helpers.yolact.masks, helpers.yolact.priors; "
        "import helpers.tasks; "
        "print('torch' in sys.modules, len(sys.modules) > 50)"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.split() == ["False", "True"]


STALE = {
    "backbone.layer1.0.conv1.weight": (64, 64, 1, 1),
    "backbone.layer4.2.bn3.num_batches_tracked": (),
    "fpn.downsample_layers.2.weight": (256, 256, 3, 3),
    "fpn.downsample_layers.13.bias": (256,),
}


def test_left_over_keys_are_dropped_and_no_others():
    kept = dict.fromkeys(empty("yolact_resnet50").state_dict(), 0)
    assert {"backbone.layers.0.0.conv1.weight", "fpn.downsample_layers.1.bias"} <= set(kept)
    assert drop_stale_keys({**kept, **dict.fromkeys(STALE, 0)}) == kept


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return build("yolact_resnet50").state_dict()


def test_an_official_file_in_the_old_format_with_left_over_keys_loads(weights, tmp_path):
    stale = {key: torch.zeros(shape) for key, shape in STALE.items()}
    path = tmp_path / "yolact_resnet50_54_800000.pth"
    torch.save({**stale, **weights}, path, _use_new_zipfile_serialization=False)
    assert path.read_bytes()[:2] != b"PK"
    network = export.load_network(get_architecture("yolact_resnet50"), path)
    assert not network.training
    for key, value in network.state_dict().items():
        assert torch.equal(value, weights[key]), key


def without(key):
    return lambda weights: {k: v for k, v in weights.items() if k != key}


WRONG = {
    "no prototypes": (without("proto_net.4.bias"), r"proto_net\.4\.bias is missing, expected \(256,\)"),
    "other classes": (
        lambda w: {**w, "prediction_layers.0.conf_layer.weight": torch.zeros(63, 256, 3, 3)},
        r"prediction_layers\.0\.conf_layer\.weight is \(63, 256, 3, 3\), expected \(243, 256, 3, 3\)",
    ),
    "plus": (
        lambda w: {**w, "backbone.layers.1.0.conv2.bias": torch.zeros(128)},
        r"backbone\.layers\.1\.0\.conv2\.bias is \(128,\), expected unknown",
    ),
    "two wrong": (
        lambda w: {**without("fpn.lat_layers.0.bias")(w), "semantic_seg_conv.bias": torch.zeros(1)},
        r"fpn\.lat_layers\.0\.bias is missing",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_file_names_the_first_key_that_differs(weights, tmp_path, wrong):
    change, message = WRONG[wrong]
    torch.save(change(weights), tmp_path / "wrong.pth")
    with pytest.raises(BundleError, match=f"wrong.pth is not a checkpoint of yolact_resnet50: {message}"):
        export.load_network(get_architecture("yolact_resnet50"), tmp_path / "wrong.pth")


def test_a_checkpoint_of_another_backbone_names_the_first_key(weights, tmp_path):
    torch.save(weights, tmp_path / "r50.pth")
    with pytest.raises(BundleError, match=r"yolact_base: backbone\.layers\.2\.6\.conv1\.weight is missing"):
        export.load_network(get_architecture("yolact_base"), tmp_path / "r50.pth")


def test_a_file_cut_short_is_said_to_be_damaged(weights, tmp_path):
    torch.save(weights, tmp_path / "cut.pth", _use_new_zipfile_serialization=False)
    content = (tmp_path / "cut.pth").read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(BundleError, match="cut.pth is no PyTorch checkpoint or is damaged"):
        export.load_network(get_architecture("yolact_resnet50"), tmp_path / "cut.pth")


def test_a_list_is_no_state_dictionary(tmp_path):
    torch.save([torch.zeros(3)], tmp_path / "list.pth")
    with pytest.raises(BundleError, match="list.pth holds a list"):
        export.load_network(get_architecture("yolact_resnet50"), tmp_path / "list.pth")
