"""Thin helpers behind the notebooks: storage, partitioning, the four pipeline stages, training and export.

Importing this package imports nothing heavy: executors import only the modules that their stage needs.
"""

import os
import sys

__version__ = "0.1.0"

# OpenCV reads it when it is first imported. Its own limit, 2^30, would be 3 GB of pixels, should a file ever have more
# of them than its header was understood to say.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(2**28))

# Arrow's and deltalake's allocators read these when they are first imported. By default they keep what was freed for a
# while, and a driver that works slice after slice then has the memory of several of them. deltalake's has four arenas
# per core, and of each commit something would stay in each of them.
os.environ.setdefault("MIMALLOC_PURGE_DELAY", "0")
os.environ.setdefault("_RJEM_MALLOC_CONF", "dirty_decay_ms:0,muzzy_decay_ms:0,narenas:1")

# To count their users, OpenVINO and NNCF would fork this process several times in each conversion, seconds of processor
# time where PyTorch is in memory, and wait for a web server. Both do without the package that does it.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
