"""Thin helpers behind the notebooks: storage, partitioning, the four pipeline stages, training and export.

Importing this package imports nothing heavy: executors import only the modules that their stage needs.
"""

__version__ = "0.1.0"
