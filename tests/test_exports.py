import csv
import json
from pathlib import Path

import cv2
import numpy as np
import pages
import pytest
import supervision as sv
import yaml
from pages import LABELS, prediction, row
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from helpers.cli import main
from helpers.config import load_config
from helpers.errors import ConfigError, RunError
from helpers.images import rle
from helpers.metrics import average_precision
from helpers.pipeline.exports import Selection, export_results
from helpers.pipeline.results import ResultStore
from helpers.storage import open_storage

SIZE = 200, 100
COUNT = 12


def rectangle(x1: int, y1: int, x2: int, y2: int) -> np.ndarray:
    mask = np.zeros(SIZE[::-1], bool)
    mask[y1:y2, x1:x2] = True
    return mask


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="module")
def rows(folder) -> list[dict]:
    """Images with a masked cat and, in every second one, a dog with a keypoint; one that failed, one with nothing."""
    made = []
    for number in range(COUNT):
        path = pages.write_image(folder / "photographs" / "a b" / f"{number:02d}.jpg", SIZE)
        x = 10 + 5 * number
        found = [prediction(0, 0.9 - number / 100, (x, 20, x + 60, 80), rectangle(x, 20, x + 60, 80))]
        if number % 2:
            found.append(prediction(1, 0.25, (100, 5, 150, 45), rectangle(100, 5, 150, 45), [(110, 20, 0.9)]))
        made.append(row(path, SIZE, found))
    made.append(row(folder / "photographs" / "bad.jpg", None, None, "the file is empty"))
    made.append(row(pages.write_image(folder / "photographs" / "nothing.png", SIZE), SIZE, []))
    return made


@pytest.fixture(scope="module")
def output(folder, rows) -> Path:
    return pages.write_output(folder / "output", rows, str(folder / "photographs"))


def export(output: Path, kind: str, target: Path, **selection) -> dict:
    return export_results(
        ResultStore(open_storage(str(output))), kind, str(target), Selection(**selection), load_config("local")
    )


def test_coco_loads_in_pycocotools_and_has_the_average_precision_of_the_table(output, rows, tmp_path):
    summary = export(output, "coco", tmp_path)
    assert summary == {"images": COUNT + 2, "predictions": 18, "format": "coco", "to": str(tmp_path)}
    dataset = COCO(str(tmp_path / "instances.json"))
    assert {category["name"] for category in dataset.loadCats(dataset.getCatIds())} == {"cat", "dog"}
    assert {image["file_name"] for image in dataset.dataset["images"]} == {
        "nothing.png",
        *(f"a b/{number:02d}.jpg" for number in range(COUNT)),
    }
    # The truth: every object a little aside, so that some match and some do not.
    ids = {image["file_name"]: image["id"] for image in dataset.dataset["images"]}
    annotations, predictions = [], []
    for number in range(COUNT):
        identity, found = ids[f"a b/{number:02d}.jpg"], rows[number]["predictions"]
        for one in found:
            aside = np.roll(rle.decode(one["mask"]), number, axis=1)
            mask = rle.encode(aside)
            about = {"image_id": identity, "category_id": one["class_id"], "iscrowd": 0, "area": rle.area(mask)}
            annotations.append({**about, "id": len(annotations) + 1, "segmentation": mask, "bbox": [0, 0, 1, 1]})
            about = {"image_id": identity, "category_id": one["class_id"], "score": one["score"]}
            predictions.append({**about, "segmentation": one["mask"]})
    truth = {**dataset.dataset, "annotations": annotations}
    expected = average_precision(truth, predictions)
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    true = COCO(str(tmp_path / "truth.json"))
    evaluation = COCOeval(true, true.loadRes(str(tmp_path / "detections.json")), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    assert 0.3 < expected["AP"] < 0.95
    assert evaluation.stats[:3] == pytest.approx([expected[name] for name in ("AP", "AP50", "AP75")], abs=1e-6)


def test_cocos_masks_boxes_and_keypoints_are_those_of_the_table(output, rows, tmp_path):
    export(output, "coco", tmp_path)
    dataset = COCO(str(tmp_path / "instances.json"))
    (identity,) = (image["id"] for image in dataset.dataset["images"] if image["file_name"] == "a b/03.jpg")
    cat, dog = dataset.loadAnns(dataset.getAnnIds([identity]))
    assert np.array_equal(dataset.annToMask(cat), rectangle(25, 20, 85, 80))
    assert cat["bbox"] == [25, 20, 60, 60] and cat["area"] == 3600 and cat["score"] == pytest.approx(0.87)
    assert dog["keypoints"] == [110, 20, 2] and dog["num_keypoints"] == 1


def test_yolo_has_outlines_of_masks_in_shares_of_the_sides(output, folder, tmp_path):
    export(output, "yolo", tmp_path)
    assert len(list((tmp_path / "labels").rglob("*.txt"))) == COUNT + 1
    assert (tmp_path / "labels" / "nothing.txt").read_text() == ""
    assert yaml.safe_load((tmp_path / "data.yaml").read_text())["names"] == ["cat", "dog"]
    for path in (folder / "photographs" / "a b").iterdir():  # which supervision wants in one folder
        (tmp_path / "images").mkdir(exist_ok=True)
        (tmp_path / "images" / path.name).write_bytes(path.read_bytes())
    images, labels = str(tmp_path / "images"), str(tmp_path / "labels" / "a b")
    dataset = sv.DetectionDataset.from_yolo(images, labels, str(tmp_path / "data.yaml"), force_masks=True)
    assert dataset.classes == ["cat", "dog"] and len(dataset) == COUNT
    found = dataset.annotations[str(tmp_path / "images" / "03.jpg")]
    assert found.class_id.tolist() == [0, 1]
    assert np.mean(found.mask[0] == rectangle(25, 20, 85, 80)) > 0.98


def test_yolo_without_masks_has_centers_and_sizes(tmp_path):
    rows = [row("/photographs/x.jpg", SIZE, [prediction(2, 0.9, (50, 25, 150, 75))])]
    export(pages.write_output(tmp_path / "output", rows, "/photographs"), "yolo", tmp_path / "yolo")
    assert (tmp_path / "yolo/labels/x.txt").read_text() == "2 0.500000 0.500000 0.500000 0.500000\n"
    names = yaml.safe_load((tmp_path / "yolo/data.yaml").read_text())["names"]
    assert names == ["class 0", "class 1", "bird"]  # YOLO's numbers have no gaps


def test_labelme_has_a_file_for_each_image_with_shapes_over_it(output, folder, tmp_path):
    export(output, "labelme", tmp_path)
    content = json.loads((tmp_path / "a b" / "03.json").read_text())
    assert Path(content["imagePath"]).is_file() and (content["imageHeight"], content["imageWidth"]) == SIZE[::-1]
    cat, dog, point = content["shapes"]
    assert (cat["label"], cat["shape_type"], dog["shape_type"], point["shape_type"]) == (
        "cat",
        *["polygon"] * 2,
        "point",
    )
    assert dog["group_id"] == point["group_id"] != cat["group_id"]
    assert cv2.contourArea(np.array(cat["points"], np.float32)) == pytest.approx(3600, rel=0.05)
    assert json.loads((tmp_path / "nothing.json").read_text())["shapes"] == []


def test_fiftyone_has_boxes_outlines_and_keypoints_in_shares_of_the_sides(output, folder, tmp_path):
    export(output, "fiftyone", tmp_path)
    samples = {Path(s["filepath"]).name: s for s in json.loads((tmp_path / "samples.json").read_text())["samples"]}
    assert len(samples) == COUNT + 1 and json.loads((tmp_path / "metadata.json").read_text())["media_type"] == "image"
    sample = samples["03.jpg"]
    cat, dog = sample["detections"]["detections"]
    assert cat["bounding_box"] == pytest.approx([25 / 200, 0.2, 60 / 200, 0.6]) and cat["_cls"] == "Detection"
    assert cat["confidence"] == pytest.approx(0.87) and dog["label"] == "dog"
    line = np.array(sample["polylines"]["polylines"][0]["points"][0]) * SIZE
    assert cv2.contourArea(line.astype(np.float32)) == pytest.approx(3600, rel=0.05)
    assert sample["keypoints"]["keypoints"][0]["points"] == [[110 / 200, 0.2]]
    assert samples["nothing.png"]["detections"] == {"_cls": "Detections", "detections": []}


def test_csv_has_a_row_for_each_prediction_and_each_image_without(output, tmp_path):
    assert export(output, "csv", tmp_path / "results.csv")["predictions"] == 18
    with (tmp_path / "results.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 18 + 2
    (bad,) = (line for line in lines if line["error"])
    assert bad["error"] == "the file is empty" and bad["label"] == ""
    first = next(line for line in lines if line["path"].endswith("03.jpg"))
    assert (first["label"], float(first["x1"]), float(first["y2"])) == ("cat", 25, 80)


def test_a_selection_is_by_class_label_or_number_and_by_score(output, tmp_path, caplog):
    assert export(output, "csv", tmp_path / "a.csv", classes=("dog",))["predictions"] == 6
    assert export(output, "csv", tmp_path / "a.csv", classes=("0", "dog"))["predictions"] == 18
    assert export(output, "csv", tmp_path / "a.csv", min_score=0.3)["predictions"] == COUNT
    assert export(output, "csv", tmp_path / "a.csv", min_score=0.85)["predictions"] == 6  # 0.85 as float32 among them
    assert not caplog.text
    assert export(output, "csv", tmp_path / "a.csv", classes=("wolf",))["predictions"] == 0
    assert "wolf" in caplog.text and "cat, dog" in caplog.text
    with pytest.raises(ConfigError, match="no format voc; take csv, coco"):
        export(output, "voc", tmp_path / "a")
    with pytest.raises(ConfigError, match="--min-score"):
        export(output, "csv", tmp_path / "a.csv", min_score=2)


def test_of_several_models_one_is_named(tmp_path):
    found = [prediction(0, 0.9, (1, 1, 9, 9))]
    rows = [row("/p/x.jpg", SIZE, found, model=model) for model in ("a-fp32@1", "b-fp32@2")]
    output = pages.write_output(tmp_path / "output", rows, "/p", files=1)
    with pytest.raises(RunError, match="a-fp32@1 and of b-fp32@2; name one with --model"):
        export(output, "yolo", tmp_path / "yolo")
    assert export(output, "yolo", tmp_path / "yolo", model="b-")["images"] == 1
    assert export(output, "csv", tmp_path / "all.csv")["images"] == 2
    with pytest.raises(RunError, match="no results of a model c"):
        export(output, "yolo", tmp_path / "yolo", model="c")


def test_classifications_have_no_boxes_to_export(tmp_path):
    rows = [row("/p/x.jpg", SIZE, [prediction(0, 0.9), prediction(1, 0.05)])]
    output = pages.write_output(tmp_path / "output", rows, "/p", files=1)
    for kind in ("coco", "yolo"):
        with pytest.raises(RunError, match="no boxes"):
            export(output, kind, tmp_path / kind)
    assert not (tmp_path / "coco" / "instances.json").exists()
    export(output, "fiftyone", tmp_path / "fiftyone")
    (sample,) = json.loads((tmp_path / "fiftyone" / "samples.json").read_text())["samples"]
    assert sample["prediction"]["label"] == "cat"
    export(output, "labelme", tmp_path / "labelme")
    assert json.loads((tmp_path / "labelme" / "x.json").read_text())["flags"] == {"cat": True}


NAMES = ["/p/../../../escape.jpg", "/p/..", "/p/a/..\\..\\b.jpg", "/p/C:x.jpg", "s3://b/../x.jpg", "/p/\x00nul\n.jpg"]


@pytest.mark.parametrize("kind", ["yolo", "labelme"])
def test_no_name_of_an_image_leads_out_of_the_folder(kind, tmp_path):
    found = [prediction(0, 0.9, (1, 1, 9, 9))]
    rows = [row(name.replace("\x00", "\x01"), SIZE, found) for name in (*NAMES, f"/p/{'é' * 300}.jpg")]
    output = pages.write_output(tmp_path / "output", rows, "/p")
    target = tmp_path / "deep" / "er" / "target"
    export(output, kind, target)
    before = {"output", "deep"}
    assert {path.name for path in tmp_path.iterdir()} == before
    files = [path for path in target.rglob("*") if path.is_file() and path.name != "data.yaml"]
    assert len(files) == len(rows)
    assert all(path.resolve().is_relative_to(target) for path in files)
    assert [path for path in (tmp_path / "deep").rglob("*") if path.is_file() and target not in path.parents] == []


def test_images_that_differ_in_their_suffix_have_a_file_each_and_frames_keep_their_number(tmp_path):
    found = [prediction(0, 0.9, (1, 1, 9, 9))]
    names = ("x.jpg", "x.png", "clip.mp4#frame=1", "clip.mp4#frame=2", "a.tar#member=b/c.jpg")
    output = pages.write_output(tmp_path / "output", [row(f"/p/{name}", SIZE, found) for name in names], "/p", files=1)
    export(output, "yolo", tmp_path / "yolo")
    labels = tmp_path / "yolo" / "labels"
    written = {str(path.relative_to(labels)) for path in labels.rglob("*.txt")}
    assert len(written) == 5
    assert {"x.txt", "clip.mp4#frame=1.txt", "clip.mp4#frame=2.txt", "a.tar#member=b/c.jpg.txt"} < written


def test_the_command_exports_and_counts(output, tmp_path, capsys):
    options = ["--to", str(tmp_path / "yolo"), "--classes", "cat,1", "--min-score", "0.2"]
    assert main(["results", str(output), "--format", "yolo", *options]) == 0
    assert json.loads(capsys.readouterr().out)["predictions"] == 18
    assert main(["results", str(tmp_path), "--format", "csv", "--to", str(tmp_path / "x.csv")]) == 2
    assert "there are no results" in capsys.readouterr().err
    assert not (tmp_path / "x.csv").exists()


def test_supervision_draws_what_the_table_has(output, folder):
    """As the cell of notebook 07 does."""
    from helpers.storage.parquet import read_table

    rows = read_table(open_storage(str(output)), "results/part-0.parquet").to_pylist()
    found = next(row for row in rows if row["predictions"])["predictions"]
    boxes = np.array([[p["box"][side] for side in ("x1", "y1", "x2", "y2")] for p in found])
    detections = sv.Detections(boxes, np.stack([rle.decode(p["mask"]) for p in found]))
    detections.class_id = np.array([p["class_id"] for p in found])
    image = np.zeros((*SIZE[::-1], 3), np.uint8)
    drawn = sv.MaskAnnotator().annotate(image.copy(), detections)
    assert drawn[50, 40].any() and not drawn[90, 190].any() and LABELS[found[0]["class_id"]] == "cat"
