"""Reading of Caffe's files into messages and arrays."""

import math
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import text_format
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from relaylab.errors import InputError
from relaylab.models.caffe.schema import NetParameter
from relaylab.outside.showing import brief

LARGEST_TEXT = 4 << 20  # bytes; the authors' prototxt has 20,952
LARGEST_BINARY = (1 << 31) - 1  # bytes; protobuf reads no more
AUTHORS_SIZE = 685_025_107  # bytes of the caffemodel that the authors released
MOST_SIDES = 8  # dimensions of a blob; Caffe's have up to four
SHOWN = 200  # characters of a library's error

Blobs = tuple[NDArray[np.float32], ...]


def read_prototxt(path: Path) -> Any:
    """Read the definition of a network as a `NetParameter`.

    Raises:
        InputError: the file cannot be read, or is not a prototxt file.
    """
    data = read_limited(path, LARGEST_TEXT, "a prototxt has a few thousand bytes; are prototxt and caffemodel swapped?")
    _refuse_mistaken(path, data, "a Caffe prototxt")
    try:
        network = text_format.Parse(data.decode("utf-8-sig"), NetParameter(), allow_unknown_field=True)
    except UnicodeDecodeError:
        raise InputError(
            f"{path} is not text: expected a Caffe prototxt; are prototxt and caffemodel swapped?"
        ) from None
    except (text_format.ParseError, RecursionError) as error:
        raise InputError(
            f"{path} is not a Caffe prototxt ({_line(error)}): expected the text definition of a network; are prototxt "
            "and caffemodel swapped, or is the file truncated?"
        ) from None
    if not network.layer and not network.layers:
        raise InputError(f"{path} has no layers: expected the prototxt of a network")
    return network


def read_weights(path: Path, names: Container[str]) -> dict[str, Blobs]:
    """Read the blobs of the named layers of a caffemodel as read-only arrays. See Note [Weights as bytes].

    Raises:
        InputError: the file cannot be read, is not a caffemodel file, is truncated, or has no weights.
    """
    network = _read_caffemodel(path)
    try:
        layers = [layer for layer in (*network.layers, *network.layer) if layer.blobs]
        if not layers:
            raise InputError(f"{path} has no weights: expected the caffemodel of a trained network; is it truncated?")
        weights = dict[str, Blobs]()
        for layer in layers:
            if layer.name not in names:
                continue
            where = f"{path}: layer {brief(layer.name)!r}"
            if layer.name in weights:
                raise InputError(f"{where} occurs twice: expected the weights of each layer once")
            weights[layer.name] = tuple(_array(blob, f"{where}, blob {i}") for i, blob in enumerate(layer.blobs))
    except UnicodeDecodeError:  # protobuf decodes strings on access
        raise InputError(f"{path} is damaged: a layer's name is not text; download it again") from None
    return weights


def read_limited(path: Path, most: int, otherwise: str) -> bytes:
    """Read a regular file of at most `most` bytes; `otherwise` is the end of the error message for a larger file.

    Raises:
        InputError: the file does not exist, cannot be read, or is larger.
    """
    try:
        if not path.is_file():
            raise InputError(f"{path} is not a file" if path.exists() else f"no such file: {path}")
        size = path.stat().st_size
        if size > most:
            raise InputError(f"{path} has {size:,} bytes, more than the limit of {most:,}: {otherwise}")
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def _read_caffemodel(path: Path) -> Any:
    data = read_limited(path, LARGEST_BINARY, "protobuf files are smaller; expected a caffemodel")
    _refuse_mistaken(path, data, "a caffemodel")
    try:
        return NetParameter.FromString(data)
    except DecodeError:
        if data[:4096].isascii() and b"\0" not in data[:4096]:
            remedy = "it is text; are prototxt and caffemodel swapped?"
        else:
            remedy = f"is the download incomplete? The authors' file has {AUTHORS_SIZE:,} bytes"
        raise InputError(f"{path} ({len(data):,} bytes) is not a complete caffemodel: {remedy}") from None


def _refuse_mistaken(path: Path, data: bytes, expected: str) -> None:
    """Raise InputError for files of other kinds, and those that a failed download often leaves."""
    start = data[:1024].lstrip().lower()
    if not data:
        what = "is empty; download it again"
    elif start.startswith(b"version https://git-lfs"):
        what = "is a Git LFS pointer, not the file itself; run `git lfs pull` in the clone"
    elif start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        what = "is a web page; download the raw file"
    elif start.startswith(b"\x80\x02") or (start.startswith(b"pk\x03\x04") and b"/data.pkl" in start):
        what = "is a PyTorch file, which has no layer types"
    elif start.startswith(b"\x89hdf"):
        what = "is an HDF5 file; convert it with Caffe (snapshot_format: BINARYPROTO)"
    elif start.startswith(b"\x93numpy"):
        what = "is a NumPy file"
    elif data[4:10] == b'\0\0\0\0{"':
        what = "is a safetensors file, which has no layer types"
    elif data.startswith(b"\x08"):  # the first field of a caffemodel is text
        what = "is the state of a solver (.solverstate) or an ONNX file; pass the .caffemodel"
    elif start.startswith((b"pk\x03\x04", b"\x1f\x8b", b"7z\xbc\xaf")):
        what = "is an archive; unpack it first"
    else:
        return
    raise InputError(f"{path} {what}: expected {expected}")


def _array(blob: Any, where: str) -> NDArray[np.float32]:
    old = ("num", "channels", "height", "width")
    shape = tuple(blob.shape.dim)
    if not blob.HasField("shape"):  # before 2015 all blobs had four dimensions
        shape = tuple(getattr(blob, side) for side in old) if any(map(blob.HasField, old)) else ()
    data, kind = (blob.data, "<f4") if blob.data else (blob.double_data, "<f8")
    if not data:
        raise InputError(
            f"{where} has no packed values: expected weights as written by Caffe; is the file truncated, or written by "
            "another program?"
        )
    numbers, rest = divmod(len(data), np.dtype(kind).itemsize)
    if rest or not 1 <= len(shape) <= MOST_SIDES or min(shape) < 1 or numbers != math.prod(shape):
        shape = shape[:MOST_SIDES]
        raise InputError(f"{where} has shape {shape} but {len(data):,} bytes; is the file damaged?")
    with np.errstate(over="ignore"):  # infinite values are rejected later
        return np.frombuffer(data, kind).reshape(shape).astype(np.float32, copy=False)


def _line(error: Exception) -> str:
    return brief(" ".join(str(error).split())[:SHOWN])
