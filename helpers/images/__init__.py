"""From files to pixels and back: image formats, videos, and pictures of results."""
