"""What a network takes for an image. Executors import this module; it needs the standard library only."""

from dataclasses import dataclass

COLORS = {"rgb": 3, "bgr": 3, "gray": 1}
RESIZE_RULES = ("stretch", "letterbox", "crop")


@dataclass(frozen=True)
class InputSpec:
    """What the graph takes: uint8 `[B, height, width, channels]`, in the given color order.

    The graph itself subtracts `mean` and divides by `std`, both a channel, in units of 0..255. `resize` is
    `stretch` (both sides to size), `letterbox` (fit inside, pad) or `crop` (shorter side to size, center cut).
    `scaled_decoding` above 0 allows a JPEG to be decoded at 1/2, 1/4 or 1/8 while that leaves it so many times larger
    than the input; 2 changes a photograph's input by less than a gray level on average, 0 not at all.
    """

    height: int
    width: int
    color: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: str = "stretch"
    scaled_decoding: float = 0.0

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width, channels."""
        return self.height, self.width, COLORS[self.color]

    @property
    def nbytes(self) -> int:
        """Bytes of one image."""
        height, width, channels = self.shape
        return height * width * channels
