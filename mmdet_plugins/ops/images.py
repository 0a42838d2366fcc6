"""Image files as pixels, read in one way by every stage and by the report."""

import os
from pathlib import Path

import cv2
import numpy as np


def read_image(
    image: str | os.PathLike | bytes | np.ndarray, image_hw: tuple[int, int] | None = None
) -> np.ndarray:
    """Decode an image, or check an array, to contiguous BGR uint8 ``[H, W, 3]``.

    Files of any kind OpenCV reads: grey, CMYK, with alpha (dropped), 16 bit (the upper 8). They are
    turned as their EXIF data says, unless it is the unturned pixels that have the size asked for.
    Arrays: ``[H, W]``, or ``[H, W, 1, 3 or 4]`` in BGR(A) order, uint8 or uint16.

    Args:
        image: A path, the bytes of a file, or an array.
        image_hw: The size it should have.

    Raises:
        OSError, ValueError: It is no such thing, or of another size; the message begins with the
            file's name.
    """
    if isinstance(image, np.ndarray):
        name, pixels = 'the image array', _checked(image)
    elif isinstance(image, bytes):
        name = f'the image given as {len(image)} bytes'
        pixels = _decode(image, name, image_hw)
    else:
        name = str(image)
        try:
            data = Path(image).read_bytes()
        except OSError as error:
            raise type(error)(f'{name} cannot be read: {error.strerror}') from None
        pixels = _decode(data, name, image_hw)
    if pixels.size == 0:
        raise ValueError(f'{name} has no pixels')
    if image_hw is not None and pixels.shape[:2] != tuple(image_hw):
        (height, width), (stated_height, stated_width) = pixels.shape[:2], image_hw
        raise ValueError(
            f'{name} is {width} x {height} pixels, the annotations say '
            f'{stated_width} x {stated_height}'
        )
    return np.ascontiguousarray(pixels)


def _checked(image: np.ndarray) -> np.ndarray:
    if image.dtype == np.uint16:
        image = (image >> 8).astype(np.uint8)
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise ValueError(
            f'an image array is uint8 [H, W, 3] in BGR order, not {image.dtype} {image.shape}'
        )
    image = image.reshape(*image.shape[:2], channels)
    return image.repeat(3, axis=2) if channels == 1 else image[:, :, :3]


def _decode(data: bytes, name: str, image_hw: tuple[int, int] | None) -> np.ndarray:
    # OpenCV fills what a cut-off JPEG lacks with grey. An embedded thumbnail ends in its first
    # half, the picture itself does not.
    if data[:2] == b'\xff\xd8' and b'\xff\xd9' not in data[len(data) // 2 :]:
        raise ValueError(f'{name} is cut off')
    pixels = None
    for flags in (cv2.IMREAD_COLOR, cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION):
        try:
            decoded = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
        except cv2.error as error:
            raise ValueError(f'{name} cannot be decoded: {error}') from None
        if decoded is None:
            raise ValueError(f'{name} cannot be decoded as an image')
        if image_hw is None or decoded.shape[:2] == tuple(image_hw):
            return decoded
        pixels = decoded if pixels is None else pixels
    return pixels
