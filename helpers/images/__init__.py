"""From files to pixels and back: image formats, videos, and predictions drawn on."""
