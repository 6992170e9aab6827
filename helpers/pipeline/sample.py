"""Pictures of a sample of a run's images, beside its results."""

import logging
import math

import cv2
import pyarrow.compute as pc

from helpers.config import Config
from helpers.images.boundary import UnreadableImageError
from helpers.images.decoding import decode
from helpers.images.drawing import draw, picture_name
from helpers.pipeline.results import PICTURES
from helpers.pipeline.stages import read_images
from helpers.storage import Storage
from helpers.storage.parquet import read_table

log = logging.getLogger(__name__)


def draw_sample(output: Storage, files: list[str], source: Storage, config: Config) -> dict[str, bytes]:
    """Annotate a sample of a run's images; write the PNG files, and return them by name.

    Args:
        output: the run's output.
        files: the run's result files; the sample comes from all of them.
        source: where the images lie.
        config: `pictures` says how many.
    """
    pictures: dict[str, bytes] = {}
    for file in files:
        if len(pictures) >= config.pictures:
            break
        table = read_table(output, file)
        table = table.filter(pc.is_null(table["error"])).slice(0, math.ceil(config.pictures / len(files)))
        table = table.slice(0, config.pictures - len(pictures))
        predictions = dict(zip(table["path"].to_pylist(), table["predictions"].to_pylist(), strict=True))
        limits = config.max_image_bytes, config.ingest.max_pixels
        for batch in read_images(table.to_batches(), source, 1, 1, *limits):
            path, error, content = (batch[name][0].as_py() for name in ("path", "error", "content"))
            try:
                if error is not None:
                    raise UnreadableImageError(error)
                image = decode(content, config.ingest.max_pixels)
            except UnreadableImageError as why:
                log.warning("no picture of %s: %s", path, why)  # it was there when the task read it
                continue
            png = cv2.imencode(".png", draw(image, predictions[path]))[1].tobytes()
            pictures[picture_name(path)] = png
            output.write(f"{PICTURES}/{picture_name(path)}", png)
    return pictures
