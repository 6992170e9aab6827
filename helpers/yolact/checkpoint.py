"""What must be mended in an official checkpoint before it loads with every key and shape checked.

The published files are flat dictionaries of tensors. Some hold weights twice or weights that no network of today
has, left over from the code that trained them:

- `backbone.layerN...` are second copies, under torchvision's names, of the stages at `backbone.layers.N...`;
- `fpn.downsample_layers.N...` with N of 2 or more belong to pyramid levels above P7 that were built and never used.

Both are dropped; nothing is renamed, and everything else must be there.
"""

import re
from typing import Any

STALE = re.compile(r"backbone\.layer(?!s)|fpn\.downsample_layers\.(?![01]\.)\d+\.")


def drop_stale_keys(weights: dict[str, Any]) -> dict[str, Any]:
    """Return a state dictionary without what the official loader drops as well."""
    return {key: value for key, value in weights.items() if not STALE.match(str(key))}
