"""The numbers of the published YOLACT networks and of the project's own, and the classes they tell apart. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from helpers.errors import BundleError

COCO_CLASSES = tuple(
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
    parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
    handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
    surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
    broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop,
    mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors,
    teddy bear, hair drier, toothbrush""".replace("\n    ", " ").split(", ")
)

FASHION_CLASSES = tuple(
    """T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag,
    Ankle boot""".replace("\n    ", " ").split(", ")
)

IMAGENET_MEAN = (123.68, 116.78, 103.94)  # red, green, blue, from 0 to 255
IMAGENET_STD = (58.40, 57.12, 57.38)


@dataclass(frozen=True)
class Configuration:
    """One network."""

    name: str
    backbone: str  # a name in `backbones`
    size: int = 550  # side of the square input, in pixels
    # Sides of the anchors, in pixels of the input, one for each level of the pyramid from P3 up; there are as many
    # levels as scales, at least three.
    scales: tuple[int, ...] = (24, 48, 96, 192, 384)
    # Of the foreground classes; the background is class 0 of the network's output, before them.
    labels: tuple[str, ...] = COCO_CLASSES
    # Of the input's channels, red, green, blue; the network takes (pixel - mean) / std.
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD  # likewise
    ratios: tuple[float, ...] = (1.0, 0.5, 2.0)  # width to height of the anchors of a place, in order
    # Whether anchors are as high as they are wide whatever their ratio says. The published networks were trained with
    # this slip, and their weights are of use with it only.
    square_anchors: bool = True
    features: int = 256  # channels of the pyramid, the prototype branch and the head (section 4)
    prototypes: int = 32  # how many (section 3.1)

    @property
    def classes(self) -> int:
        """Classes of the network's output, the background among them."""
        return len(self.labels) + 1


CONFIGURATIONS = {
    configuration.name: configuration
    for configuration in (
        Configuration("yolact_base", "resnet101"),
        Configuration("yolact_resnet50", "resnet50"),
        Configuration("yolact_darknet53", "darknet53", mean=(0.0, 0.0, 0.0), std=(255.0, 255.0, 255.0)),
        # The scales for 550, times 700 / 550, their fractions cut off.
        Configuration("yolact_im700", "resnet101", size=700, scales=(30, 61, 122, 244, 488)),
        # For Fashion-MNIST scenes, whose items are about 30 to 70 pixels large: P6 and P7 would find nothing.
        Configuration(
            "yolact_scenes",
            "resnet_small",
            size=160,
            scales=(34, 48, 68),
            labels=FASHION_CLASSES,
            square_anchors=False,
            features=64,
            prototypes=16,
        ),
    )
}


def get_configuration(name: str, labels: Sequence[str] = ()) -> Configuration:
    """Look a network up by name, or raise BundleError; labels, if any, take the place of its own."""
    if name not in CONFIGURATIONS:
        raise BundleError(f"no YOLACT architecture {name!r}; there are {', '.join(CONFIGURATIONS)}")
    return replace(CONFIGURATIONS[name], labels=tuple(labels)) if labels else CONFIGURATIONS[name]
