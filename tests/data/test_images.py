"""The one reader of images: every form gives the same upright RGB, or an error that names the file."""

import io
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image

from ris_d2.data.images import read_image, to_rgb
from ris_d2.masks import MAX_PIXELS
from ris_d2.predictor import Predictor


def picture(height=48, width=64):
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return cv2.GaussianBlur(noise, (9, 9), 3)


def chunk(name, data):
    body = name + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png_header(height, width):
    """A PNG file that claims to be large and holds next to nothing."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(1000))), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def jpeg_of_size(height, width):
    """A sound JPEG file whose header claims another size."""
    buffer = io.BytesIO()
    Image.fromarray(picture()).save(buffer, "JPEG")
    data = bytearray(buffer.getvalue())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def save(kind, path):
    image = Image.fromarray(picture())
    if kind == "rgba.png":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    elif kind == "palette.gif":
        image = image.quantize(16)
    elif kind == "grey.jpg":
        image = image.convert("L")
    elif kind == "deep.png":
        image = Image.fromarray(np.arange(48 * 64, dtype=np.uint16).reshape(48, 64) * 20)
    elif kind == "cmyk.jpg":
        image = image.convert("CMYK")
    exif = Image.Exif()
    exif[0x0112] = 6 if kind == "turned.jpg" else 1
    image.save(path, **({"exif": exif} if kind.endswith("jpg") else {}))
    return image


@pytest.mark.parametrize(
    "kind",
    ["rgb.png", "rgb.bmp", "rgb.webp", "rgb.jpg", "turned.jpg", "grey.jpg", "cmyk.jpg"]
    + ["rgba.png", "palette.gif", "deep.png"],
)
def test_training_evaluation_and_predictor_see_the_same_pixels(kind, tmp_path, make_mapper):
    save(kind, tmp_path / kind)
    pixels = read_image(tmp_path / kind)
    height, width = pixels.shape[:2]
    assert (height, width) == ((64, 48) if kind == "turned.jpg" else (48, 64))
    record = {
        "file_name": str(tmp_path / kind),
        "image_id": 1,
        "height": height,
        "width": width,
        "source": "toy",
        "annotations": [],
        "expressions": [{"expression_id": 1, "ref_id": 1, "text": "it", "annotation_ids": []}],
    }
    expected = pixels.transpose(2, 0, 1)
    for is_train in (True, False):
        mapper = make_mapper(is_train=is_train, size=(height, width))
        np.testing.assert_array_equal(mapper(record)["image"], expected)
    predictor = Predictor.__new__(Predictor)
    predictor.mapper = mapper
    np.testing.assert_array_equal(predictor.prepare(tmp_path / kind, "it")["image"], expected)
    # A Pillow image in memory may have been decoded by another library.
    assert abs(to_rgb(Image.open(tmp_path / kind)).astype(int) - pixels).mean() < 3


def test_transparency_shows_white(tmp_path):
    save("rgba.png", tmp_path / "rgba.png")
    rgba = np.asarray(Image.open(tmp_path / "rgba.png")).astype(float)
    alpha = rgba[..., 3:] / 255
    expected = np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha))
    assert abs(read_image(tmp_path / "rgba.png") - expected).max() <= 1
    assert (read_image(tmp_path / "rgba.png")[rgba[..., 3] == 0] == 255).all()


@pytest.mark.parametrize("side", [(2**16, 2**16), (1, MAX_PIXELS + 1), (2**31 - 1, 2**31 - 1)])
def test_a_size_that_no_picture_has_is_refused_before_decoding(side, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(*side))
    with pytest.raises(ValueError, match=r"bomb.png: not an image, or one that is too large"):
        read_image(path)


_CAPPED = """
import resource, sys
from ris_d2.data.images import read_image
from ris_d2.masks import rasterize
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 2**30  # one GiB more than the imports took
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[1:]:
    try:
        read_image(path)
    except ValueError as error:
        print(error)
for rle in ({"size": [10**5, 10**5], "counts": [10**10]}, {"size": [2**40, 2**40], "counts": "0"}):
    try:
        rasterize(rle, *rle["size"])
    except ValueError as error:
        print(error)
for polygon in ([0, 0, 1e8, 0, 1e8, 1e8], [0, 0, 59, 39] * 40000):
    try:
        rasterize([polygon], 40, 60)
    except ValueError as error:
        print(error)
"""


def test_bombs_are_clear_errors_under_a_memory_cap(tmp_path):
    files = {
        "large.png": png_header(2**16, 2**16),
        "within.png": png_header(9000, 9000),  # allowed, but its content is missing
        "large.jpg": jpeg_of_size(65000, 65000),
        "within.jpg": jpeg_of_size(9000, 9000)[:-100],
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", _CAPPED, *(str(tmp_path / name) for name in files)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for name, line in zip(files, lines):
        assert f"{name}: not an image, or one that is too large or damaged" in line
    assert [line.split(",")[0] for line in lines[4:]] == [
        "an image or mask has positive sides and at most 89",
        "an image or mask has positive sides and at most 89",
        "a polygon's coordinates lie at most the image's longer side",
        "the polygons' outlines are 4",
    ]


def test_files_that_are_no_images(tmp_path):
    Image.fromarray(picture()).save(tmp_path / "whole.eps")  # Pillow would start Ghostscript
    with pytest.raises(ValueError, match="whole.eps: not an image"):
        read_image(tmp_path / "whole.eps")
    with pytest.raises(FileNotFoundError, match="no such image"):
        read_image(tmp_path)
    with pytest.raises(ValueError, match="no name of a file"):
        read_image("a\0b.png")


def test_odd_headers_of_jpeg_files_are_left_to_pillow(tmp_path):
    """Fill bytes before a marker are legal; the size is still known before a pixel is decoded."""
    data = jpeg_of_size(48, 64)
    frame = data.index(b"\xff\xc0")
    (tmp_path / "fill.jpg").write_bytes(data[:frame] + b"\xff\xff" + data[frame:])
    (tmp_path / "plain.jpg").write_bytes(data)
    difference = read_image(tmp_path / "fill.jpg").astype(int) - read_image(tmp_path / "plain.jpg")
    assert abs(difference).max() <= 2
    large = jpeg_of_size(65000, 65000)
    (tmp_path / "fill.jpg").write_bytes(large[:frame] + b"\xff\xff" + large[frame:])
    with pytest.raises(ValueError, match="fill.jpg: .*decompression bomb"):
        read_image(tmp_path / "fill.jpg")
