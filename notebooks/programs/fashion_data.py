"""Fashion-MNIST: 60,000 training and 10,000 test images of 28x28 gray pixels in ten classes.

It comes from Debian's package or the network; its checksums are checked, and arrays map the files.
"""

import gzip
import hashlib
import shutil
import tempfile
from pathlib import Path

import numpy as np

from helpers.errors import DataError

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

# SHA-256 of the unpacked files. Debian's archives differ from the original ones, whose MD5s torchvision knows, only
# in the name and time of the gzip header: with those restored, all four give torchvision's MD5.
CHECKSUMS = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}


def download(root: str) -> Path:
    """Fetch the data set unless it is complete; two processes may do so at once.

    Returns:
        The folder of the four unpacked files, laid out as torchvision does: `ROOT/FashionMNIST/raw`.

    Raises:
        DataError: neither Debian's package nor the network gave all of it; the message has both remedies.
    """
    raw = Path(root, "FashionMNIST", "raw")
    if not is_whole(root):
        raw.mkdir(parents=True, exist_ok=True)
        # Checked files are moved into place one by one, so no reader ever meets half a file.
        with tempfile.TemporaryDirectory(dir=raw.parent, prefix=".download-") as staging:
            source = _fetch(Path(staging))
            for name in CHECKSUMS:
                (source / name).replace(raw / name)
    return raw


def is_whole(root: str) -> bool:
    """Whether all files are there with the right checksums; fetches nothing."""
    return not _damaged_files(Path(root, "FashionMNIST", "raw"))


def load(root: str, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """Open the training or the test set.

    Returns:
        Images, uint8 `[N, 28, 28]`, 0 black to 255 white, mapped from their file: an index reads only what it
        takes, and a change stays in memory. Labels, int64 `[N]`, indices into `CLASSES`.

    Raises:
        DataError: `download` has not been called for this root.
    """
    raw, part = Path(root, "FashionMNIST", "raw"), "train" if train else "t10k"
    try:
        # An IDX file is a header of 8 bytes and 4 more for each further dimension, then the values.
        images = np.memmap(raw / f"{part}-images-idx3-ubyte", np.uint8, "c", offset=16).reshape(-1, 28, 28)
        labels = np.fromfile(raw / f"{part}-labels-idx1-ubyte", np.uint8, offset=8).astype(np.int64)
    except FileNotFoundError:
        raise DataError(f"no Fashion-MNIST below {root}: call fashion_data.download({root!r}) first") from None
    return images, labels


def _damaged_files(raw: Path) -> list[str]:
    return [name for name, checksum in CHECKSUMS.items() if _sha256(raw / name) != checksum]


def _sha256(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(staging: Path) -> Path:
    problems = []
    for source in (_unpack_debian, _download_with_torchvision):
        try:
            raw = source(staging)
        except (OSError, EOFError, RuntimeError) as error:
            problems.append(str(error))
            continue
        if not (damaged := _damaged_files(raw)):
            return raw
        problems.append(f"damaged files: {', '.join(damaged)}")
    raise DataError(
        f"Fashion-MNIST is in neither source: {DEBIAN_FOLDER} ({problems[0]}), the network ({problems[1]}). "
        "Two remedies: call again where there is a network, or `apt-get install --reinstall dataset-fashion-mnist`."
    )


def _unpack_debian(staging: Path) -> Path:
    for name in CHECKSUMS:
        with gzip.open(DEBIAN_FOLDER / f"{name}.gz") as packed, (staging / name).open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked)
    return staging


def _download_with_torchvision(staging: Path) -> Path:
    from torchvision.datasets import FashionMNIST

    return Path(FashionMNIST(staging, download=True).raw_folder)


if __name__ == "__main__":  # the set-up's call: fetch into the default place
    from helpers.config import load_config

    try:
        print(download(load_config().paths.data))
    except DataError as error:
        raise SystemExit(str(error)) from None
