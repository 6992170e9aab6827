"""What runs remember of a listing, so that the next one looks at what has changed only.

A listing comes in chunks with a digest each (`listing.Chunk`). A run's commit tells the digests of those of which every
image is settled in the version that it makes, with the number of their images and the errors among them. The next run
lists all files, which no storage saves it, and leaves out the chunks that it knows: it reads no row of theirs.

A digest counts as long as nothing else has changed the table. So a run believes the newest commit only, forgets all
when another run has committed meanwhile, and what it tells itself is what it has seen settled since. What is told is
some kilobytes per million images; more than `MOST_CHUNKS` are not told, and are looked at by every run.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from helpers.config import Config
from helpers.images.boundary import LASTING
from helpers.pipeline.listing import Listing
from helpers.pipeline.results import Seen
from helpers.pipeline.rows import file_paths, index_in, is_in, is_lasting
from helpers.pipeline.task import error_kind

MOST_CHUNKS = 4000  # 65 million files
MOST_KINDS = 5  # of errors in a chunk


class Known:
    """The chunks that a run need not look at, and those that the next one need not."""

    def __init__(self, seen: Seen, models: Iterable[str], config: Config):
        """Believe what the newest commit tells, if it is of the same models and settings."""
        settings = [*models, *LASTING, config.ingest.model_dump_json(), config.video.model_dump_json()]
        settings.append(str(config.max_image_bytes))
        self._settings = hashlib.blake2b("\n".join(settings).encode(), digest_size=12).hexdigest()
        told = json.loads(seen.listed or "{}")
        self._chunks: dict[str, list] = {}
        self._earlier: dict[str, list] = told["chunks"] if told.get("settings") == self._settings else {}
        self.commit = (seen.change, seen.listed)  # after which all of this holds

    def __contains__(self, digest: object) -> bool:
        return digest in self._earlier

    def __len__(self) -> int:
        return len(self._earlier)

    @property
    def has_news(self) -> bool:
        """Whether this run knows something that the newest commit does not tell."""
        told = json.loads(self.commit[1] or "{}")
        return bool(self._chunks) and (told.get("settings"), told.get("chunks")) != (self._settings, self._chunks)

    def take(self, digests: Iterable[str]) -> tuple[int, Counter[str]]:
        """Count the images of chunks that are known, and the errors among them."""
        images, errors = 0, Counter[str]()
        for digest in digests:
            self._chunks[digest] = chunk = self._earlier[digest]
            images += chunk[0]
            errors.update(chunk[1])
        return images, errors

    def look(self, seen: Seen) -> None:
        """Forget everything if another run has changed the table since this one has looked."""
        if (seen.change, seen.listed) != self.commit:
            self._earlier, self._chunks = {}, {}
            self.commit = (seen.change, seen.listed)

    def add(self, listed: Listing, images: pa.Table, failed: pa.Table) -> None:
        """Remember chunks of which every image is settled when the next commit is made.

        A video or an archive that cannot be read, or not to its end, is looked at by every run. `images` are all in the
        slice (`KEY`), and `failed` path and error of those with one, of which an image may have several.
        """
        chunks = listed.chunks
        if not chunks:
            return
        starts = np.cumsum([0, *(len(chunk.paths) for chunk in chunks)])
        paths = pa.chunked_array([chunk.paths for chunk in chunks], pa.string())

        def places(table: pa.Table) -> np.ndarray:
            if table.num_rows == len(paths) and table["path"].equals(paths):  # all are images, and this saves memory
                return np.repeat(np.arange(len(chunks)), np.diff(starts))
            if not table.num_rows:
                return np.zeros(0, np.int64)
            positions = index_in(file_paths(table["path"]), paths)
            return np.searchsorted(starts, positions.to_numpy(), side="right") - 1

        counts = np.bincount(places(images), minlength=len(chunks)).tolist()
        errors: list[dict[str, str]] = [{} for _ in chunks]
        rows = zip(places(failed), failed["path"].to_pylist(), failed["error"].to_pylist(), strict=True)
        for place, path, error in rows:
            errors[place][path] = error_kind(error)
        files = [is_in(failed["path"], part["path"]) for part in (listed.videos, listed.archives)]
        is_open = pc.or_(pc.or_(*files), pc.invert(is_lasting(failed["error"])))
        unsettled = set(places(failed.filter(is_open)).tolist())
        for number, chunk in enumerate(chunks):
            kinds = dict(Counter(errors[number].values()))
            if number not in unsettled and len(kinds) <= MOST_KINDS and len(self._chunks) < MOST_CHUNKS:
                self._chunks[chunk.digest] = [counts[number], kinds]

    def tell(self, run: str) -> str:
        """What the next commit is to tell; no two commits tell the same."""
        return json.dumps({"run": run, "settings": self._settings, "chunks": self._chunks})

    def told(self, listed: str, seen: Seen) -> None:
        """Expect the next look to find what a commit has told, which was made on a version that was seen."""
        self.commit = (max(seen.version, 0) + 1, listed)
