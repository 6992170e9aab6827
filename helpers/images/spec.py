"""What a network takes for an image. Executors import this module; it needs the standard library only."""

from dataclasses import dataclass
from typing import Literal

STRICT = {"extra": "forbid", "allow_inf_nan": False}  # what pydantic is to know of a manifest's parts
COLORS = {"rgb": 3, "bgr": 3, "gray": 1}
VARIABLE = ("shortest_edge", "none")  # rules that give each image a size of its own


@dataclass(frozen=True)
class InputSpec:
    """What the graph takes: uint8 `[B, height, width, channels]`, in the given color order.

    The graph itself subtracts `mean` and divides by `std`, both per channel, in units of 0..255.
    """

    __pydantic_config__ = STRICT

    height: int
    width: int
    color: Literal["rgb", "bgr", "gray"]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    # `stretch` (both sides to size), `letterbox` (fit inside, pad), `crop` (shorter side to size, cut the center),
    # `shortest_edge` (shorter side to `height`, longer side at most `width`) or `none` (the network takes images of any
    # size). The last two give each image a size of its own, and one image per inference.
    resize: Literal["stretch", "letterbox", "crop", "shortest_edge", "none"] = "stretch"
    # Above 0, a JPEG may be decoded at 1/2, 1/4 or 1/8 while that leaves it so many times larger than the input; 2
    # changes a photograph's input by less than a gray level on average, 0 not at all.
    scaled_decoding: float = 0.0
    interpolation: Literal["linear", "cubic"] = "linear"
    antialias: bool = False  # enlarge the filter when an image becomes smaller, as Pillow, torchvision and timm do
    resize_size: int = 0  # of `crop`: the shorter side in pixels before the cut; 0 for no more than is cut
    padding: int = 114  # gray level around a `letterbox`
    position: Literal["center", "top_left"] = "center"  # of the image in a `letterbox`: `center` or `top_left`

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels; of a rule that gives each image its own size, those of a usual one."""
        return self.height, self.width, COLORS[self.color]

    @property
    def is_variable(self) -> bool:
        """Whether each image has a size of its own."""
        return self.resize in VARIABLE

    @property
    def nbytes(self) -> int:
        """Bytes of one image."""
        height, width, channels = self.shape
        return height * width * channels
