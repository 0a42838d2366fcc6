"""Files and arrays of any kind; what is none of them is named."""

import cv2
import numpy as np
import pytest

from mmdet_plugins.ops.images import read_image


def scene(height=90, width=130):
    """A bright ellipse on dark ground."""
    image = np.full((height, width, 3), 30, dtype=np.uint8)
    return cv2.ellipse(image, (width // 2, height // 2), (30, 20), 20, 0, 360, (220,) * 3, -1)


@pytest.mark.parametrize('kind', ['path', 'bytes', 'grey', 'alpha', 'deep', 'rotated', 'cmyk'])
def test_any_kind_of_image_file(tmp_path, kind):
    image = scene()
    path = tmp_path / 'image.png'
    if kind in ('rotated', 'cmyk'):
        from PIL import Image

        picture = Image.fromarray(np.ascontiguousarray(image[:, :, ::-1]))
        path = path.with_suffix('.jpg')
        if kind == 'cmyk':
            picture.convert('CMYK').save(path, quality=95)
        else:
            exif = Image.Exif()
            exif[0x0112] = 6  # shown after a quarter turn clockwise
            picture.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif, quality=95)
    else:
        pixels = dict(
            grey=image[:, :, 0],
            alpha=np.dstack((image, image[:, :, 0])),
            deep=image * np.uint16(257),
        ).get(kind, image)
        cv2.imwrite(str(path), pixels)
    read = read_image(path.read_bytes() if kind == 'bytes' else path)
    assert read.shape == image.shape and read.dtype == np.uint8
    assert np.abs(read.astype(int) - image).mean() < 3


def test_arrays():
    image = scene()
    for array in (
        image[:, :, 0],
        image[:, :, :1],
        np.dstack((image, image[:, :, 0])),
        image * np.uint16(257),
    ):
        assert np.array_equal(read_image(array), image)


def test_what_is_no_image_is_named(tmp_path):
    whole = cv2.imencode('.jpg', scene())[1].tobytes()
    for name, data, reason in (
        ('text.jpg', b'hello', 'cannot be decoded as an image'),
        ('empty.png', b'', 'cannot be decoded as an image'),
        ('cut.jpg', whole[:-200], 'is cut off'),
        ('whole.jpg', whole, 'is 130 x 90 pixels, the annotations say 90 x 130'),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError) as error:
            read_image(tmp_path / name, (130, 90))
        assert str(error.value) == f'{tmp_path / name} {reason}'
    with pytest.raises(FileNotFoundError, match='missing.jpg cannot be read: No such file'):
        read_image(tmp_path / 'missing.jpg')
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        read_image(tmp_path)


def test_exif_rotation_follows_the_size_asked_for(tmp_path):
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[:20] = 255
    encoded = cv2.imencode('.jpg', pixels)[1].tobytes()
    # Orientation 6: the reader turns the stored image by 90 degrees, clockwise.
    tiff = b'MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0'
    exif = b'Exif\0\0' + tiff
    marker = b'\xff\xe1' + (len(exif) + 2).to_bytes(2, 'big') + exif
    path = tmp_path / 'turned.jpg'
    path.write_bytes(encoded[:2] + marker + encoded[2:])

    turned = read_image(path, (60, 40))
    stored = read_image(path, (40, 60))
    assert turned[:, 25:].mean() > 250 and turned[:, :15].mean() < 5
    assert stored[:15].mean() > 250 and stored[25:].mean() < 5
    assert np.array_equal(read_image(path), turned)
    with pytest.raises(ValueError, match='turned.jpg is 40 x 60 pixels, the annotations say 60 x'):
        read_image(path, (61, 60))
