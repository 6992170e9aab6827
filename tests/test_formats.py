"""One network in every engine, with random weights: the same outputs, and times that are comparable."""

import functools
import io

import cv2
import numpy as np
import onnx
import pandas as pd
import pytest
import torch

from helpers.errors import DataError
from helpers.export import conversion as export
from helpers.export.architectures import get_architecture
from helpers.storage import open_storage
from studies import benchmark, figures, formats
from studies.samples import make_frames, write_video
from yolact.scenes import Scenes

HEADS = {"loc": 4, "conf": 11, "mask": 16}


@pytest.fixture(scope="module")
def architecture():
    return get_architecture("yolact_scenes")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("formats")


@pytest.fixture(scope="module")
def network(architecture):
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return architecture.build().eval()


@pytest.fixture(scope="module")
def bundle(architecture, network, folder):
    torch.save(network.state_dict(), folder / "random.pt")
    model = export.simplify(export.to_onnx(network, architecture))
    onnx.save(model, folder / "model.onnx")
    target = open_storage(str(folder / "bundle"))
    return export.make_bundle(
        export.to_openvino(model, architecture), architecture, folder / "random.pt", target, "fp32"
    )


@pytest.fixture(scope="module")
def engines(architecture, network, bundle, folder):
    return {
        "PyTorch": formats.torch_engine(network, architecture),
        "ONNX": formats.onnx_engine(folder / "model.onnx", architecture),
        "OpenVINO": formats.openvino_engine(bundle),
    }


@pytest.fixture(scope="module")
def clip(folder, fashion_mnist_root):
    return write_video(folder / "clip.avi", make_frames(Scenes(fashion_mnist_root, "test", seed=1), 7))


@pytest.fixture(scope="module")
def frames(clip, architecture):
    return benchmark.read_frames(clip, architecture.input)


def test_the_bundle_says_what_the_network_gives(bundle):
    manifest = bundle.manifest
    assert manifest.task == "instance_segmentation" and len(manifest.labels) == 10
    assert [output.name for output in manifest.outputs] == ["loc", "conf", "mask", "proto"]
    assert np.load(io.BytesIO(bundle.read("priors.npy"))).shape == (1575, 4)


def test_every_engine_gives_the_networks_outputs(engines, network, frames, architecture):
    images = np.stack(frames[:2])
    mean, std = (torch.tensor(values) for values in (architecture.input.mean, architecture.input.std))
    with torch.inference_mode():
        loc, conf, mask, _, proto = network(((torch.from_numpy(images).float() - mean) / std).permute(0, 3, 1, 2))
    for engine in engines.values():
        found = engine(images)
        assert list(found) == ["loc", "conf", "mask", "proto"]
        for values, expected in zip(found.values(), (loc, conf, mask, proto), strict=True):
            np.testing.assert_allclose(values, expected, rtol=1e-3, atol=1e-4)


def test_a_compiled_network_is_traced_whole_and_gives_the_same_outputs(
    engines, network, frames, architecture, monkeypatch
):
    """With every step of `torch.compile` but the C++ compiler, which takes half a minute."""
    traced = []

    def backend(graph: torch.fx.GraphModule, examples: list[torch.Tensor]):
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend, fullgraph=True))
    found = formats.torch_engine(network, architecture, compiled=True)(frames[0][None])
    assert len(traced) == 1
    for name, expected in engines["PyTorch"](frames[0][None]).items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-3, atol=1e-4)


def test_differences_are_those_of_the_worst_image(engines, frames):
    off = {"same": engines["PyTorch"], "other": lambda images: shifted(engines["PyTorch"](images), images)}
    table = benchmark.largest_differences({"PyTorch": engines["PyTorch"], **off}, frames, "PyTorch")
    assert (table.loc["same"] == 0).all()
    assert table.loc["other", "loc"] == pytest.approx(max(frame.mean() for frame in frames), rel=1e-3)
    assert table.loc["other", ["conf", "mask", "proto"]].tolist() == [0, 0, 0]


def shifted(outputs: dict, images: np.ndarray) -> dict:
    return {**outputs, "loc": outputs["loc"] + images.mean()}


def test_frames_of_a_video_are_prepared_for_the_network(clip, frames, architecture, fashion_mnist_root):
    assert len(frames) == 7 and all(frame.shape == architecture.input.shape for frame in frames)
    originals = make_frames(Scenes(fashion_mnist_root, "test", seed=1), 7)
    for frame, original in zip(frames, originals, strict=True):
        # Compressed, so not the same; in another order of colors it would be far off.
        assert np.abs(cv2.blur(frame, (9, 9)).astype(float) - cv2.blur(original, (9, 9))).mean() < 6


def test_what_is_no_video_is_named(folder):
    (folder / "words.avi").write_text("no video")
    with pytest.raises(DataError, match=r"words\.avi"):
        benchmark.read_frames(folder / "words.avi", get_architecture("yolact_scenes").input)


def test_the_rate_of_a_matrix_product_counts_multiplications_and_additions(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])

    def product(a: torch.Tensor, b: torch.Tensor) -> None:
        assert a.shape == b.shape == (10, 10) and torch.get_num_threads() == 1
        clock[0] += 0.5

    monkeypatch.setattr(torch, "mm", product)
    assert benchmark.matrix_product_rate(threads=1, side=10) == 2 * 10**3 / 0.5


def test_engines_take_turns_and_are_compared_with_the_first(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: clock[0])

    def engine(name: str, seconds: float):
        def infer(images: np.ndarray) -> dict:
            assert images.shape == (1, 2, 2, 3)
            calls.append(name)
            clock[0] += seconds
            return {}

        return infer

    engines = {"eager": engine("eager", 2.0), "fast": engine("fast", 0.5)}
    table = benchmark.time_frames(engines, list(np.zeros((3, 2, 2, 3), np.uint8)), rounds=2)
    assert calls == ["eager", "fast", *(["eager"] * 4 + ["fast"] * 4) * 2]
    assert table["clip, s"].to_dict() == {"eager": 6.0, "fast": 1.5}
    assert table["frame, ms"].to_dict() == {"eager": 2000, "fast": 500}
    assert table["of eager"].to_dict() == {"eager": 1, "fast": 0.25}


def test_throughput_is_measured_on_every_frame(bundle, frames):
    found = benchmark.time_parallel({"one": bundle}, frames, threads=2)
    assert list(found.index) == ["one"] and 0 < found["one"] < 60_000


def test_ratios_of_two_networks_stand_beside_what_was_published():
    tables = {
        "small": pd.DataFrame({"of PyTorch": [1.0, 0.4, 0.5]}, index=["PyTorch", "ONNX", "torch.compile"]),
        "large": pd.DataFrame({"of PyTorch": [1.0, 0.523]}, index=["PyTorch", "ONNX"]),
    }
    table = benchmark.ratio_table(tables)
    assert table.loc["ONNX"].tolist() == ["0.40", "0.52"]
    assert table.loc["torch.compile"].tolist() == ["0.50", "not measured"]
    assert table.iloc[-1].tolist() == ["0.70 to 0.83"] * 2
    assert len(figures.plot_ratios(tables, benchmark.PUBLISHED).axes) == 2
