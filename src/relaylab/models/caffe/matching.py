"""Matching of a Caffe network with the structure of model B, from the scores back to the images.

It goes backwards because every blob is produced by one layer but may be read by several. Layer names do not matter.
"""

from relaylab.data.sources.listing import few
from relaylab.errors import InputError
from relaylab.models.caffe.describing import describe
from relaylab.models.caffe.network import Layer, Network
from relaylab.outside.showing import brief

ADVICE = "expected Model B, as in the authors' Places2-401-CNN.prototxt"
GRIDS = "segment4.spp"


class Trail:
    """The layers of a network that have been matched with model B, and the remaining ones.

    Attributes:
        network: the network.
        found: matched layers by their names in our model. The layers of the pyramid are numbered.
        left: layers that have not been reached, by the number of the blob that they produce.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.found = dict[str, Layer]()
        self.left = {top: layer for layer in network.layers for top in layer.tops}
        for layer in network.layers:
            if len(layer.tops) != 1:
                raise InputError(f"{self.where(layer)} makes {len(layer.tops)} blobs: expected one; {ADVICE}")
        self._makers = dict(self.left)

    def where(self, layer: Layer) -> str:
        """Return the beginning of an error about a layer."""
        return f"{self.network.path}: layer {brief(layer.name)!r}"

    def kind(self, blob: int) -> str:
        """Return the type of the layer that produces a blob; empty for images."""
        return self._makers[blob].type if blob in self._makers else ""

    def fork(self, blob: int, kind: str, place: str) -> tuple[int, ...]:
        """Step back from a blob over the layer that produces it; return the blobs that the layer reads.

        The layer is recorded in `found` under `place`, its name in our model. Raises InputError if its type is not
        `kind`.
        """
        layer = self._makers.get(blob)
        if layer is None:
            raise InputError(
                f"{self.network.path}: {brief(self.network.sources[blob].name)!r} is an input, where Model B has "
                f"{kind} ({place}); {ADVICE}"
            )
        if layer.type != kind:
            raise InputError(f"{self.where(layer)} is {describe(layer)}, where Model B has {kind} ({place}); {ADVICE}")
        if blob not in self.left:
            raise InputError(f"{self.where(layer)} is used twice, the second time for {place}; {ADVICE}")
        del self.left[blob]
        self.found[place] = layer
        return layer.bottoms

    def back(self, blob: int, kind: str, place: str) -> int:
        """Step back like `fork` over a layer with a single input; raise InputError if it has several."""
        bottoms = self.fork(blob, kind, place)
        if len(bottoms) != 1:
            raise InputError(f"{self.where(self.found[place])} reads {len(bottoms)} blobs: expected one; {ADVICE}")
        return bottoms[0]

    def convolution(self, blob: int, place: str) -> int:
        """Step back over a ReLU and a convolution; `place` ends with the convolution's number in its branch."""
        stem, _, number = place.rpartition(".")
        blob = self.back(blob, "ReLU", f"{stem}.{int(number) + 1}")
        return self.back(blob, "Convolution", place)


def follow(network: Network) -> tuple[dict[str, Layer], int]:
    """Find the layers of model B. Return them by their names in our model, and the number of the images' blob.

    Raises:
        InputError: the network has a different structure. Kernels, filters and strides are not compared.
    """
    trail = Trail(network)
    blob = _scores(network)
    if trail.kind(blob) == "Softmax":
        blob = trail.back(blob, "Softmax", "softmax")
    blob = trail.back(blob, "InnerProduct", "classifier.fc3")
    for number in (2, 1):
        if trail.kind(blob) == "Dropout":
            blob = trail.back(blob, "Dropout", f"classifier.dropout{number}")
        blob = trail.back(blob, "ReLU", f"classifier.relu{number}")
        blob = trail.back(blob, "InnerProduct", f"classifier.fc{number}")
    blob = _pyramid(trail, blob)
    for segment in (4, 3, 2):
        if segment < 4:
            blob = trail.back(blob, "Pooling", f"segment{segment}.pool")
        for module in (4, 3, 2, 1):
            blob = _inception(trail, blob, f"segment{segment}.inception{module}")
    blob = trail.back(blob, "Pooling", "segment1.pool")
    blob = trail.back(blob, "ReLU", "segment1.relu1")
    blob = trail.back(blob, "Convolution", "segment1.conv1")
    if blob not in network.sources:
        layer = trail.left[blob]
        raise InputError(f"{trail.where(layer)} is {describe(layer)}, where Model B begins with images; {ADVICE}")
    if trail.left:
        names = few([layer.name for layer in trail.left.values()])
        raise InputError(f"{network.path} has layers that Model B lacks: {names}; {ADVICE}")
    return trail.found, blob


def _scores(network: Network) -> int:
    read = {blob for layer in network.layers for blob in layer.bottoms}
    ends = [layer for layer in network.layers if not read & set(layer.tops)]
    if len(ends) != 1:
        names = few([layer.name for layer in ends]) or "none"
        raise InputError(f"{network.path} ends in {len(ends)} layers ({names}): expected one; {ADVICE}")
    return ends[0].tops[0]


def _pyramid(trail: Trail, blob: int) -> int:
    maps = list[int]()
    for number, grid in enumerate(trail.fork(blob, "Concat", GRIDS)):
        grid = trail.back(grid, "Flatten", f"{GRIDS}.flatten{number}")
        maps.append(trail.back(grid, "Pooling", f"{GRIDS}.{number}"))
    return _common(trail, maps, GRIDS)


def _inception(trail: Trail, blob: int, place: str) -> int:
    branches = trail.fork(blob, "Concat", place)
    if len(branches) != 3:
        raise InputError(f"{trail.where(trail.found[place])} joins {len(branches)} branches: expected 3; {ADVICE}")
    starts = [
        trail.convolution(branches[0], f"{place}.branch1x1.0"),
        trail.convolution(branches[1], f"{place}.branch3x3.0"),
        trail.convolution(trail.convolution(branches[2], f"{place}.branch3x3dbl.2"), f"{place}.branch3x3dbl.0"),
    ]
    return _common(trail, starts, place)


def _common(trail: Trail, starts: list[int], place: str) -> int:
    if len(set(starts)) != 1:
        raise InputError(
            f"{trail.where(trail.found[place])} joins branches of different blobs, or has them in a different order "
            f"from Model B ({place}); {ADVICE}"
        )
    return starts[0]
