import pytest

from helpers.export import conversion as export
from helpers.export import graph
from helpers.export.architectures import get_architecture
from helpers.yolact import build
from studies import formats


@pytest.fixture(scope="module")
def classifier():
    architecture = get_architecture("fashion_cnn")
    return export.to_openvino(export.to_onnx(architecture.build().eval(), architecture), architecture)


def test_a_graphs_operations_are_counted_by_hand(classifier):
    # Two 5 x 5 convolutions of 1 to 16 channels at 28 x 28 and 16 to 32 at 14 x 14, and 1568 times 10 products.
    by_hand = 2 * (28 * 28 * 25 * 16 + 14 * 14 * 25 * 16 * 32 + 1568 * 10)
    assert graph.count_flops(classifier) == by_hand
    assert formats.summarize(classifier).loc["total", "GFLOPs"] == pytest.approx(by_hand / 1e9)


def test_a_summary_counts_layers_and_parameters_by_type(classifier):
    table = formats.summarize(classifier)
    assert table.loc["Convolution", "layers"] == 2 and table.loc["MatMul", "layers"] == 1
    assert table.loc["Convolution", "parameters, M"] == pytest.approx((25 * 16 + 25 * 16 * 32) / 1e6)
    assert table.loc["MatMul", "parameters, M"] == pytest.approx(15680 / 1e6)
    assert "Constant" not in table.index
    assert table.loc["total", "layers"] == table["layers"][:-1].sum()


def test_parameters_that_levels_share_are_counted_once():
    network, architecture = build("yolact_scenes").eval(), get_architecture("yolact_scenes")
    model = export.to_openvino(export.to_onnx(network, architecture), architecture)
    # Of training only, and so not exported.
    kernels = sum(p.numel() for name, p in network.named_parameters() if p.dim() == 4 and "semantic" not in name)
    assert formats.summarize(model).loc["Convolution", "parameters, M"] == pytest.approx(kernels / 1e6)
    names = [n.get_friendly_name() for n in model.get_ops() if n.get_type_name() == "Convolution"]
    assert {f"prediction_layers.0.bbox_layer/Conv{n}/WithoutBiases" for n in ("", ".2", ".3")} <= set(names)
