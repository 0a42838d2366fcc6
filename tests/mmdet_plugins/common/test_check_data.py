"""Each kind of trouble is planted in a sound data set, and it alone must be reported."""

import copy
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils

from mmdet_plugins.common.check_data import KINDS, check_annotations, check_data, check_image

SIZE_WH = (120, 90)


def _rle(height, width):
    mask = np.zeros((height, width), np.uint8, order='F')
    mask[30:60, 20:70] = 1
    rle = mask_utils.encode(mask)
    return {'size': rle['size'], 'counts': rle['counts'].decode()}


@pytest.fixture
def sound():
    """Two 90x120 images; a polygon, an RLE and an uncompressed crowd."""
    box, polygon = [20, 30, 50, 30], [20, 30, 70, 30, 70, 60, 20, 60]
    crowd = {'size': [90, 120], 'counts': [0, 900, 90 * 120 - 900]}  # ten columns
    return {
        'images': [{'id': i, 'file_name': f'{i}.jpg', 'height': 90, 'width': 120} for i in (1, 2)],
        'categories': [{'id': 4, 'name': 'cat'}],
        'annotations': [
            {
                'id': 1,
                'image_id': 1,
                'category_id': 4,
                'bbox': box,
                'area': 1500,
                'iscrowd': 0,
                'segmentation': [polygon],
            },
            {
                'id': 2,
                'image_id': 2,
                'category_id': 4,
                'bbox': box,
                'area': 1500.0,
                'iscrowd': 0,
                'segmentation': _rle(90, 120),
            },
            {
                'id': 3,
                'image_id': 2,
                'category_id': 4,
                'bbox': [0, 0, 10, 90],
                'area': 900,
                'iscrowd': 1,
                'segmentation': crowd,
            },
        ],
    }


def test_sound_data_pass(sound):
    assert list(check_annotations(sound)) == []


def _annotation(**changes):
    return lambda data: data['annotations'][1].update(changes)


def _append(key, **entry):
    return lambda data: data[key].append({**data[key][0], **entry})


PLANTED = {
    'empty': (lambda data: data.update(annotations=[]), 'annotations'),
    'field': (lambda data: data['annotations'][1].pop('bbox'), 'annotation 2'),
    'duplicate-id': (_append('images', file_name='3.jpg'), 'image 1'),
    'unknown-image': (_annotation(image_id=77), 'annotation 2'),
    'unknown-category': (_annotation(category_id=5), 'annotation 2'),
    'box-not-finite': (_annotation(bbox=[20, float('nan'), 50, 30]), 'annotation 2'),
    'box-inverted': (_annotation(bbox=[70, 60, -50, -30]), 'annotation 2'),
    'box-empty': (_annotation(bbox=[20, 30, 50, 0]), 'annotation 2'),
    'box-outside': (_annotation(bbox=[130, 30, 50, 30]), 'annotation 2'),
    'area-not-positive': (_annotation(area=0), 'annotation 2'),
    'polygon': (_annotation(segmentation=[[20, 30, 70, 30]]), 'annotation 2'),
    'rle': (_annotation(segmentation=_rle(80, 120)), 'annotation 2'),
    'mask-empty': (
        _annotation(segmentation={'size': [90, 120], 'counts': [10800]}),
        'annotation 2',
    ),
    'id-zero': (_annotation(id=0), 'annotation 0'),
    'duplicate-name': (_append('categories', id=5), 'category cat'),
    'duplicate-file': (_append('images', id=3), 'image 1.jpg'),
    'box-beyond-image': (
        _annotation(
            bbox=[20, 30, 150, 30], area=2900, segmentation=[[20, 30, 119, 30, 119, 59, 20, 59]]
        ),
        'annotation 2',
    ),
    'box-off-mask': (_annotation(bbox=[20, 30, 70, 60]), 'annotation 2'),  # two corners
    'area-mismatch': (_annotation(area=3000), 'annotation 2'),
    'mask-missing': (_annotation(segmentation=None), 'annotation 2'),
}


@pytest.mark.parametrize('kind', PLANTED)
def test_planted_in_the_annotations(sound, kind):
    plant, where = PLANTED[kind]
    plant(sound)
    problems = list(check_annotations(sound))
    assert [problem.kind for problem in problems] == [kind]
    assert problems[0].where.split(' (')[0] == where
    level = 'error' if KINDS[kind][0] else 'warning'
    assert str(problems[0]).startswith(f'{level}: {problems[0].where}: ')
    assert str(problems[0]).endswith(KINDS[kind][1])


@pytest.mark.parametrize(
    'segmentation, kind',
    [
        ({'size': [90, 120], 'counts': '!"#'}, 'rle'),
        ({'size': [90, 120], 'counts': _rle(90, 120)['counts'][:-2]}, 'rle'),
        ({'size': [90, 120], 'counts': [5, 20]}, 'rle'),
        ({'size': [90, 120], 'counts': [5, 99999]}, 'rle'),
        ({'size': [90, 120], 'counts': [-5, 10805]}, 'rle'),
        ({'counts': [10800]}, 'rle'),
        ({'size': [90, 120]}, 'rle'),
        ([], 'polygon'),
        ([[]], 'polygon'),
        ([[20, 30, 70, 30, 70, 60, 20]], 'polygon'),
        ([[20, 30, 70, float('inf'), 70, 60]], 'polygon'),
        ('mask.png', 'polygon'),
    ],
)
def test_broken_masks(sound, segmentation, kind):
    sound['annotations'][1]['segmentation'] = segmentation
    assert [problem.kind for problem in check_annotations(sound)] == [kind]


@pytest.mark.parametrize(
    'image',
    [
        {'id': 1, 'file_name': '1.jpg'},
        {'id': 1, 'file_name': '1.jpg', 'height': 0, 'width': 120},
        None,
    ],
)
def test_image_entries_without_a_size(sound, image):
    sound['images'][0] = image
    assert 'field' in [problem.kind for problem in check_annotations(sound)]


@pytest.mark.parametrize(
    'key, field, value',
    [
        ('images', 'id', [1]),
        ('images', 'file_name', 7),
        ('annotations', 'id', [2]),
        ('annotations', 'image_id', {}),
        ('annotations', 'category_id', [1]),
        ('annotations', 'category_id', None),
        ('categories', 'id', [1]),
        ('categories', 'name', None),
    ],
)
def test_fields_of_another_type(sound, tmp_path, key, field, value):
    sound[key][0][field] = value
    path = tmp_path / 'annotations.json'
    path.write_text(json.dumps(sound))
    found = [str(problem) for problem in check_data(path, tmp_path) if problem.kind == 'field']
    assert len(found) == 1 and f'has the {field} {value!r}, which should be' in found[0]


@pytest.mark.parametrize(
    'text, message',
    [
        ('{"images": [', 'not valid JSON at line 1, column 13'),
        ('\ufeff\x00\x01', 'not valid JSON'),
        ('[]', 'this is a list'),
        ('{"a": 1}', 'it has no list "images" (it has a)'),
        ('3', 'this is a int'),
        ('{"videos": [{"id": 1}], "annotations": []}', "video 1 lacks 'file_names'"),
    ],
)
def test_files_that_are_not_coco(tmp_path, text, message):
    path = tmp_path / 'annotations.json'
    path.write_text(text)
    (problem,) = check_data(path)
    assert (problem.kind, problem.where) == ('file', str(path)) and message in problem.what


def test_a_missing_file(tmp_path):
    (problem,) = check_data(tmp_path / 'nowhere.json')
    assert problem.kind == 'file' and problem.what == 'there is no such file.'


def _image(mode='RGB', size_wh=SIZE_WH):
    channels = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(0).integers(0, 256, (*size_wh[::-1], channels), np.uint8)
    return Image.fromarray(noise.squeeze(-1) if channels == 1 else noise, mode)


def _save(path, mode='RGB', size_wh=SIZE_WH, orientation=None, **options):
    exif = Image.Exif()
    if orientation:
        exif[274] = orientation
    _image(mode, size_wh).save(path, exif=exif, **options)


def _cut(path):
    _save(path)
    path.write_bytes(path.read_bytes()[:2000])


IMAGES = {
    'image-missing': ('a.jpg', lambda path: None),
    'image-corrupt': ('a.jpg', lambda path: path.write_bytes(b'not an image')),
    'image-truncated': ('a.jpg', _cut),
    'image-size': ('a.jpg', lambda path: _save(path, size_wh=(90, 120))),
    'image-rotated': ('a.jpg', lambda path: _save(path, orientation=6)),
    'image-exif': ('a.jpg', lambda path: _save(path, size_wh=(90, 120), orientation=6)),
    'image-grey': ('a.jpg', lambda path: _save(path, 'L')),
    'image-cmyk': ('a.jpg', lambda path: _save(path, 'CMYK')),
    'image-alpha': ('a.png', lambda path: _save(path, 'RGBA')),
    'image-mode': ('a.png', lambda path: _image().convert('P').save(path)),
}


@pytest.mark.parametrize('kind', IMAGES)
def test_planted_in_an_image(tmp_path, kind):
    name, plant = IMAGES[kind]
    plant(tmp_path / name)
    entry = {'id': 1, 'file_name': name, 'width': SIZE_WH[0], 'height': SIZE_WH[1]}
    (problem,) = check_image(entry, tmp_path)
    assert (problem.kind, problem.where) == (kind, str(tmp_path / name))


@pytest.mark.parametrize('size_wh, kind', [((1, 1), 'image-tiny'), ((5472, 3648), 'image-huge')])
def test_extreme_sizes(tmp_path, size_wh, kind):
    Image.new('RGB', size_wh).save(tmp_path / 'a.jpg')
    entry = {'id': 1, 'file_name': 'a.jpg', 'width': size_wh[0], 'height': size_wh[1]}
    assert [problem.kind for problem in check_image(entry, tmp_path)] == [kind]


def test_every_kind_is_planted():
    assert set(KINDS) == {*PLANTED, *IMAGES, 'file', 'image-tiny', 'image-huge'}


def test_uvo_videos_are_checked_frame_by_frame(tmp_path):
    path = tmp_path / 'uvo.json'
    path.write_text(
        json.dumps(
            {
                'videos': [
                    {'id': 1, 'height': 90, 'width': 120, 'file_names': ['v/0.png', 'v/1.png']}
                ],
                'annotations': [
                    {
                        'id': 1,
                        'video_id': 1,
                        'category_id': 1,
                        'segmentations': [_rle(90, 120), None],
                    }
                ],
            }
        )
    )
    (tmp_path / 'v').mkdir()
    _save(tmp_path / 'v/0.png')
    (problem,) = check_data(path, tmp_path)
    assert (problem.kind, problem.where) == ('image-missing', str(tmp_path / 'v/1.png'))


def test_the_tool(tmp_path, sound, load_script, capsys):
    main = load_script('tools/check_data.py').main
    path, report = tmp_path / 'annotations.json', tmp_path / 'report.json'
    path.write_text(json.dumps(sound))
    for name in ('1.jpg', '2.jpg'):
        _save(tmp_path / name)
    assert main([str(path), str(tmp_path), '--workers', '2']) == 0
    assert capsys.readouterr().out == 'No problem found.\n'

    warned = copy.deepcopy(sound)
    warned['annotations'][1]['area'] = 3000
    path.write_text(json.dumps(warned))
    assert main([str(path)]) == 0
    assert 'warning: annotation 2 (image 2): has the area 3000, its mask 1500' in (
        capsys.readouterr().out
    )

    (tmp_path / '2.jpg').unlink()
    broken = copy.deepcopy(sound)
    broken['annotations'] += [
        {**sound['annotations'][0], 'id': i, 'area': -1} for i in range(10, 40)
    ]
    path.write_text(json.dumps(broken))
    assert main([str(path), str(tmp_path), '--json', str(report), '--limit', '5']) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum('[area-not-positive]' in line for line in lines) == 5
    assert '... and 25 more of area-not-positive (--limit 0 or --json for all)' in lines
    assert [line.split() for line in lines[-2:]] == [
        ['30', 'error', 'area-not-positive'],
        ['1', 'error', 'image-missing'],
    ]
    written = json.loads(report.read_text())
    assert (written['errors'], written['warnings'], len(written['problems'])) == (31, 0, 31)
    assert written['problems'][-1] == {
        'kind': 'image-missing',
        'where': str(tmp_path / '2.jpg'),
        'what': 'image 2 has no file',
        'error': True,
        'mend': KINDS['image-missing'][1],
    }
    with pytest.raises(SystemExit, match='2'):
        main([str(path), str(tmp_path / 'nowhere')])
