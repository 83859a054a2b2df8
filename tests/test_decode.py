"""Decoding: whole, upright pictures in RGB from whatever photographs come as, or a fault that says why not."""

import io
import struct
import time
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("simplejpeg", reason="needs the lab extra")

from PIL import Image
from sklearn.datasets import load_sample_image

from relaylab.data import decode as decoding
from relaylab.data.decode import decode, decode_checked
from relaylab.data.faults import ImageFault
from relaylab.data.geometry import CropSpec, centre_box, cut_box, training_window

# Four quarters of different colours: every way to turn it wrongly shows.
COLOURS = np.array([[[200, 40, 40], [40, 200, 40]], [[40, 40, 200], [200, 200, 40]]], np.uint8)


def quarters(height: int = 32, width: int = 48) -> np.ndarray:
    return COLOURS.repeat(height // 2, axis=0).repeat(width // 2, axis=1)


def photograph(width: int = 500, height: int = 375) -> Image.Image:
    return Image.fromarray(load_sample_image("china.jpg")).resize((width, height), Image.Resampling.LANCZOS)


def encoded(image: Image.Image | np.ndarray, kind: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def rotated(orientation: int, kind: str = "JPEG", **options: Any) -> bytes:
    """Quarters as a camera held in that way would store them."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # of Image.Transpose
    image = Image.fromarray(quarters())
    if orientation in inverse:
        image = image.transpose(Image.Transpose(inverse[orientation]))
    return encoded(image, kind, exif=exif, **options)


def assert_quarters(pixels: np.ndarray, tolerance: int = 12) -> None:
    assert pixels.dtype == np.uint8
    assert pixels.shape == quarters().shape
    assert pixels.flags.c_contiguous
    middles = pixels[8::16, 12::24].astype(int)
    assert np.abs(middles - COLOURS).max() <= tolerance


@pytest.mark.parametrize("kind", ["fill", "segments", "comment", "comments", "digits"])
def test_long_headers_take_no_time(kind: str) -> None:
    jpeg, size = encoded(Image.new("RGB", (8, 8), (200, 100, 50)), "JPEG"), 50_000_000
    data = {
        "fill": jpeg[:2] + b"\xff" * size + jpeg[2:],
        "segments": jpeg[:2] + b"\xff\xe1\0\x02" * (size // 4) + jpeg[2:],
        "comment": b"P6 #" + b"x" * size + b"\n8 8 255\n" + bytes(192),
        "comments": b"P6 8 8\n" + b"#\n" * (size // 2) + b"255\n" + bytes(192),
        "digits": b"P6 " + b"0" * size + b"8 8 255\n" + bytes(192),
    }[kind]
    began = time.process_time()
    if kind in ("fill", "segments"):
        assert decode(data).shape == (8, 8, 3)
    else:
        with pytest.raises(ImageFault, match="header"):
            decode(data)
    assert time.process_time() - began < 2


def test_jpeg_pixels_agree_with_pillow() -> None:
    for options in ({"subsampling": 2}, {"subsampling": 0}, {"progressive": True}):
        data = encoded(photograph(), quality=85, **options)
        pixels, complaint = decode_checked(data)
        assert complaint is None
        np.testing.assert_array_equal(pixels, np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


@pytest.mark.parametrize("kind", ["PNG", "BMP", "PPM", "TIFF", "WEBP", "GIF"])
def test_other_formats_by_content(kind: str) -> None:
    pixels, complaint = decode_checked(encoded(quarters(), kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert complaint is None
    assert pixels.flags.writeable, "PyTorch warns of arrays that are not"
    assert_quarters(pixels, 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_photographs_stand_upright(orientation: int, kind: str) -> None:
    assert_quarters(decode(rotated(orientation, kind)))


def test_odd_exif_leaves_the_picture_as_it_is() -> None:
    data = rotated(1)
    at = data.index(b"Exif\x00\x00") + 6
    assert_quarters(decode(data[:at] + b"\xff" * 12 + data[at + 12 :]))
    assert_quarters(decode(rotated(9)))
    assert_quarters(decode(data[: at - 10] + b"\xff" + data[at - 10 :]))  # a fill byte before the marker


def test_grey_cmyk_and_adobe() -> None:
    grey = decode(encoded(photograph().convert("L"), quality=90))
    assert grey.shape == (375, 500, 3)
    np.testing.assert_array_equal(grey[:, :, 0], grey[:, :, 2])
    cmyk = encoded(Image.fromarray(quarters()).convert("CMYK"), quality=95)
    assert b"Adobe" in cmyk
    pixels, complaint = decode_checked(cmyk)
    assert complaint is None
    assert_quarters(pixels)


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bits_are_scaled(kind: str) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)[None].repeat(8, 0)
    pixels = decode(encoded(Image.fromarray(ramp), kind))
    expected = np.rint(ramp / 257).astype(int)
    assert np.abs(pixels.astype(int) - expected[:, :, None]).max() <= 1
    assert len(np.unique(pixels)) == 64  # nothing clipped


def test_samples_without_a_scale_are_faults() -> None:
    for dtype in (np.int32, np.float32):
        data = encoded(Image.fromarray(np.full((4, 4), 100_000, dtype)), "TIFF")
        with pytest.raises(ImageFault, match="samples"):
            decode(data)


def test_transparency_is_ignored() -> None:
    alpha = np.dstack([quarters(), np.full((32, 48, 1), 7, np.uint8)])
    assert_quarters(decode(encoded(alpha, "PNG")), 0)
    palette = Image.fromarray(quarters()).quantize(4)
    assert_quarters(decode(encoded(palette, "PNG")), 3)
    assert_quarters(decode(encoded(palette, "PNG", transparency=0)), 3)
    assert_quarters(decode(encoded(palette, "PNG", transparency=b"\x00\x80\xff\xff")), 3)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_of_animations_the_first_frame(kind: str) -> None:
    black = Image.fromarray(np.zeros_like(quarters()))
    options = {"lossless": True} if kind == "WEBP" else {}
    data = encoded(Image.fromarray(quarters()), kind, save_all=True, append_images=[black, black], **options)
    assert_quarters(decode(data), 2)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[: len(data) // 2] + b"\xff\xd9",  # Pillow fills the rest with grey
        lambda data: data[:-30],
        lambda data: data[:300],
        lambda data: data[:3],
        lambda data: b"",
        lambda data: b"\x00" + data,
        lambda data: b"<html>404 Not Found</html>",
    ],
)
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_incomplete_images_are_faults(spoil: Any, kind: str) -> None:
    data = encoded(photograph(), kind)
    decode(data)
    with pytest.raises(ImageFault) as caught:
        decode(spoil(data))
    assert "\n" not in str(caught.value)
    assert str(caught.value)


def test_complaints_of_strict_decoding_are_returned() -> None:
    data = encoded(photograph(), quality=85)
    scan = data.index(b"\xff\xda")
    extraneous = data[:scan] + b"\x00\x00\x00\x00" + data[scan:]
    pixels, complaint = decode_checked(extraneous)
    assert "extraneous bytes" in str(complaint)
    np.testing.assert_array_equal(pixels, decode(data))
    assert decode_checked(data)[1] is None


def test_jpegs_unknown_to_simplejpeg_are_decoded_by_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(data: bytes) -> None:
        raise KeyError(6)

    monkeypatch.setattr(decoding.simplejpeg, "decode_jpeg_header", fail)
    pixels, complaint = decode_checked(encoded(quarters(), quality=95))
    assert complaint == "a chroma subsampling without a name"
    assert_quarters(pixels)


def test_bombs_are_refused_before_memory_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def bomb(width: int, height: int) -> bytes:
        data = bytearray(encoded(quarters(), "JPEG"))
        frame = data.index(b"\xff\xc0")
        data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
        return bytes(data)

    def chunk(kind: bytes, content: bytes) -> bytes:
        import zlib

        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    large = struct.pack(">IIBBBBB", 11_000, 10_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", large) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns of this size
        for data in (bomb(60_000, 60_000), png):
            with pytest.raises(ImageFault, match="pixels; expected 1 to 100000000"):
                decode(data)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 32 * 48 - 1)
    for kind in ("JPEG", "PNG"):
        with pytest.raises(ImageFault, match="48 x 32 pixels"):
            decode(encoded(quarters(), kind))
    monkeypatch.setattr(decoding, "MAX_PIXELS", 32 * 48)
    assert_quarters(decode(encoded(quarters())))


@pytest.mark.parametrize("error", [OSError, SyntaxError, ValueError, struct.error, OverflowError, RuntimeError])
def test_whatever_pillow_raises_is_a_fault(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error("no\ngood")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ImageFault, match=r"^no good$"):
        decode(b"GIF89a")


def test_running_out_of_memory_is_not_an_image_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(MemoryError):
        decode(b"GIF89a")


def test_formats_that_run_programs_are_not_opened() -> None:
    with pytest.raises(ImageFault, match="not an image of a known format"):
        decode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n")


@pytest.mark.parametrize(
    ("short", "needed", "expected"), [(512, 256, 2), (511, 256, 1), (1024, 256, 4), (2047, 256, 4), (9999, 256, 8)]
)
def test_reduction_is_a_power_of_two_that_leaves_enough(short: int, needed: int, expected: int) -> None:
    assert decoding.reduction(short, needed) == expected
    assert decoding.reduction(short, None) == 1


@pytest.mark.parametrize(("width", "height"), [(640, 427), (427, 640), (401, 123), (77, 300)])
@pytest.mark.parametrize("short_side", [20, 31, 100])
def test_reduced_decoding_of_both_decoders(width: int, height: int, short_side: int) -> None:
    image = photograph(width, height)
    scale = decoding.reduction(min(width, height), short_side)
    expected = (-(-height // scale), -(-width // scale), 3)
    pixels = decode(encoded(image), short_side=short_side)
    assert pixels.shape == expected
    with Image.open(io.BytesIO(encoded(image))) as drafted:
        drafted.draft(None, (short_side, short_side))
        np.testing.assert_array_equal(pixels, drafted)
    assert decode(encoded(image.convert("CMYK")), short_side=short_side).shape == expected


@pytest.mark.parametrize(
    ("width", "height"),
    [(500, 375), (375, 500), (256, 256), (257, 300), (72, 72), (613, 99), (31, 900), (1, 1), (3, 200)],
)
@pytest.mark.parametrize("crop_spec", [CropSpec(), CropSpec(size=64, short_side=72), CropSpec(size=31, short_side=40)])
def test_centre_crops_are_torchvisions(width: int, height: int, crop_spec: CropSpec) -> None:
    transforms = pytest.importorskip("torchvision.transforms.v2")
    image = photograph(width, height)
    expected = np.array(transforms.CenterCrop(crop_spec.size)(transforms.Resize(crop_spec.short_side)(image)))
    out = torch.empty(crop_spec.size, crop_spec.size, 3, dtype=torch.uint8)
    cut_box(np.array(image), centre_box(crop_spec, height, width), out)
    assert np.abs(out.numpy().astype(int) - expected).max() <= 1
    if min(width, height) > 200:  # half a pixel of the result to the side, the difference shows
        left, top, right, bottom = centre_box(crop_spec, height, width)
        half = (right - left) / crop_spec.size / 2
        cut_box(np.array(image), (left + half, top, right + half, bottom), out)
        assert np.abs(out.numpy().astype(int) - expected).max() > 8


@pytest.mark.parametrize(("height", "width"), [(20_000, 1), (1, 20_000)])
def test_very_long_images_need_no_more_memory_than_others(height: int, width: int) -> None:
    pixels = decode(encoded(np.full((height, width, 3), 50, np.uint8), "PNG"))
    out = torch.empty(224, 224, 3, dtype=torch.uint8)
    cut_box(pixels, centre_box(CropSpec(), height, width), out)
    assert (out == 50).all()
    assert training_window(CropSpec(), height, width, 0.99999, 0.99999) == (width - 1, height - 1, 1, 1)


def test_training_windows_lie_inside_and_reach_every_edge() -> None:
    for height, width in ((375, 500), (256, 256), (72, 99), (1, 1)):
        corners = {place: training_window(CropSpec(), height, width, place, place) for place in (0.0, 1 - 2**-53)}
        side = corners[0.0][2]
        assert corners[0.0] == (0, 0, side, side)
        assert corners[1 - 2**-53] == (width - side, height - side, side, side)
        assert abs(side - min(height, width) * 224 / 256) <= 0.5 or side == 1


def tiff(
    samples: np.ndarray,
    order: str = "<",
    *,
    planar: bool = False,
    photometric: int = 2,
    bits: int = 16,
    signed: bool = False,
) -> bytes:
    """An uncompressed TIFF of samples (h, w, channels), which Pillow cannot write."""
    height, width, channels = samples.shape
    data = (samples.transpose(2, 0, 1) if planar else samples).astype(f"{order}u2").tobytes()
    if bits == 8:
        data = samples.astype(np.uint8).tobytes()
    if bits == 12:
        pairs = samples.reshape(-1, 2).astype(np.uint32)
        words = pairs[:, 0] << 12 | pairs[:, 1]
        data = np.stack([words >> 16, words >> 8 & 255, words & 255], 1).astype(np.uint8).tobytes()
    planes = channels if planar else 1
    head = 8 + 2 + 12 * 11 + 4
    more = struct.pack(f"{order}{channels}H", *[bits] * channels)
    start = head + len(more) + 8 * planes
    offsets = [start + len(data) // planes * plane for plane in range(planes)]
    more += struct.pack(f"{order}{planes}I", *offsets) + struct.pack(
        f"{order}{planes}I", *[len(data) // planes] * planes
    )
    places = (head, head + 2 * channels, head + 2 * channels + 4 * planes)
    short, long = 3, 4
    entries = [
        (256, long, 1, width), (257, long, 1, height), (258, short, channels, places[0] if channels > 1 else bits),
        (259, short, 1, 1), (262, short, 1, photometric), (273, long, planes, places[1] if planes > 1 else offsets[0]),
        (277, short, 1, channels), (278, long, 1, height),
        (279, long, planes, places[2] if planes > 1 else len(data)), (284, short, 1, 2 if planar else 1),
        (339, short, 1, 2 if signed else 1),
    ]  # fmt: skip
    directory = struct.pack(f"{order}H", len(entries))
    for tag, kind, count, value in entries:
        packed = (
            struct.pack(f"{order}HH", value, 0) if kind == short and count == 1 else struct.pack(f"{order}I", value)
        )
        directory += struct.pack(f"{order}HHI", tag, kind, count) + packed
    magic = b"II*\0" if order == "<" else b"MM\0*"
    return magic + struct.pack(f"{order}I", 8) + directory + struct.pack(f"{order}I", 0) + more + data


@pytest.mark.parametrize("order", "<>")
def test_tiffs_that_pillow_misreads_are_right_or_refused(order: str) -> None:
    deep = quarters().astype(np.uint16) * 257
    np.testing.assert_array_equal(decode(tiff(deep, order)), quarters())
    with pytest.raises(ImageFault, match="TIFF of 16 bits in separate planes, which Pillow misreads"):
        decode(tiff(deep, order, planar=True))
    grey = deep[..., :1]
    expected = quarters()[..., :1].repeat(3, axis=2)
    np.testing.assert_array_equal(decode(tiff(grey, order, photometric=1)), expected)
    if order == "<":
        np.testing.assert_array_equal(decode(tiff(65535 - grey, photometric=0)), expected)
    else:
        with pytest.raises(ImageFault, match="a TIFF variant that Pillow does not read"):
            decode(tiff(65535 - grey, order, photometric=0))


def test_signed_samples_are_faults() -> None:
    grey = quarters()[..., :1]
    for bits in (8, 16):
        decode(tiff(grey, photometric=1, bits=bits))
        with pytest.raises(ImageFault, match=f"signed samples of {bits} bits, whose range is not defined"):
            decode(tiff(grey, photometric=1, bits=bits, signed=True))


def test_bmps_that_pillow_misreads_are_refused() -> None:
    pixels = np.zeros((32, 48), np.uint8)
    pixels[:, 24:] = 1
    image = Image.fromarray(pixels, "P")
    image.putpalette([0, 0, 0, 255, 255, 255])
    with pytest.raises(ImageFault, match="a BMP of 8 bits with a black-and-white palette"):
        decode(encoded(image, "BMP"))
    expected = (pixels * 255)[..., None].repeat(3, axis=2)
    np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels * 255).convert("1"), "BMP")), expected)
    image.putpalette([0, 0, 0, 255, 255, 255, 9, 9, 9])
    np.testing.assert_array_equal(decode(encoded(image, "BMP")), expected)


def test_12_bits_are_scaled() -> None:
    grey = (quarters()[..., :1].astype(np.uint32) * 4095 // 255).astype(np.uint16)
    pixels = decode(tiff(grey, photometric=1, bits=12))
    assert np.abs(pixels.astype(int) - quarters()[..., :1].astype(int)).max() <= 1


@pytest.mark.parametrize("note", ["text", "compressed text", "text at the end", "profile", "damaged text"])
def test_pngs_are_read_whatever_their_texts(note: str) -> None:
    chunks = {
        "text": b"tEXt" + b"Comment\0" + b"x" * 2_000_000,
        "compressed text": b"zTXt" + b"Comment\0\0" + zlib.compress(b"x" * 2_000_000),
        "text at the end": b"zTXt" + b"Comment\0\0" + zlib.compress(b"x" * 2_000_000),
        "profile": b"iCCP" + b"icc\0\0" + zlib.compress(bytes(2_000_000)),
        "damaged text": b"zTXt" + b"Comment\0\0" + b"not zlib",
    }
    data = encoded(quarters(), "PNG")
    chunk = chunks[note]
    packed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    at = len(data) - 12 if note == "text at the end" else 33  # before the end, or behind the header
    pixels, complaint = decode_checked(data[:at] + packed + data[at:])
    assert complaint is None
    assert_quarters(pixels, 0)
    with pytest.raises(ImageFault):
        decode(data[:33] + packed + data[33 : len(data) // 2])


def test_transparency_and_orientation_survive_without_the_texts() -> None:
    data = rotated(6, "PNG")
    chunk = b"zTXt" + b"Comment\0\0" + zlib.compress(b"x" * 2_000_000)
    packed = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    assert_quarters(decode(data[:33] + packed + data[33:]))


@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"optimize": True}, {"restart_marker_rows": 1}])
def test_a_jpeg_may_lack_its_end_marker_only(options: dict[str, Any]) -> None:
    data = encoded(photograph(), quality=85, **options)
    for cut in (2, 1):
        pixels, complaint = decode_checked(data[:-cut])
        assert complaint == "the end marker is missing, but no pixels are"
        np.testing.assert_array_equal(pixels, decode(data))
    for length in (len(data) // 2, len(data) - 20, len(data) - 200, data.rindex(b"\xff", 0, -2)):
        with pytest.raises(ImageFault):
            decode(data[:length])
    with pytest.raises(ImageFault):
        decode(data[: len(data) // 2] + b"\xff\xd9")


def test_a_progressive_jpeg_may_lack_scans_without_its_end_marker() -> None:
    data = encoded(photograph(), quality=85, progressive=True)
    scans = [place for place in range(len(data)) if data.startswith(b"\xff\xda", place)]
    for length in (len(data) - 2, scans[-1], scans[1]):
        with pytest.raises(ImageFault, match=r"[Pp]remature end"):
            decode(data[:length])


@pytest.mark.skipif("AVIF" not in decoding.FORMATS, reason="this Pillow does not read AVIF")
def test_avif_is_read() -> None:
    pixels = decode(encoded(quarters(), "AVIF", quality=100, subsampling="4:4:4"))
    assert_quarters(pixels)
    assert_quarters(decode(rotated(6, "AVIF", quality=100, subsampling="4:4:4")))


def test_the_reason_of_a_refusal_is_true(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "FORMATS", ("PNG",))
    for data, reason in (
        (b"\0\0\0\x1cftypavif" + bytes(100), "an AVIF that this Pillow does not read"),
        (b"\0\0\0\x18ftypheic" + bytes(100), "HEIC or a video, which are not supported: convert it to JPEG or PNG"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL, which is not supported"),
        (b"<!DOCTYPE html><html>", "text, such as a web page or SVG"),
        (b"nonsense", "not an image of a known format"),
    ):
        with pytest.raises(ImageFault, match=reason):
            decode(data)
