"""Strict image decoding: complete, upright RGB pixels, or an `ImageFault`.

Note [Decoding]
1. JPEGs are decoded by libjpeg-turbo (through simplejpeg), with the exact inverse transform and smooth chroma
   upsampling. `fastdct` would be 3 % faster but 0.8 of a level darker; `fastupsample` would be 7 % faster but cost 42
   dB.
2. All other formats, CMYK JPEGs and JPEGs that the strict decoder rejects are decoded by Pillow. `decode_checked`
   returns the strict decoder's complaint as well, since Pillow accepts damaged data.
3. A truncated JPEG is a fault and is not passed to Pillow, which would fill the rest with grey if the end marker is
   present. If only the end marker is missing, no pixels are missing: strict decoding succeeds once the marker is added.
   This holds for a single sequential scan; a progressive file without its end may lack scans.
4. Only full, 1/2, 1/4 and 1/8 scale are used: libjpeg-turbo's other scales have no vector code and are slower than
   full scale.
5. Samples of 12 and 16 bits are scaled, not clipped. Transparency is ignored, as by Pillow's `convert("RGB")`: the
   colours of transparent pixels are used. Colour profiles are ignored. Of an animation, the first frame is used.
6. The Exif orientation is applied, so that photographs are upright.
7. Pillow rejects a PNG whose text or profile chunks are damaged or larger than a megabyte. The pixels do not depend on
   them, so such a file is decoded again without these chunks.
8. Pillow misreads some TIFFs: it reads uncompressed 16-bit samples in separate planes as 8-bit, signed 8-bit samples as
   unsigned, and white-is-zero 16-bit samples as black-is-zero. The last are inverted here, and the others are rejected.
   Signed 16-bit and floating-point samples are rejected because their value range is not defined.
9. Pillow reads BMPs of several bits with a black-and-white palette as if they had one bit. They are rejected.
10. A small file can declare many pixels, or many scans in a progressive JPEG, each of which costs a pass over all
    pixels. Both are limited, and large images are converted a few rows at a time. So are headers of JPEGs and Netpbm
    files, which Python code reads byte by byte.
"""

import io
import re
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features

from relaylab.data.faults import ImageFault

Pixels = NDArray[np.uint8]

MAX_PIXELS = 100_000_000  # ImageNet's largest photograph has 61 million
MOST_PIXELS_OF = {"WEBP": 40_000_000, "AVIF": 40_000_000}  # their decoders need 26 bytes per pixel
MAX_SCANS, MAX_SCANNED = 100, 2_000_000_000  # scans of a JPEG (about 10 in practice), and scans times pixels
MAX_SEGMENTS, MAX_HEADER = 10_000, 1 << 16  # of a JPEG before its first scan; bytes of a Netpbm file
ROWS_AT_ONCE, LARGE = 256, 4_000_000  # rows; pixels
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # in Pillow; some of its others run external programs
FORMATS += ("AVIF",) if features.check("avif") else ()
SIGNATURES = (  # formats that Pillow rejects or is not asked to read: bytes at 0, bytes at 4, description
    (b"\x89PNG", b"", "a damaged PNG"),
    (b"II*\x00", b"", "a TIFF variant that Pillow does not read"),
    (b"MM\x00*", b"", "a TIFF variant that Pillow does not read"),
    (b"II+\x00", b"", "a BigTIFF variant that Pillow does not read"),
    (b"", b"ftypavif", "an AVIF that this Pillow does not read"),
    (b"", b"ftypavis", "an AVIF that this Pillow does not read"),
    (b"", b"ftyp", "HEIC or a video, which are not supported: convert it to JPEG or PNG"),
    (b"\x00\x00\x00\x0cJXL ", b"", "JPEG XL, which is not supported: convert it to JPEG or PNG"),
    (b"\xff\x0a", b"", "JPEG XL, which is not supported: convert it to JPEG or PNG"),
    (b"\x00\x00\x00\x0cjP  ", b"", "JPEG 2000, which is not supported: convert it to JPEG or PNG"),
    (b"8BPS", b"", "a Photoshop file, which is not supported: convert it to JPEG or PNG"),
    (b"%PDF", b"", "a PDF file"),
    (b"<", b"", "text, such as a web page or SVG"),
)
_ORIENTATION = 0x0112
_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_APP1, _START_OF_SCAN = 0xE1, 0xDA
_SEQUENTIAL, _OTHER_FRAMES = (0xC0, 0xC1), (*range(0xC2, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC))
_END_OF_IMAGE, _SCAN = b"\xff\xd9", b"\xff\xda"
_PLANES, _BITS, _COMPRESSION, _PHOTOMETRIC, _SAMPLES = 284, 258, 259, 262, 339  # tags of TIFF
_SIGNED = 2
_EXIF = b"Exif\x00\x00"
_FILL = re.compile(rb"\xff+")
_NUMBER = rb"(?:(?:\s|#[^\r\n]*[\r\n])+\d+)"  # after white space and comments
_NETPBM = re.compile(rb"P(?:[14]%b{2}|[2356]%b{3})\s" % (_NUMBER, _NUMBER))


def decode(data: bytes, *, short_side: int | None = None) -> Pixels:
    """Decode an image of any common format, recognised by its content. See Note [Decoding].

    Example::

        pixels = decode(Path("photo.jpg").read_bytes())  # uint8 (h, w, 3)

    Args:
        data: content of the file.
        short_side: minimum length of the result's shorter side in pixels. A JPEG is then decoded at the smallest of
            full, 1/2, 1/4 and 1/8 scale that satisfies it. None decodes at full scale.

    Returns:
        uint8 (h, w, 3), RGB, contiguous.

    Raises:
        ImageFault: the image is incomplete, damaged or of an unsupported format, or has more than `MAX_PIXELS`.
    """
    return decode_checked(data, short_side=short_side)[0]


def decode_checked(data: bytes, *, short_side: int | None = None) -> tuple[Pixels, str | None]:
    """Decode like `decode`; also return the strict decoder's complaint if Pillow decoded a damaged file, else None."""
    if not data:
        raise ImageFault("the file is empty")
    if not data.startswith(_JPEG):
        return _decode_by_pillow(data, short_side), None
    try:
        *shape, colours, _ = simplejpeg.decode_jpeg_header(data)
        height, width = map(int, shape)
        _check_size(height, width)
        _check_scans(data, height * width)
        if colours in ("CMYK", "YCCK"):
            return _decode_by_pillow(data, short_side), None
        scale = reduction(min(height, width), short_side)
        pixels = simplejpeg.decode_jpeg(
            data,
            fastdct=False,
            fastupsample=False,
            min_height=-(-height // scale),
            min_width=-(-width // scale),
            min_factor=scale,
        )
    except ImageFault:
        raise
    except (ValueError, LookupError) as error:  # LookupError: a colour space that simplejpeg does not know
        known = isinstance(error, ValueError)
        complaint = _line(error) if known else "a chroma subsampling without a name"
        if "premature end" in complaint.lower():
            return _decode_without_end(data, short_side, complaint), "the end marker is missing, but no pixels are"
        return _decode_by_pillow(data, short_side), complaint
    return _upright(pixels, _orientation(data)), None


def _decode_without_end(data: bytes, short_side: int | None, complaint: str) -> Pixels:
    """Decode a JPEG of which only the end marker is missing, else raise ImageFault. See Note [Decoding] 3."""
    if not data.endswith(_END_OF_IMAGE) and _has_one_scan(data):
        pixels, more = decode_checked(data.rstrip(b"\xff") + _END_OF_IMAGE, short_side=short_side)
        if more is None:
            return pixels
    raise ImageFault(complaint)


def _has_one_scan(data: bytes) -> bool:
    """Return whether the first scan of a JPEG is sequential and has all components."""
    components = None
    for marker, at, _ in _segments(data):
        if marker in _OTHER_FRAMES:
            return False
        if marker in _SEQUENTIAL:
            components = data[at + 9]
        if marker == _START_OF_SCAN:
            return data[at + 4] == components
    return False


def reduction(short: int, short_side: int | None) -> int:
    """Return the largest of 1, 2, 4, 8 by which a shorter side can be reduced and still have `short_side` pixels."""
    return next((scale for scale in (8, 4, 2) if short_side is not None and short >= scale * short_side), 1)


def _check_size(height: int, width: int, kind: str | None = None) -> None:
    most = min(MAX_PIXELS, MOST_PIXELS_OF.get(kind or "", MAX_PIXELS))
    if not 0 < height * width <= most:
        raise ImageFault(f"{width} x {height} pixels; expected 1 to {most}")


def _check_scans(data: bytes, pixels: int) -> None:
    """Limit the scans of a JPEG. See Note [Decoding] 10."""
    if _has_one_scan(data):  # decoders stop after it
        return
    # Counting markers is exact: in a scan's data, 0xFF is followed by zero or by a restart marker.
    scans = data.count(_SCAN)
    if scans > MAX_SCANS or scans * pixels > MAX_SCANNED:
        most = min(MAX_SCANS, MAX_SCANNED // pixels)
        raise ImageFault(f"{scans} scans of {pixels} pixels; expected at most {most}")


def _decode_by_pillow(data: bytes, short_side: int | None) -> Pixels:
    if _is_netpbm(data) and not _NETPBM.match(data, 0, MAX_HEADER):
        raise ImageFault(f"a Netpbm file with a damaged header, or one of more than {MAX_HEADER:,} bytes")
    try:
        return _pillow_pixels(data, short_side)
    except ImageFault:
        plain = without_notes(data)
        if plain == data:
            raise
        return _pillow_pixels(plain, short_side)


def _is_netpbm(data: bytes) -> bool:
    return data[:1] == b"P" and data[1:2] in b"123456" and data[2:3] in b" \t\r\n#"


def without_notes(data: bytes) -> bytes:
    """Return a PNG without the chunks that do not affect its pixels. See Note [Decoding] 7."""
    if not data.startswith(_PNG):
        return data
    kept, at = [_PNG], len(_PNG)
    while at + 12 <= len(data):
        end = at + 12 + int.from_bytes(data[at : at + 4])
        kind = data[at + 4 : at + 8]
        if not kind[0] & 0x20 or kind in (b"tRNS", b"eXIf"):  # upper case: a critical chunk
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]])


def _pillow_pixels(data: bytes, short_side: int | None) -> Pixels:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # large images, unusual Exif and palettes are all handled here
            Image.init()  # Pillow does not preload all of `FORMATS`
            with Image.open(io.BytesIO(data), formats=FORMATS) as image:
                width, height = image.size
                _check_size(height, width, image.format)
                if image.format == "JPEG":  # rejected by simplejpeg, or embedded in a TIFF
                    _check_scans(data, height * width)
                if reduction(min(width, height), short_side) > 1:
                    image.draft(None, (short_side or 1, short_side or 1))  # JPEG only; same scale as `reduction`
                _check_tiff(image)
                _check_bmp(image, data)
                image.load()
                is_jpeg = data.startswith(_JPEG)
                orientation = _orientation(data) if is_jpeg else image.getexif().get(_ORIENTATION, 1)
                return _upright(_to_rgb(image), orientation)
    except (ImageFault, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ImageFault(_format_of(data)) from None
    except Exception as error:  # damaged bytes can raise anything in Pillow's readers
        raise ImageFault(_line(error)) from None


def _format_of(data: bytes) -> str:
    """Describe the format of an unreadable file by its first bytes."""
    matches = (name for start, brand, name in SIGNATURES if data.startswith(start) and data.startswith(brand, 4))
    return next(matches, "not an image of a known format")


def _tiff_tag(image: Image.Image, tag: int, default: int) -> int:
    """Return the largest value of a TIFF tag, or the default if it is absent or the image is not a TIFF."""
    value = getattr(image, "tag_v2", {}).get(tag, default)
    return max(value, default=default) if isinstance(value, tuple) else value


def _check_tiff(image: Image.Image) -> None:
    """Raise ImageFault for TIFFs that Pillow misreads. See Note [Decoding] 8."""
    is_raw = _tiff_tag(image, _COMPRESSION, 1) == 1
    bits = _tiff_tag(image, _BITS, 1)
    if _tiff_tag(image, _SAMPLES, 1) == _SIGNED and bits in (8, 16):
        raise ImageFault(f"signed samples of {bits} bits, whose range is not defined")
    if is_raw and bits > 8 and _tiff_tag(image, _PLANES, 1) == 2:
        raise ImageFault(f"an uncompressed TIFF of {bits} bits in separate planes, which Pillow misreads")


def _check_bmp(image: Image.Image, data: bytes) -> None:
    """Raise ImageFault for BMPs that Pillow misreads. See Note [Decoding] 9."""
    at = 24 if int.from_bytes(data[14:18], "little") == 12 else 28  # 24 in the short header of OS/2
    bits = int.from_bytes(data[at : at + 2], "little")
    if image.format == "BMP" and image.mode == "1" and bits != 1:
        raise ImageFault(f"a BMP of {bits} bits with a black-and-white palette, which Pillow misreads")


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):
        samples = np.asarray(image)
        largest = 4095 if _tiff_tag(image, _BITS, 16) == 12 else 65535
        if samples.min() < 0 or samples.max() > largest:
            raise ImageFault(f"samples from {samples.min()} to {samples.max()}; expected 0 to {largest}")
        is_inverted = _tiff_tag(image, _PHOTOMETRIC, 1) == 0
        grey = np.empty((*samples.shape, 3), np.uint8)
        for rows in _blocks(len(samples)):
            block = samples[rows].astype(np.int64)
            block = largest - block if is_inverted else block
            grey[rows] = ((block * 255 + largest // 2) // largest)[:, :, None]
        return grey
    if image.mode == "F":
        raise ImageFault("floating-point samples, whose range is not defined")
    width, height = image.size
    if width * height <= LARGE:
        return np.array(image.convert("RGB"))  # a copy: Pillow's own buffer is read-only
    pixels = np.empty((height, width, 3), np.uint8)
    for rows in _blocks(height):
        pixels[rows] = np.asarray(image.crop((0, rows.start, width, rows.stop)).convert("RGB"))
    return pixels


def _blocks(height: int) -> Iterator[slice]:
    """Yield slices of an image's rows, `ROWS_AT_ONCE` at a time."""
    return (slice(top, min(top + ROWS_AT_ONCE, height)) for top in range(0, height, ROWS_AT_ONCE))


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield marker, offset and length of a JPEG's segments, up to the start of its first scan."""
    at, end = 2, len(data) - 4
    for _ in range(MAX_SEGMENTS):
        fill = _FILL.match(data, at)
        at = fill.end() - 1 if fill else end
        if at >= end:
            break
        marker = data[at + 1]
        length = data[at + 2] << 8 | data[at + 3]
        yield marker, at, length
        if marker == _START_OF_SCAN:
            break
        at += 2 + length


def _orientation(data: bytes) -> int:
    """Return the Exif orientation of a JPEG, 1 to 8. A file without Exif costs one or two microseconds."""
    for marker, at, length in _segments(data):
        if marker == _APP1 and data.startswith(_EXIF, at + 4):
            return _read_exif(data[at + 4 : at + 2 + length])
    return 1


def _read_exif(block: bytes) -> int:
    exif = Image.Exif()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exif.load(block)
            return exif.get(_ORIENTATION, 1)
    except MemoryError:
        raise
    except Exception:  # damaged Exif does not affect the pixels
        return 1


def _upright(pixels: Pixels, orientation: int) -> Pixels:
    """Undo an Exif orientation; values outside 2 to 8 are ignored."""
    if orientation in (2, 3):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4):
        pixels = pixels[::-1]
    if orientation in (5, 7):
        pixels = pixels.swapaxes(0, 1)
    if orientation == 7:
        pixels = pixels[::-1, ::-1]
    if orientation in (6, 8):
        pixels = np.rot90(pixels, 1 if orientation == 8 else -1)
    return np.ascontiguousarray(pixels)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
