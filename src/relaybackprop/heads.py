"""Auxiliary heads: small classifiers between an inner layer and its loss, used in training only.

Note [Layouts]
"channels_first" is (N, C, ...): feature maps, volumes, clips and outputs of 1-d convolutions. "channels_last" is
(N, ..., C): tokens, and the maps of Swin and similar models. Both include (N, C). A head checks the number of
dimensions and of channels in each forward pass. Without a declared layout it reads (N, C) and (N, C, H, W), and raises
`HeadError` for shapes that may be (N, H, W, C): two equal dimensions before a different one, or `channels` at both
ends. If C == H == W the shape is ambiguous: declare the layout, or let `head_for` detect it.
"""

from typing import Any, Literal, TypeVar

from torch import Tensor, nn
from torch.nn import functional

from relaybackprop.engine.pytree import describe, item_of, items_of
from relaybackprop.errors import HeadError

Layout = Literal["channels_first", "channels_last"]
Gain = Literal["default", "he", "quiet"]
Pool = Literal["mean", "first", "last"]
_T = TypeVar("_T")

QUIET = 0.1  # standard deviation of the scores for inputs of unit variance


class AuxiliaryHead(nn.Module):
    """GoogLeNet's auxiliary classifier, for feature maps of any size.

    Adaptive average pooling to 4x4, a 1x1 convolution to 128 channels, ReLU, a fully connected layer of 1024, ReLU,
    dropout of 0.7, and the classifier. This is our choice: the paper does not specify its auxiliary branch.

    Args:
        channels: number of channels of the input map.
        classes: number of classes.
        batch_norm: add batch normalisation after the convolution. Default: False, as in the paper's networks A and B.
        width: number of output channels of the convolution.
        hidden: number of output features of the first fully connected layer.
        layout: layout of the input map, see Note [Layouts].
        gain: initialisation of the classifier. "default" is PyTorch's default, "he" is He initialisation, and "quiet"
            starts with scores near 0, so that the loss starts near ln(classes).

    Shape:
        (batch, channels, height, width), or channels last, to (batch, classes), for any height and width of at least 1.

    Raises:
        HeadError: an option is invalid, or, in the forward pass, the input does not have this shape.

    Example:
        ```python
        head = AuxiliaryHead(1024, classes=1000)
        head(torch.randn(8, 1024, 14, 14)).shape  # (8, 1000)
        ```
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        batch_norm: bool = False,
        width: int = 128,
        hidden: int = 1024,
        layout: Layout | None = None,
        gain: Gain = "default",
    ) -> None:
        super().__init__()
        self.channels = channels
        self.layout: Layout | None = _check_option("layout", layout, ("channels_first", "channels_last", None))
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.conv = nn.Conv2d(channels, width, kernel_size=1, bias=not batch_norm)
        self.norm = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.fc1 = nn.Linear(width * 4 * 4, hidden)
        self.dropout = nn.Dropout(0.7)
        self.fc2 = nn.Linear(hidden, classes)
        self.relu = nn.ReLU()
        initialise_last(self.fc2, gain)

    def forward(self, features: Tensor) -> Tensor:
        """Return the class scores (batch, classes) of a feature map."""
        features = _channels_first(features, self.channels, self.layout, "AuxiliaryHead", (4,))
        x = self.relu(self.norm(self.conv(self.pool(features))))  # (batch, width, 4, 4)
        return self.fc2(self.dropout(self.relu(self.fc1(x.flatten(1)))))


class LinearHead(nn.Module):
    """Global average pooling and one fully connected layer.

    Args:
        channels: number of channels of the input.
        classes: number of classes.
        layout: layout of the input, see Note [Layouts].
        gain: initialisation of the layer, as for `AuxiliaryHead`.

    Shape:
        (batch, channels, ...) with 2 to 5 dimensions, or channels last, to (batch, classes).

    Raises:
        HeadError: an option is invalid, or, in the forward pass, the input does not have this shape.

    Example:
        ```python
        head = LinearHead(1024, classes=1000)
        head(torch.randn(8, 1024, 14, 14)).shape  # (8, 1000)
        ```
    """

    def __init__(self, channels: int, classes: int, *, layout: Layout | None = None, gain: Gain = "default") -> None:
        super().__init__()
        self.channels = channels
        self.layout: Layout | None = _check_option("layout", layout, ("channels_first", "channels_last", None))
        self.fc = nn.Linear(channels, classes)
        initialise_last(self.fc, gain)

    def forward(self, features: Tensor) -> Tensor:
        """Return the class scores (batch, classes) of the features."""
        features = _channels_first(features, self.channels, self.layout, "LinearHead", (2, 3, 4, 5))
        return self.fc(features.mean(dim=tuple(range(2, features.ndim))) if features.ndim > 2 else features)


class TokenHead(nn.Module):
    """Layer normalisation, pooling and one fully connected layer, as at the end of a vision transformer.

    Args:
        channels: number of features of each token.
        classes: number of classes, or the vocabulary size of a language model.
        pool: "mean" over all tokens, "first" for a class token, "last" for a causal model without right padding, or
            None to score each token, for language models and token classification.
        gain: initialisation of the layer, as for `AuxiliaryHead`.

    Shape:
        (batch, tokens, channels), or for "mean" and None (batch, ..., channels), to (batch, classes). Without pooling,
        to (batch, ..., classes).

    Raises:
        HeadError: an option is invalid, or, in the forward pass, the input does not have this shape.

    Example:
        ```python
        head = TokenHead(768, classes=1000, pool="first")
        head(torch.randn(8, 197, 768)).shape  # (8, 1000)
        ```
    """

    def __init__(self, channels: int, classes: int, *, pool: Pool | None = "mean", gain: Gain = "default") -> None:
        super().__init__()
        _check_option("pool", pool, ("mean", "first", "last", None))
        self.channels = channels
        self.pool: Pool | None = pool
        self.norm = nn.LayerNorm(channels)
        self.fc = nn.Linear(channels, classes)
        initialise_last(self.fc, gain)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the class scores, pooled over the tokens or for each token."""
        dims = (3,) if self.pool in ("first", "last") else (3, 4, 5)
        _channels_first(tokens, self.channels, "channels_last", "TokenHead", dims)
        if self.pool in ("first", "last"):
            tokens = tokens[:, 0 if self.pool == "first" else -1]
        scores = self.norm(tokens)
        if self.pool == "mean":
            scores = scores.mean(dim=tuple(range(1, scores.ndim - 1)))
        return self.fc(scores)


class DenseHead(nn.Module):
    """A segmentation head: a 1x1 convolution to class scores, interpolated to the size of the target.

    Args:
        channels: number of channels of the input map.
        classes: number of classes.
        size: size of the scores, such as (height, width) in pixels, or the factor by which to upsample each side.
        layout: layout of the input map, see Note [Layouts].
        gain: initialisation of the convolution, as for `AuxiliaryHead`.

    Shape:
        (batch, channels, height, width), or channels last, to (batch, classes, *size). Sequences and volumes, with one
        and three spatial dimensions, are also supported.

    Raises:
        HeadError: an option is invalid, or, in the forward pass, the input does not have this shape.

    Example:
        ```python
        head = DenseHead(256, classes=21, size=8)
        head(torch.randn(2, 256, 32, 32)).shape  # (2, 21, 256, 256)
        ```
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        *,
        size: tuple[int, ...] | int,
        layout: Layout | None = None,
        gain: Gain = "default",
    ) -> None:
        super().__init__()
        self.channels, self.size = channels, size
        self.layout: Layout | None = _check_option("layout", layout, ("channels_first", "channels_last", None))
        self.conv = nn.Conv1d(channels, classes, kernel_size=1)
        initialise_last(self.conv, gain)

    def forward(self, features: Tensor) -> Tensor:
        """Return the class scores (batch, classes, *size) of a map."""
        dims = (3, 4, 5) if isinstance(self.size, int) else (len(self.size) + 2,)
        features = _channels_first(features, self.channels, self.layout, "DenseHead", dims)
        spatial = features.shape[2:]
        scores = self.conv(features.flatten(2)).unflatten(2, spatial)
        size = [side * self.size for side in spatial] if isinstance(self.size, int) else list(self.size)
        mode = {1: "linear", 2: "bilinear", 3: "trilinear"}[len(spatial)]
        return functional.interpolate(scores, size, mode=mode, align_corners=False)


class Select(nn.Module):
    """A head that reads one item of a tuple, a list, a dict or a `ModelOutput`.

    Args:
        key: index or name of the item.
        head: the module that reads the item.

    Example:
        ```python
        head = Select("last_hidden_state", TokenHead(768, 10, pool="first"))
        ```
    """

    def __init__(self, key: int | str, head: nn.Module) -> None:
        super().__init__()
        self.key, self.head = key, head

    def forward(self, value: Any) -> Any:
        """Return the head's output for the selected item. Raises `HeadError` if the value does not have it."""
        return self.head(item_of(value, self.key))


def _check_option(name: str, value: _T, allowed: tuple[_T, ...]) -> _T:
    if value not in allowed:
        raise HeadError(f"{name}={value!r} is invalid", f"it must be one of {allowed}", f"Pass {name}={allowed[0]!r}.")
    return value


def initialise_last(layer: nn.Linear | nn.Conv1d | nn.Conv2d, gain: Gain) -> None:
    """Initialise the layer that computes class scores, in place.

    Args:
        layer: the last layer of a head or a network.
        gain: "default" keeps PyTorch's initialisation; "he" draws weights of variance 2 / fan-in; "quiet" draws small
            ones, so that the initial loss is within a few per cent of chance level. The bias becomes 0, except for
            "default".
    """
    _check_option("gain", gain, ("default", "he", "quiet"))
    if gain == "default":
        return
    fan_in = layer.weight[0].numel()
    nn.init.normal_(layer.weight, std=(2**0.5 if gain == "he" else QUIET) / fan_in**0.5)
    if layer.bias is not None:  # pyright: ignore[reportUnnecessaryComparison]
        nn.init.zeros_(layer.bias)


def _channels_first(features: Tensor, channels: int, layout: Layout | None, head: str, dims: tuple[int, ...]) -> Tensor:
    """View features as (N, C, ...), or raise `HeadError` if the head does not support them."""
    axis = -1 if layout == "channels_last" else 1
    fits = isinstance(features, Tensor) and features.ndim in dims and features.shape[axis] == channels  # pyright: ignore[reportUnnecessaryIsInstance]
    if fits and layout is None and features.ndim > 2:
        spatial = tuple(features.shape[2:])
        fits = len(spatial) == 2 and (channels not in spatial or spatial == (channels, channels))
    if not fits:
        raise _layout_error(features, channels, layout, head, dims)
    return features.movedim(-1, 1) if axis == -1 and features.ndim > 2 else features


def _layout_error(features: Any, channels: int, layout: Layout | None, head: str, dims: tuple[int, ...]) -> HeadError:
    """Build the error for an input that a head does not read, with the head or the option that reads it."""
    assumed = layout or "channels_first"
    forms = {2: "(N, {0})", 3: "(N, {0}, L)", 4: "(N, {0}, H, W)", 5: "(N, {0}, D, H, W)"}
    if assumed == "channels_last":
        forms = {2: "(N, {0})", 3: "(N, L, {0})", 4: "(N, H, W, {0})", 5: "(N, D, H, W, {0})"}
    accepted = " or ".join(forms[n] for n in dims if layout or n in (2, 4)).format(channels)
    problem = f"{head} does not read {describe(features)}"
    requirement = f"it reads {accepted}{'' if layout else ' if the layout is not declared'}"
    if not accepted:
        requirement = "the layout of its input must be declared"
    if not isinstance(features, Tensor):
        keys = list(items_of(features))
        remedy = f"Write Select(key, {head}(...)) with one of the keys {keys}." if keys else "Give a tensor."
        return HeadError(problem, requirement, remedy)
    shape = tuple(features.shape)
    is_first, is_last = shape[1:2] == (channels,), shape[2:] and shape[-1] == channels
    if layout is None and is_first and is_last:
        remedy = "Either dimension may be the channels: declare layout='channels_first' or 'channels_last'."
    elif is_last:
        remedy = f"TokenHead({channels}, classes) or LinearHead(..., layout='channels_last') reads channels last."
    elif layout is None and is_first and len(shape) == 4:
        remedy = (
            f"This looks like (N, H, W, C), with the height read as channels: TokenHead({shape[-1]}, classes) reads "
            "that. If it is (N, C, H, W), declare layout='channels_first'."
        )
    elif is_first:
        remedy = "LinearHead(..., layout='channels_first') reads it."
    elif len(shape) in dims and (layout or len(shape) in (2, 4)):  # a head for other channels would read it
        size = shape[-1 if assumed == "channels_last" else 1]
        condition = "" if layout or len(shape) == 2 else "If channels are first, "
        remedy = f"Build the head for the channels of its input. {condition}{head}({size}, ...) reads {size} channels."
    else:
        remedy = f"The input has {channels} channels in neither layout: build the head for its number of channels."
    return HeadError(problem, requirement, f"{remedy} head_for(model, plan, example, classes) chooses a head.")
