"""Which device computes: OpenVINO's, or ONNX Runtime's behind the same face."""

import graphs
import numpy as np
import pytest

from helpers import pipeline
from helpers.bundle import runtime
from helpers.bundle.manifest import Bundle, load_bundle, save_bundle
from helpers.bundle.runtime import get_model, load_onnx
from helpers.config import load_config
from helpers.errors import BundleError, ConfigError, HostError, RunError
from helpers.pipeline import stages
from helpers.pipeline.driver import model_identity
from helpers.session import _jvm_settings
from helpers.storage import open_storage


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Bundle:
    """With an ONNX graph."""
    return graphs.color_scores(tmp_path_factory.mktemp("color_scores"))


@pytest.fixture(autouse=True)
def new_worker(monkeypatch):
    monkeypatch.setattr(runtime, "_models", {})


def pixels(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 8, 8, 3), np.uint8)


def test_onnx_runtime_gives_what_openvino_gives(bundle):
    batches = [(name, pixels(name)) for name in (5, 0, 1, 64)]
    expected = list(get_model(bundle).infer(batches))
    outputs = list(load_onnx(bundle, threads=1, provider="CPUExecutionProvider").infer(batches))
    assert [item for item, _ in outputs] == [5, 0, 1, 64] and outputs[1][1] == {}
    for (_, one), (_, other) in zip(outputs, expected, strict=True):
        assert set(one) == set(other)
        for name in one:
            assert one[name].dtype == np.float32
            np.testing.assert_allclose(one[name], other[name], atol=1e-4)


def test_a_bundle_without_an_onnx_graph_says_how_to_get_one(bundle_uri):
    with pytest.raises(BundleError, match="has no model.onnx.*--keep-onnx"):
        get_model(load_bundle(open_storage(bundle_uri)), device="CUDA")


def test_a_host_without_cuda_says_what_to_install(bundle):
    with pytest.raises(HostError, match="CPUExecutionProvider.*pip install onnxruntime-gpu"):
        get_model(bundle, device="CUDA")


def test_a_damaged_onnx_graph_is_named(bundle, tmp_path):
    files = {name: bundle.read(name) for name in bundle.manifest.files} | {"model.onnx": b"no graph"}
    damaged = save_bundle(open_storage(str(tmp_path)), bundle.manifest, files)
    with pytest.raises(BundleError, match="cannot load .*model.onnx"):
        load_onnx(damaged, threads=1, provider="CPUExecutionProvider")


def test_outputs_that_the_onnx_graph_lacks_are_named(bundle, tmp_path):
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    other = graphs.brightness(tmp_path / "brightness", outputs=(stages.OutputSpec("scores", (2,)),)).manifest
    with pytest.raises(BundleError, match="model.onnx has no output 'scores'"):
        load_onnx(save_bundle(open_storage(str(tmp_path / "mixed")), other, files), 1, "CPUExecutionProvider")


@pytest.mark.parametrize("device", ["GPU", "NPU", "GPU.1"])
def test_a_device_that_is_not_there_is_named_with_those_that_are(bundle, device):
    with pytest.raises(HostError, match=f"has the devices CPU here, and not {device}: install its driver"):
        get_model(bundle, device=device)


def test_auto_takes_what_there_is(bundle):
    images = [(None, pixels(3))]
    ((_, expected),), ((_, outputs),) = (get_model(bundle, device=name).infer(images) for name in ("CPU", "AUTO"))
    np.testing.assert_allclose(outputs["logits"], expected["logits"], atol=1e-4)


def test_a_run_on_a_device_that_is_not_there_stops_with_the_remedy(spark, samples, bundle_uri, tmp_path):
    config = load_config("local", **{"spark.master": "local[2]", "inference.device": "GPU"})
    with pytest.raises(RunError, match="the devices CPU here, and not GPU"):
        pipeline.run(spark, str(samples), bundle_uri, str(tmp_path / "out"), config)
    assert not (tmp_path / "out" / "results").exists()


def test_an_unknown_device_is_refused():
    with pytest.raises(ConfigError, match="inference.device"):
        load_config("local", **{"inference.device": "TPU"})


def test_results_of_another_device_than_the_cpu_have_another_model_name(bundle):
    names = {
        device: model_identity(bundle, {}, load_config("local", **{"inference.device": device}))
        for device in ("CPU", "GPU", "CUDA")
    }
    assert len(set(names.values())) == 3
    assert names["CPU"] == model_identity(bundle, {}, load_config("local"))


def test_tasks_of_a_cluster_ask_spark_for_their_share_of_a_gpu():
    def gpu(mode: str, device: str) -> dict[str, str]:
        changes = {"spark.mode": mode, "inference.device": device, "inference.gpu_share": 0.25}
        return {key: value for key, value in _jvm_settings(load_config("local", **changes)).items() if ".gpu." in key}

    assert (
        gpu("cluster", "CUDA")
        == gpu("cluster", "GPU")
        == {
            "spark.executor.resource.gpu.amount": "1",
            "spark.task.resource.gpu.amount": "0.25",
        }
    )
    assert gpu("cluster", "CPU") == gpu("local", "CUDA") == {}
