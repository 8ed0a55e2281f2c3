"""The one reader of images, for training, evaluation and Predictor: upright RGB of eight bits."""

import io
import os

import cv2
import numpy as np
from detectron2.utils.file_io import PathManager
from PIL import Image, ImageOps

from ..io import reading
from ..masks import check_size

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# All that Pillow reads by itself: it hands EPS, for one, to another program.
_FORMATS = "JPEG PNG BMP GIF ICO JPEG2000 PCX PPM TGA TIFF WEBP".split()


def images_in(folder: str | os.PathLike) -> list[str]:
    """The images in a folder and in those below it: paths relative to it with "/", sorted.

    Raises:
        ValueError: there is none.
    """
    found = [
        os.path.relpath(os.path.join(place, name), folder).replace(os.sep, "/")
        for place, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(EXTENSIONS)
    ]
    if not found:
        raise ValueError(f"{folder}: no {', '.join(EXTENSIONS)} file in this folder")
    return sorted(found)


def read_image(file_name: str | os.PathLike) -> np.ndarray:
    """Read an image as uint8 (H,W,3) RGB, turned as its EXIF orientation says.

    Grey, palette and CMYK are converted, 16-bit grey is scaled, transparency is composited on
    white.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not an image, or cut short, or of more than ``masks.MAX_PIXELS``.
    """
    name = os.fspath(file_name)
    try:
        with PathManager.open(name, "rb") as file:
            data = file.read()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(
            f"{name}: no such image; are those of the dataset under $DETECTRON2_DATASETS complete?"
        ) from error
    except ValueError as error:
        raise ValueError(f"{name!r} is no name of a file: {error}") from error
    with reading(name):
        try:
            return _decode(data)
        except Exception as error:
            raise ValueError(
                f"not an image, or one that is too large or damaged ({len(data)} bytes): {error}"
            ) from error


def _decode(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:  # reads the header alone
        check_size(image.height, image.width)
        if image.format != "JPEG" or image.mode not in ("L", "RGB"):
            return to_rgb(image)
    # OpenCV decodes JPEG files, which nearly all images of datasets are, faster than Pillow.
    # No end marker after the last scan: it would fill the rest of the image with grey.
    end = b"\xff\xd9"
    if not data.endswith(end) and data.rfind(end) < data.rfind(b"\xff\xda"):
        raise ValueError("the end is missing")
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if pixels is None:
        raise ValueError("it cannot be decoded")
    return cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)


def to_rgb(image: Image.Image | np.ndarray) -> np.ndarray:
    """Return an image in memory as uint8 (H,W,3) RGB, in the way of ``read_image``.

    Args:
        image: PIL, or uint8 of shape (H,W,3) RGB, (H,W) or (H,W,1) grey, or (H,W,4) RGBA.

    Raises:
        ValueError: an array of another dtype or shape, a mode without known range of values, or
            more than ``masks.MAX_PIXELS``.
    """
    if isinstance(image, np.ndarray):
        return _array_to_rgb(image)
    check_size(image.height, image.width)  # of a file, no pixel is decoded yet
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):  # convert() would clip at 255 instead of scaling
        grey = np.rint(np.asarray(image).astype(np.float32) / 257).astype(np.uint8)
        return _array_to_rgb(grey)
    if image.mode in ("I", "F"):
        raise ValueError(f"a PIL image of mode {image.mode!r} has no known range: give 8 bits")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image, mask=image.getchannel("A"))
        image = canvas
    return np.array(image.convert("RGB"))


def _array_to_rgb(array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8:
        raise ValueError(f"an image array must be uint8 with values 0..255, got {array.dtype}")
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4) or array.size == 0:
        raise ValueError(f"an image is (H,W,3) RGB, (H,W) grey or (H,W,4) RGBA, not {array.shape}")
    check_size(*array.shape[:2])
    if channels == 1:
        return np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    if channels == 4:
        return to_rgb(Image.fromarray(array))
    return np.ascontiguousarray(array)
