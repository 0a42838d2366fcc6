import json

import cv2
import numpy as np
import pytest
from PIL import Image

from mmdet_plugins.ops.rle import decode_rle


@pytest.fixture
def run(load_script, monkeypatch, repo):
    monkeypatch.syspath_prepend(str(repo / 'tools/convert'))
    return lambda name, *args: load_script(f'tools/convert/{name}.py').main([*map(str, args)])


def save_index(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(values.astype(np.uint8)).convert('P')
    image.putdata(values.ravel().tolist())
    image.save(path)


def save_jpeg(path, height, width):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.zeros((height, width, 3), np.uint8))


def masks_of(coco):
    return {a['id']: decode_rle([a['segmentation']])[0] for a in coco['annotations']}


def test_voc(run, tmp_path, capsys):
    objects = np.zeros((20, 30), int)
    objects[2:9, 3:11], objects[5:18, 15:29] = 1, 2
    objects[9, 3:11] = 255
    classes = np.select([objects == 1, objects == 2, objects == 255], [15, 8, 255], 0)
    save_index(tmp_path / 'SegmentationObject/a.png', objects)
    save_index(tmp_path / 'SegmentationClass/a.png', classes)
    save_jpeg(tmp_path / 'JPEGImages/a.jpg', 20, 30)
    listing = tmp_path / 'ImageSets/Segmentation/val.txt'
    listing.parent.mkdir(parents=True)
    listing.write_text('a\nb\n')

    assert run('voc_to_coco', tmp_path, '--split', 'val') == 0
    coco = json.loads((tmp_path / 'annotations/instances_val.json').read_text())
    assert coco['images'] == [dict(id=1, file_name='a.jpg', height=20, width=30)]
    names = {c['id']: c['name'] for c in coco['categories']}
    assert [names[a['category_id']] for a in coco['annotations']] == ['person', 'cat']
    assert [a['bbox'] for a in coco['annotations']] == [[3, 2, 8, 7], [15, 5, 14, 13]]
    assert [a['area'] for a in coco['annotations']] == [56, 182]
    assert np.array_equal(masks_of(coco)[2], objects == 2)
    assert 'b.png is missing' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run('voc_to_coco', tmp_path, '--split', 'nothing')
    assert 'nothing.txt is missing' in capsys.readouterr().err


def test_openimages(run, tmp_path, capsys):
    save_jpeg(tmp_path / 'images/0a.jpg', 40, 60)
    mask = np.zeros((20, 30), np.uint8)
    mask[4:10, 6:20] = 255
    masks = tmp_path / 'masks'
    (masks / '0').mkdir(parents=True)
    Image.fromarray(mask).convert('1').save(masks / '0a_m_1.png')
    Image.fromarray(mask).save(masks / '0' / '0a_n_2.png')
    Image.fromarray(0 * mask).save(masks / '0a_o_3.png')
    rows = [
        ('0a_m_1.png', '0a', '/m/1'),
        ('0a_n_2.png', '0a', '/m/2'),
        ('0a_o_3.png', '0a', '/m/2'),
    ]
    rows += [('0a_p_4.png', '0a', '/m/1'), ('0b_m_5.png', '0b', '/m/1')]
    table = tmp_path / 'masks.csv'
    table.write_text('MaskPath,ImageID,LabelName\n' + '\n'.join(map(','.join, rows)))
    (tmp_path / 'classes.csv').write_text('/m/1,Tortoise\n')

    out = tmp_path / 'out/instances.json'
    arguments = (table, masks, tmp_path / 'images', '--out', out)
    assert run('openimages_to_coco', *arguments, '--classes', tmp_path / 'classes.csv') == 0
    coco = json.loads(out.read_text())
    assert coco['images'] == [dict(id=1, file_name='0a.jpg', height=40, width=60)]
    assert [c['name'] for c in coco['categories']] == ['Tortoise', '/m/2']
    expected = np.zeros((40, 60), bool)
    expected[8:20, 12:40] = True
    assert [np.array_equal(m, expected) for m in masks_of(coco).values()] == [True, True]
    said = capsys.readouterr().err
    for part in ('0a_o_3.png is empty', '0a_p_4.png is missing', '0b.jpg is missing'):
        assert part in said

    table.write_text('A,B\n1,2\n')
    with pytest.raises(SystemExit):
        run('openimages_to_coco', *arguments)
    assert 'no column ImageID, LabelName, MaskPath' in capsys.readouterr().err


def test_uvo(run, tmp_path, capsys):
    for name in ('v/0.png', 'v/2.png'):
        save_jpeg(tmp_path / 'frames' / name, 10, 12)
    polygon = [[1, 1, 6, 1, 6, 5, 1, 5]]
    data = dict(
        videos=[dict(id=4, height=10, width=12, file_names=['v/0.png', 'v/1.png', 'v/2.png'])],
        annotations=[dict(id=9, video_id=4, segmentations=[polygon, polygon, None])],
        categories=[dict(id=1, name='object')],
    )
    source, out = tmp_path / 'dense.json', tmp_path / 'frames.json'
    source.write_text(json.dumps(data))
    assert run('uvo_to_coco', source, '--out', out, '--images', tmp_path / 'frames') == 0
    coco = json.loads(out.read_text())
    assert [i['file_name'] for i in coco['images']] == ['v/0.png', 'v/2.png']
    assert [(a['image_id'], a['area']) for a in coco['annotations']] == [(1, 20)]
    assert 'v/1.png is missing' in capsys.readouterr().err
    del data['videos'][0]['height']
    for content, reason in (
        ('{', 'not valid JSON'),
        ('[]', 'this is a list'),
        (json.dumps(data), "video 4 lacks 'height'"),
    ):
        source.write_text(content)
        with pytest.raises(SystemExit):
            run('uvo_to_coco', source, '--out', out)
        assert f'dense.json: {reason}' in capsys.readouterr().err


def test_nothing_usable_writes_nothing(run, tmp_path):
    source, out = tmp_path / 'dense.json', tmp_path / 'frames.json'
    source.write_text(json.dumps(dict(videos=[], annotations=[])))
    assert run('uvo_to_coco', source, '--out', out) == 1
    assert not out.exists()


def test_bbbc038(run, tmp_path, capsys):
    masks = np.zeros((2, 20, 30), np.uint8)
    masks[0, 2:9, 3:11] = masks[1, 5:18, 15:29] = 255
    for name in 'abcde':
        for folder in ('images', 'masks'):
            (tmp_path / 'raw' / name / folder).mkdir(parents=True)
        Image.new('RGBA', (30, 20)).save(tmp_path / f'raw/{name}/images/{name}.png')
        for i, mask in enumerate(masks):
            Image.fromarray(mask).save(tmp_path / f'raw/{name}/masks/{i}.png')
    Image.new('L', (5, 5)).save(tmp_path / 'raw/e/masks/1.png')
    assert run('bbbc038_to_coco', tmp_path / 'raw', tmp_path / 'out') == 0
    names = {}
    for split in ('train', 'val'):
        coco = json.loads((tmp_path / f'out/instances_{split}.json').read_text())
        names[split] = [image['file_name'] for image in coco['images']]
        assert all((tmp_path / 'out/images' / name).is_file() for name in names[split])
        assert np.array_equal(masks_of(coco)[2], masks[1] > 0)
    assert names == dict(train=['a.png', 'b.png', 'c.png'], val=['d.png'])
    assert 'a mask is not of the size' in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run('bbbc038_to_coco', tmp_path / 'out', tmp_path / 'again')
    assert 'no folders ID/images' in capsys.readouterr().err


def test_subset(run, tmp_path, capsys):
    images = [dict(id=7 * i, file_name=f'COCO_{i}.jpg', height=4, width=6) for i in range(3)]
    annotations = [
        dict(id=i, image_id=7 * (i % 3), category_id=1, bbox=[0, 0, 2, 2], area=4) for i in range(5)
    ]
    whole, names, out = tmp_path / 'all.json', tmp_path / 'names.txt', tmp_path / 'part.json'
    content = dict(images=images, annotations=annotations, categories=[dict(id=1, name='cat')])
    whole.write_text(json.dumps(content))
    names.write_text('train2014/COCO_2.jpg\nCOCO_0.jpg\n')
    assert run('coco_subset', whole, names, out) == 0
    part = json.loads(out.read_text())
    assert part['images'] == [images[0], images[2]] and part['categories'] == content['categories']
    assert [found['id'] for found in part['annotations']] == [0, 2, 3]
    names.write_text('COCO_2.jpg\nCOCO_9.jpg')
    out.unlink()
    assert run('coco_subset', whole, names, out) == 1 and not out.exists()
    assert "1 of them are not in it, 'COCO_9.jpg'" in capsys.readouterr().err
