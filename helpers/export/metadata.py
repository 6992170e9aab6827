"""What model files say of themselves, in the form of a card: ultralytics', OpenVINO Model API's and TensorFlow Lite's.

Sources: the keys that https://docs.ultralytics.com/modes/export writes into ONNX files (and `metadata.yaml` beside
OpenVINO's); https://github.com/open-edge-platform/model_api, `docs/source/guides/model-configuration.md`;
https://ai.google.dev/edge/litert/conversion/tensorflow/metadata, labels as an archive at the file's end.
"""

import ast
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from helpers.export.cards import Entries, parse_labels

if TYPE_CHECKING:
    import openvino as ov

ULTRALYTICS_TASKS = {
    "detect": "detection",
    "segment": "instance_segmentation",
    "pose": "keypoints",
    "classify": "classification",
}
ULTRALYTICS_FILES = ("metadata.json", "temp_meta.txt")  # in a TensorFlow Lite file, one of them
MODEL_API_TASKS = {
    "classification": ("classification", ""),
    "ssd": ("detection", "end_to_end"),
    "detr": ("detection", "detr"),
    "yolo": ("detection", "yolo"),
    "segmentation": ("semantic_segmentation", "logits"),
    "maskrcnn": ("instance_segmentation", "mask_rcnn"),
}
MODEL_API_RESIZES = {
    "standard": {"resize": "stretch"},
    "fit_to_window": {"resize": "letterbox", "position": "top_left"},
    "fit_to_window_letterbox": {"resize": "letterbox"},
    "crop": {"resize": "crop"},
}


def read_metadata(path: Path, model: "ov.Model") -> Entries:
    """The entries of a card that a model's file, or what lies beside it, gives; empty where it says nothing."""
    if path.suffix == ".tflite":
        return _of_tflite(path, model)
    properties = _of_onnx(path) if path.suffix == ".onnx" else _of_openvino(path, model)
    if "names" in properties and "stride" in properties:
        return _from_ultralytics(properties)
    return _from_model_api(properties) if properties.get("model_type") else {}


def _of_onnx(path: Path) -> dict[str, Any]:
    import onnx

    properties = {entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props}
    return {key.removeprefix("model_info "): value for key, value in properties.items()}


def _of_openvino(path: Path, model: "ov.Model") -> dict[str, Any]:
    beside = path.with_name("metadata.yaml")
    if path.suffix == ".xml" and beside.is_file():
        entries = yaml.safe_load(beside.read_text(encoding="utf-8"))
        return entries if isinstance(entries, dict) else {}
    if not model.has_rt_info("model_info"):
        return {}
    values = model.get_rt_info("model_info").value
    return {key: value if isinstance(value, str) else value.astype(str) for key, value in values.items()}


def _of_tflite(path: Path, model: "ov.Model") -> Entries:
    if not zipfile.is_zipfile(path):
        return {}
    with zipfile.ZipFile(path) as archive:
        texts = [archive.read(name).decode("utf-8") for name in archive.namelist() if name in ULTRALYTICS_FILES]
        properties = _literal(texts[0], None) or yaml.safe_load(texts[0]) if texts else {}  # Python's or JSON
        if isinstance(properties, dict) and "names" in properties and "stride" in properties:
            entries = _from_ultralytics(properties)
            if not model.input().get_element_type().is_real():  # it scales whole numbers itself
                del entries["input"]["std"]
            return entries
        names = [name for name in archive.namelist() if name.endswith(".txt")]
        labels = parse_labels(archive.read(names[0]).decode("utf-8"), f"{path}: {names[0]}") if names else []
    shapes = [output.get_partial_shape() for output in model.outputs]
    is_classifier = len(shapes) == 1 and [side.get_max_length() for side in list(shapes[0])[1:]] == [len(labels)]
    return {"labels": labels, **({"task": "classification"} if is_classifier else {})}


def _from_ultralytics(properties: Mapping[str, Any]) -> Entries:
    """Images are letterboxed in the middle of a gray square; a classifier's are cut."""
    names, args = _literal(properties["names"], {}), _literal(properties.get("args"), {})
    task = ULTRALYTICS_TASKS.get(properties.get("task", "detect"), str(properties.get("task")))
    entries: Entries = {
        "task": task,
        "labels": [str(name) for name in (names.values() if isinstance(names, dict) else names)],
        "input": {"color": "rgb", "std": [255.0] * 3, "resize": "letterbox"},
    }
    size = _literal(properties.get("imgsz"), ())
    if isinstance(size, list | tuple) and len(size) == 2:  # a graph of open sides was exported for this size
        entries["input"] |= {"height": int(size[0]), "width": int(size[1])}
    if task == "classification":
        entries["input"]["resize"] = "crop"
    elif not (args.get("nms") or args.get("end2end") or _literal(properties.get("end2end"), False)):
        entries["decoder"] = "yolo"
    return entries


def _from_model_api(properties: Mapping[str, Any]) -> Entries:
    """Images are BGR unless the graph wants them reversed; labels have no spaces, which separate them."""
    kind = "".join(c for c in str(properties["model_type"]).lower() if c.isalpha())
    task, decoder = next((t for name, t in MODEL_API_TASKS.items() if kind.startswith(name)), ("", ""))
    if not task:
        return {}
    is_reversed = str(properties.get("reverse_input_channels", "")).lower() in ("yes", "true", "1")
    given: Entries = {"color": "rgb" if is_reversed else "bgr"}
    given |= MODEL_API_RESIZES.get(properties.get("resize_type", ""), {})
    for ours, theirs in (("mean", "mean_values"), ("std", "scale_values")):
        if values := [float(value) for value in str(properties.get(theirs, "")).replace(",", " ").split()]:
            given[ours] = values * 3 if len(values) == 1 else values
    if properties.get("pad_value"):
        given["padding"] = int(float(properties["pad_value"]))
    entries: Entries = {"task": task, "input": given, "labels": str(properties.get("labels", "")).split()}
    entries |= {"decoder": decoder} if decoder else {}
    if task == "detection":
        thresholds = {"score_threshold": "confidence_threshold"}
        thresholds |= {"nms_threshold": "iou_threshold"} if decoder == "yolo" else {}
        told = {ours: properties[theirs] for ours, theirs in thresholds.items() if properties.get(theirs)}
        entries["postprocess"] = {name: float(value) for name, value in told.items()}
    return entries


def _literal(text: Any, default: Any) -> Any:
    """A value that is written as Python writes it, or is one already."""
    if not isinstance(text, str):
        return default if text is None else text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return default
