import errno
import json
import os
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from mmdet_plugins.common import pseudo_store
from mmdet_plugins.common.pseudo_store import (
    EMBEDDINGS,
    LABELS,
    PseudoLabels,
    PseudoStore,
    StoreError,
    digest_images,
    find_copies,
    list_images,
    plan_batches,
    read_image_list,
)
from mmdet_plugins.ops.rle import encode_masks

SIZES = [(6, 8), (8, 6), (6, 8), (5, 5), (6, 8), (6, 8), (8, 6)]
IMAGES = [dict(id=10 + i, file_name=f'{i}.png', height=h, width=w)
          for i, (h, w) in enumerate(SIZES)]  # fmt: skip
CONFIG = dict(model=dict(depth=18, scales=(1.0, 0.5)), weights='ab12')


def labels_of(position):
    """As many objects as the position says, modulo 3, with embeddings that tell them apart."""
    num, (height, width) = position % 3, SIZES[position % len(SIZES)]
    masks = np.zeros((num, height, width), bool)
    for i in range(num):
        masks[i, i : i + 2, 1:4] = True
    boxes = np.array([[1, i, 4, i + 2] for i in range(num)], float).reshape(-1, 4)
    embeddings = np.array([[position, i, 0.5] for i in range(num)], np.float32).reshape(-1, 3)
    return PseudoLabels(
        encode_masks(masks),
        boxes,
        np.full(num, 6),
        0.9 - 0.1 * np.arange(num),
        embeddings,
        dropped=dict(score=position),
    )


def fill(folder, stop=None, images=IMAGES, config=CONFIG, batch_size=2):
    """Open a store, work on its pending batches (``stop`` of them), finish it if all are done."""
    store = PseudoStore(folder, images, config, batch_size)
    try:
        left = store.pending()
        for positions in left[:stop]:
            store.add(positions, [labels_of(position) for position in positions])
        return store.finish() if stop is None else None
    finally:
        store.close()


def content(folder):
    """What a finished store comes down to, byte for byte."""
    return {name: (Path(folder) / name).read_bytes()
            for name in ('manifest.json', LABELS, EMBEDDINGS)}  # fmt: skip


def read(folder):
    return json.loads((folder / LABELS).read_text()), np.load(folder / EMBEDDINGS)


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp('finished')
    fill(folder)
    return content(folder)


def test_plan_by_hand():
    # By size, at most two at a time, in the order of their first images.
    assert plan_batches(IMAGES, 2) == [[0, 2], [1, 6], [3], [4, 5]]
    unreadable = [IMAGES[0], IMAGES[1] | dict(unreadable='why'), *IMAGES[2:]]
    assert plan_batches(unreadable, 2) == [[0, 2], [3], [4, 5], [6]]
    assert plan_batches([], 2) == []


def test_final_files_are_coco_with_a_row_of_embeddings_each(tmp_path):
    counts = fill(tmp_path)
    assert counts == dict(images=7, unreadable=0, without_masks=3, masks=6, dropped_score=21)
    coco = COCO(tmp_path / 'pseudo_labels.json')
    assert [image['id'] for image in coco.dataset['images']] == [10, 11, 12, 13, 14, 15, 16]
    assert coco.dataset['categories'] == [dict(id=1, name='object', supercategory='object')]
    data, embeddings = read(tmp_path)
    assert embeddings.dtype == np.float16
    expected = [(10 + p, i) for p in range(7) for i in range(p % 3)]
    for number, (annotation, (image_id, i)) in enumerate(
        zip(data['annotations'], expected, strict=True), 1
    ):
        assert annotation['id'] == number and annotation['image_id'] == image_id
        assert annotation['category_id'] == 1 and annotation['iscrowd'] == 0
        assert annotation['bbox'] == [1, i, 3, 2] and annotation['area'] == 6
        assert annotation['score'] == pytest.approx(0.9 - 0.1 * i)
        mask = coco.annToMask(annotation)
        assert mask.sum() == 6 and mask[i : i + 2, 1:4].all()
        assert embeddings[number - 1].tolist() == [image_id - 10, i, 0.5]
    manifest = json.loads((tmp_path / 'manifest.json').read_text())
    statuses = [image['status'] for image in manifest['images']]
    assert statuses == ['without masks', 'done', 'done'] * 2 + ['without masks']
    assert [image['dropped']['score'] for image in manifest['images']] == [*range(7)]


@pytest.mark.parametrize('ranks', [2, 3])
def test_any_number_of_ranks(ranks, tmp_path, finished):
    stores = [PseudoStore(tmp_path, IMAGES, CONFIG, 2, rank=rank) for rank in range(ranks)]
    left = stores[0].pending()
    for rank in reversed(range(ranks)):
        for positions in left[rank::ranks]:
            stores[rank].add(positions, [labels_of(position) for position in positions])
    stores[0].finish()
    assert content(tmp_path) == finished


def kill_at(folder, flush, part):
    """Fill a store in a child that kills itself at its n-th write, ``part`` of it on the disk."""
    child = os.fork()
    if child == 0:
        calls = iter(range(1000))
        whole = pseudo_store._flush

        def deadly(file):
            if next(calls) == flush:
                start = os.path.getsize(file.name)
                file.flush()
                size = os.path.getsize(file.name)
                os.truncate(file.name, start + int(part * (size - start)))
                os.kill(os.getpid(), signal.SIGKILL)
            whole(file)

        pseudo_store._flush = deadly
        try:
            fill(folder)
        finally:
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize('part', [0.0, 0.5, 0.99, 1.0])
def test_killed_at_any_write_and_resumed(part, tmp_path, finished):
    for flush in range(8):  # two a batch
        folder = tmp_path / str(flush)
        assert kill_at(folder, flush, part) == -signal.SIGKILL
        assert not (folder / 'pseudo_labels.json').exists()
        fill(folder)
        assert content(folder) == finished


def test_killed_again_and_again(tmp_path, finished):
    for _ in range(3):
        assert kill_at(tmp_path, 2, 0.5) == -signal.SIGKILL  # in the second batch of those left
    fill(tmp_path)
    assert content(tmp_path) == finished
    fill(tmp_path)
    assert content(tmp_path) == finished


def test_a_batch_is_done_once(tmp_path):
    fill(tmp_path, stop=3)
    store = PseudoStore(tmp_path, IMAGES, CONFIG, 2)
    assert store.pending() == [[4, 5]]
    with pytest.raises(StoreError, match=r'the images \[4\] are no batch of its plan'):
        store.add([4], [labels_of(4)])


def test_missing_batches(tmp_path):
    fill(tmp_path, stop=3)
    store = PseudoStore(tmp_path, IMAGES, CONFIG, 2)
    with pytest.raises(StoreError, match='1 of 4 batches are missing: start the same command'):
        store.finish()


def test_configurations_do_not_mix(tmp_path, finished):
    fill(tmp_path, stop=1)
    other = dict(model=dict(depth=50, scales=(1.0, 0.5)), weights='ab12')
    with pytest.raises(StoreError, match=r'another configuration \(model.depth was 18, is 50\)'):
        fill(tmp_path, config=other)
    with pytest.raises(StoreError, match='begun with batches of 2, not of 4'):
        fill(tmp_path, batch_size=4)
    fewer = [*IMAGES[:-2], IMAGES[-1] | dict(height=9)]
    with pytest.raises(StoreError, match=r'images have changed .*\(1 are new, 2 are gone or of'):
        fill(tmp_path, images=fewer)
    with pytest.raises(StoreError, match=r'images have changed .*\(their order\)'):
        fill(tmp_path, images=[*IMAGES[2:], *IMAGES[:2]])
    fill(tmp_path)  # a refusal leaves neither locks nor traces
    assert content(tmp_path) == finished


def test_two_runs_on_one_store(tmp_path, monkeypatch):
    monkeypatch.setattr(pseudo_store, 'PATIENCE_S', 0.0)
    first = PseudoStore(tmp_path, IMAGES, CONFIG, 2)
    with pytest.raises(StoreError, match='another run is on this store: wait for its end'):
        PseudoStore(tmp_path, IMAGES, CONFIG, 2)
    second_rank = PseudoStore(tmp_path, IMAGES, CONFIG, 2, rank=1)
    second_rank.add([0, 2], [labels_of(0), labels_of(2)])
    first.close()
    with pytest.raises(StoreError, match='another run is on this store'):  # of which a rank lives
        PseudoStore(tmp_path, IMAGES, CONFIG, 2)
    second_rank.close()
    PseudoStore(tmp_path, IMAGES, CONFIG, 2).close()


def test_waits_for_a_run_that_is_ending(tmp_path):
    first = PseudoStore(tmp_path, IMAGES, CONFIG, 2)
    timer = threading.Timer(0.3, first.close)
    timer.start()
    PseudoStore(tmp_path, IMAGES, CONFIG, 2).close()
    timer.join()


@pytest.mark.parametrize('suffix', ['.jsonl', '.f16'])
def test_damaged_shard(suffix, tmp_path, finished):
    fill(tmp_path, stop=2)
    (shard,) = (tmp_path / 'shards').glob(f'*{suffix}')
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(StoreError, match=rf'{shard.name} was damaged or edited. Delete'):
        fill(tmp_path)
    for path in (tmp_path / 'shards').iterdir():
        path.unlink()
    fill(tmp_path)
    assert content(tmp_path) == finished


def test_embeddings_that_are_gone(tmp_path, finished):
    fill(tmp_path, stop=2)
    (shard,) = (tmp_path / 'shards').glob('*.f16')
    shard.unlink()
    with pytest.raises(StoreError, match=rf'{shard.name} was damaged or edited. Delete'):
        fill(tmp_path)
    shard.with_suffix('.jsonl').unlink()
    fill(tmp_path)
    assert content(tmp_path) == finished


def test_labels_edited_by_hand(tmp_path, finished):
    fill(tmp_path)
    path = tmp_path / LABELS
    data = json.loads(path.read_text())
    del data['annotations'][2]
    path.write_text(json.dumps(data))
    with pytest.raises(StoreError, match='was changed after it was made, and would be overwritten'):
        fill(tmp_path)
    assert json.loads(path.read_text()) == data
    path.rename(tmp_path / 'mine.json')
    fill(tmp_path)
    assert content(tmp_path) == finished


def test_full_disk(tmp_path, monkeypatch, finished):
    flush, calls = pseudo_store._flush, iter(range(100))

    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    sentence = r'\(No space left on device\). All batches before this are safe'
    for name, failing in (
        ('_flush', lambda file: full() if next(calls) == 3 else flush(file)),  # the second batch
        ('_digest', full),  # the final files
    ):
        monkeypatch.setattr(pseudo_store, name, failing)
        with pytest.raises(StoreError, match=sentence):
            fill(tmp_path)
        monkeypatch.undo()
    fill(tmp_path)
    assert content(tmp_path) == finished


def test_manifest_broken_and_leftovers_removed(tmp_path):
    fill(tmp_path, stop=1)
    whole = (tmp_path / 'manifest.json').read_bytes()
    (tmp_path / 'manifest.json').write_bytes(whole[:-9])
    (tmp_path / f'.{LABELS}.abc.tmp').write_text('cut off by a kill')
    for _ in range(2):  # the lock is given back
        with pytest.raises(StoreError, match='not valid JSON .* choose another folder'):
            fill(tmp_path)
    (tmp_path / 'manifest.json').write_bytes(whole)
    fill(tmp_path)
    assert not list(tmp_path.glob('.*'))


def test_leftovers_of_the_first_write_go_and_others_stay(tmp_path):
    (tmp_path / '.manifest.json.abc.tmp').write_text('cut off by a kill')
    (tmp_path / '.mine.tmp').write_text('of another program')
    fill(tmp_path)
    assert [path.name for path in tmp_path.glob('.*')] == ['.mine.tmp']


def test_manifest_missing(tmp_path):
    fill(tmp_path, stop=1)
    (tmp_path / 'manifest.json').unlink()
    with pytest.raises(StoreError, match='is missing beside the shards of a run'):
        fill(tmp_path)


def test_no_images_at_all(tmp_path):
    assert fill(tmp_path, images=[]) == dict(images=0, unreadable=0, without_masks=0, masks=0)
    data, embeddings = read(tmp_path)
    assert data['images'] == data['annotations'] == [] and embeddings.shape == (0, 0)


def test_folder_of_images(tmp_path):
    (tmp_path / 'b').mkdir()
    for name, size in (
        ('b/2.png', (4, 7)),
        ('.hidden.png', (2, 2)),
        ('10.JPG', (9, 5)),
        ('a.jpg', (6, 3)),
        ('c.tif', (6, 3)),
        ('d.jpg', (6, 3)),
    ):
        exif = Image.Exif()
        if name in ('a.jpg', 'c.tif'):
            exif[0x0112] = 6  # a quarter turn
        elif name == 'd.jpg':
            exif[0x0112] = 9  # there is none such
        kind = dict(png='png', tif='tiff').get(name[-3:], 'jpeg')
        Image.new('RGB', size).save(tmp_path / name, kind, exif=exif)
    (tmp_path / 'notes.txt').write_text('no image')
    (tmp_path / 'broken.png').write_bytes(b'not a png')
    names = ['10.JPG', 'a.jpg', 'b/2.png', 'broken.png', 'c.tif', 'd.jpg']
    assert [p.relative_to(tmp_path).as_posix() for p in list_images(tmp_path)] == names
    entries = read_image_list(tmp_path)
    assert [(e['id'], e['file_name'], e['height'], e['width']) for e in entries] == [
        (1, '10.JPG', 5, 9),
        (2, 'a.jpg', 6, 3),
        (3, 'b/2.png', 7, 4),
        (4, 'broken.png', 0, 0),
        (5, 'c.tif', 6, 3),
        (6, 'd.jpg', 3, 6),
    ]
    assert entries[3]['unreadable'] == 'its header cannot be read: not an image'
    store = tmp_path / 'store'
    with pytest.raises(ValueError, match='store: there is no image in this folder'):
        store.mkdir()
        list_images(store)
    with pytest.raises(FileNotFoundError, match='there is no such folder of images'):
        read_image_list(tmp_path / 'nowhere')


def test_copies(tmp_path):
    contents = dict(a=b'x' * 9, b=b'y' * 9, c=b'x' * 9, d=b'x' * 8, e=b'', f=b'', g=b'y' * 9)
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    found = find_copies([tmp_path / name for name in contents])
    assert [(copy.name, first.name) for copy, first in found] == [
        ('c', 'a'),
        ('g', 'b'),
        ('f', 'e'),
    ]


def test_digest_of_images(tmp_path):
    """Of 64 of many; what is not drawn may change."""
    paths = [tmp_path / f'{i}.png' for i in range(128)]
    for path in paths:
        path.write_bytes(path.name.encode())
    before = digest_images(paths)
    moved = tmp_path.with_name('moved')
    tmp_path.rename(moved)
    paths = [moved / path.name for path in paths]
    assert digest_images(paths) == before != digest_images(paths[::-1])
    paths[1].write_bytes(b'other')
    assert digest_images(paths) == before
    paths[2].write_bytes(b'other')
    assert digest_images(paths) != before
    few = digest_images(paths[:3])
    paths[2].unlink()
    assert len({few, digest_images(paths[:3]), digest_images(paths[:2]), digest_images([])}) == 4


def test_coco_file_of_images(tmp_path):
    path = tmp_path / 'images.json'
    path.write_text(json.dumps(dict(images=[IMAGES[0] | dict(license=3), IMAGES[1]])))
    assert read_image_list(path) == IMAGES[:2]
    for images, message in (
        ([], 'this COCO file lists no images'),
        ([IMAGES[0], IMAGES[0]], 'two images have the id 10: renumber them'),
        ([dict(id=1, file_name='x.png')], 'an image lacks height, width'),
    ):
        path.write_text(json.dumps(dict(images=images)))
        with pytest.raises(ValueError, match=message):
            read_image_list(path)
