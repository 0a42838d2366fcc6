import cv2
import numpy as np
import pytest
from mmdet.registry import DATASETS

import mmdet_plugins.common.image_folder  # noqa: F401


@pytest.fixture
def folder(tmp_path):
    """Three images, one of them below another folder, and files that are none."""
    (tmp_path / 'below').mkdir()
    for i, name in enumerate(('b.JPG', 'a.png', 'below/c.jpeg')):
        _, content = cv2.imencode('.png', np.full((4, 6 + i, 3), 50 * i, np.uint8))
        (tmp_path / name).write_bytes(content.tobytes())
    (tmp_path / 'notes.txt').write_text('not an image')
    (tmp_path / '.hidden.png').write_bytes(b'')
    (tmp_path / '.thumbs').mkdir()
    (tmp_path / '.thumbs' / 'a.png').write_bytes(b'')
    return tmp_path


def build(folder, **options):
    pipeline = [dict(type='LoadImageFromFile')]
    return DATASETS.build(
        dict(type='ImageFolderDataset', data_root=str(folder), pipeline=pipeline) | options
    )


def test_all_images_in_order(folder):
    dataset = build(folder)
    assert len(dataset) == 3
    found = [dataset[i] for i in range(3)]
    assert [one['file_name'] for one in found] == ['a.png', 'b.JPG', 'below/c.jpeg']
    assert [one['img_id'] for one in found] == [0, 1, 2]
    assert [one['img'].shape for one in found] == [(4, 7, 3), (4, 6, 3), (4, 8, 3)]
    assert found[2]['img_path'] == str(folder / 'below' / 'c.jpeg')
    assert len(build(folder, data_prefix=dict(img='below/'))) == 1


@pytest.mark.parametrize('content', [b'', b'\x89PNG\r\n\x1a\n half'])
def test_unreadable_images_are_named(folder, content, capfd):
    (folder / 'a.png').write_bytes(content)
    training = build(folder, max_refetch=50)
    assert all(training[0]['file_name'] != 'a.png' for _ in range(3))
    out, err = capfd.readouterr()
    assert (out + err).count(f'{folder / "a.png"} cannot be read as an image') == 1
    with pytest.raises(ValueError, match=r'a\.png cannot be read as an image: repair or remove it'):
        build(folder, test_mode=True)[0]


def test_an_error_of_the_pipeline_is_not_blamed_on_the_image(folder):
    dataset = build(folder)
    dataset.pipeline.transforms.append(lambda results: results['missing'])
    with pytest.raises(KeyError, match='missing'):
        dataset[0]


def test_empty_and_missing_folders(folder, tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'empty' / 'notes.txt').write_text('')
    with pytest.raises(
        ValueError, match=r'empty.* holds no image: none of its files ends in \.bmp'
    ):
        build(folder, data_prefix=dict(img='empty/'))
    with pytest.raises(FileNotFoundError, match='absent.* does not exist: set data_root'):
        build(folder, data_prefix=dict(img='absent/'))
