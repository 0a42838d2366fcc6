"""Pages on what was found: the health of stages, and clusters of objects."""

import json
import re

import cv2
import numpy as np
import pytest

from mmdet_plugins.common.pseudo_store import EMBEDDINGS, LABELS, PseudoLabels, PseudoStore
from mmdet_plugins.freesolo.clusters import cluster, write_clusters
from mmdet_plugins.freesolo.health import (
    choose,
    histogram,
    read_stage,
    write_health,
)
from mmdet_plugins.ops.rle import area, encode_masks, rle_to_xyxy

HW = (40, 60)
# Of each image: squares (top, left, side, score) and what was dropped.
FOUND = {
    'a.png': ([(0, 0, 10, 0.9), (0, 5, 10, 0.8)], dict(score=1, cells=0)),
    'b.png': ([], dict(score=7, cells=2)),
    'c.png': ([(10, 10, 20, 0.5)], dict(score=0, cells=3)),
    'd.png': ([(30, 50, 8, 0.95)], {}),
}


def labels_of(squares, dropped, first):
    masks = np.zeros((len(squares), *HW), bool)
    for mask, (top, left, side, _) in zip(masks, squares, strict=True):
        mask[top : top + side, left : left + side] = True
    rles = encode_masks(masks)
    embeddings = np.eye(4)[[(first + i) % 2 for i in range(len(squares))]].reshape(-1, 4)
    scores = np.array([square[3] for square in squares])
    return PseudoLabels(rles, rle_to_xyxy(rles), area(rles), scores, embeddings, dropped=dropped)


@pytest.fixture
def store(tmp_path):
    """A finished store, its images beside it."""
    for i, name in enumerate(FOUND):
        cv2.imwrite(str(tmp_path / name), np.full((*HW, 3), 40 * i, np.uint8))
    entries = [
        dict(id=i + 1, file_name=name, height=HW[0], width=HW[1]) for i, name in enumerate(FOUND)
    ]
    entries.append(dict(id=9, file_name='broken.png', height=0, width=0, unreadable='no image'))
    filled = PseudoStore(tmp_path / 'store', entries, dict(model='made up'), 2)
    for positions in filled.pending():
        found = [list(FOUND.values())[position] for position in positions]
        filled.add(positions, [labels_of(*one, first=0) for one in found])
    filled.finish()
    filled.close()
    return tmp_path / 'store'


def test_figures_by_hand(store):
    stage = read_stage(store)
    assert [len(image.rles) for image in stage.images] == [2, 0, 1, 1]
    assert stage.images[0].coverage == pytest.approx(150 / 2400)  # of two squares, half over half
    assert stage.images[1].coverage == 0 and np.isnan(stage.images[1].certainty)
    assert stage.dropped == dict(score=8, cells=5)
    figures = stage.figures()
    assert figures['unreadable images'] == '1' and stage.unreadable == {'broken.png': 'no image'}
    assert figures['masks'] == '4' and figures['images without masks'] == '1'
    assert figures['masks an image'] == '1.00' and figures['median side, px'] == '10'
    assert figures['mean score'] == '0.788'
    assert figures['mean coverage'] == f'{(150 + 400 + 64) / 2400 / 4:.1%}'
    assert figures['dropped: too few cells'] == '5'
    bars = {label: [row for row in rows if row[1]] for label, rows in stage.histograms().items()}
    assert bars['Masks an image'] == [('0', 1, 0.25), ('1', 2, 0.5), ('2', 1, 0.25)]
    assert bars['Side of a mask'] == [('8–16', 3, 0.75), ('16–32', 1, 0.25)]
    assert bars['Coverage'] == [('0–1', 1, 0.25), ('1–10', 2, 0.5), ('10–25', 1, 0.25)]


def test_labels_of_bins():
    rows = histogram(np.array([3, 4, 16, 17, 900]), (0, 3, 5, 17), whole=True)
    assert rows == [('0–2', 0, 0.0), ('3–4', 2, 0.4), ('5–16', 1, 0.2), ('≥ 17', 2, 0.4)]


def test_choice_of_images(store):
    def names(count):
        return {
            kind: [image.entry['file_name'][0] for image in images]
            for kind, images in choose(read_stage(store), count).items()
        }

    assert names(1) == {'Best': ['d'], 'Worst': ['c'], 'Most dropped': ['b']}
    assert names(4) == {'Best': ['d', 'a'], 'Worst': ['c'], 'Most dropped': ['b']}


def test_health_page(store, load_script, tmp_path, capsys):
    (tmp_path / 'd.png').unlink()
    results = json.loads((store / LABELS).read_text())
    (tmp_path / 'results.json').write_text(json.dumps(results['annotations'][:1]))
    main = load_script('projects/freesolo/health.py').main
    out = tmp_path / 'health.html'
    arguments = [f'coarse={store}', f'trained={tmp_path / "results.json"}', '--images']
    arguments += [str(tmp_path), '--out', str(out), '--annotations', str(store / LABELS)]
    assert main(arguments) == 0 and capsys.readouterr().out.strip() == str(out)
    page = out.read_text()
    assert page.count('<figure class="card">') == 4 and page.count('data:image/jpeg') == 4
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert '<td>4</td><td>1</td>' in page and '<th scope="col">trained</th>' in page
    assert 'broken.png: no image' in page and 'd.png cannot be read' in page
    assert '7 not certain enough' in page
    assert main([str(tmp_path / 'results.json'), '--images', '.', '--out', str(out)]) == 1
    assert 'which do not say the names and sizes' in capsys.readouterr().err
    (store / LABELS).unlink()
    assert main([str(store), '--images', '.', '--out', str(out)]) == 1
    assert 'the store is not finished' in capsys.readouterr().err


def test_health_of_no_images(tmp_path):
    path = tmp_path / 'none.json'
    path.write_text(json.dumps(dict(images=[], annotations=[], categories=[])))
    page = write_health({'none': path}, tmp_path, tmp_path / 'page.html').read_text()
    assert page.count('<td>0</td>') == 4 and page.count('<td>–</td>') == 4 and 'nan' not in page


@pytest.fixture
def directions():
    """300 embeddings around four axes in eight dimensions, the rarest short, and their axis."""
    rng = np.random.default_rng(0)
    axis = rng.permutation(np.repeat(np.arange(4), (120, 90, 60, 30)))
    embeddings = np.eye(8)[axis] + 0.1 * rng.normal(size=(300, 8))
    lengths = np.where(axis == 3, 0.05, rng.uniform(0.1, 50, 300))
    return (embeddings * lengths[:, None]).astype(np.float16), axis


def test_clusters_are_found(directions):
    embeddings, axis = directions
    for seed in range(5):
        found = cluster(embeddings, 4, seed)
        assert found.labels.tolist() == axis.tolist()  # by size
        assert found.sizes.tolist() == [120, 90, 60, 30] and found.cosines.min() > 0.8
    assert np.array_equal(found.labels, cluster(embeddings, 4, seed).labels)
    embeddings[[3, 8]] = 0
    embeddings[5, 0] = np.nan
    found = cluster(embeddings, 4)
    assert np.flatnonzero(found.labels < 0).tolist() == [3, 5, 8] and found.sizes.sum() == 297
    for k in (0, 298):
        with pytest.raises(ValueError, match=f'{k} clusters of 297 usable embeddings'):
            cluster(embeddings, k)


def test_more_objects_than_centres_are_made_of(directions, monkeypatch):
    import mmdet_plugins.freesolo.clusters as module

    monkeypatch.setattr(module, 'FITTED', 100)
    monkeypatch.setattr(module, 'ROWS', 70)
    assert cluster(directions[0], 4).labels.tolist() == directions[1].tolist()


def test_page_of_clusters(store, load_script, tmp_path, capsys):
    main = load_script('projects/freesolo/clusters.py').main
    page, labels = tmp_path / 'clusters.html', tmp_path / 'sorted.json'
    arguments = [str(store), '--images', str(tmp_path), '--out', str(page), '--json', str(labels)]
    (tmp_path / 'd.png').unlink()
    assert main([*arguments, '--clusters', '2']) == 0
    assert 'clusters.html: 4 objects in 2 clusters' in capsys.readouterr().out
    text = page.read_text()
    assert text.count('data:image/jpeg') == 4 and not re.search(r'(src|href)="(?!data:)', text)
    assert '3 objects' in text and '1 object ' in text and 'd.png cannot be read' in text
    data = json.loads(labels.read_text())
    # The second square of the first image has another embedding than all others.
    assert [annotation['category_id'] for annotation in data['annotations']] == [1, 2, 1, 1]
    assert [category['name'] for category in data['categories']] == ['cluster 1', 'cluster 2']
    assert main([*arguments, '--clusters', '5']) == 1
    assert '5 clusters of 4 usable embeddings' in capsys.readouterr().err
    content = json.loads((store / LABELS).read_text())
    content['annotations'].reverse()
    (store / LABELS).write_text(json.dumps(content))
    assert main(arguments) == 1 and 'do not rise from one to the next' in capsys.readouterr().err
    (store / EMBEDDINGS).unlink()
    assert main(arguments) == 1 and 'the embeddings of' in capsys.readouterr().err


def test_objects_near_a_centre_are_told_apart(store, tmp_path):
    """Four directions two degrees apart, whose centre is in their middle."""
    angles = np.radians([0, 2, 4, 6])
    np.save(store / EMBEDDINGS, np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float16))
    write_clusters(store, tmp_path, tmp_path / 'page.html', k=1)
    text = (tmp_path / 'page.html').read_text()
    assert 'mean angle 2.0°' in text
    assert re.findall(r'<span>([\d.]+)°', text) == ['1.0', '1.0', '3.0', '3.0']


def test_crops_of_objects_at_the_edge(store, tmp_path):
    """Of the whole image too."""
    path = store / LABELS
    data = json.loads(path.read_text())
    data['annotations'][0].update(
        segmentation=encode_masks(np.ones((1, *HW), bool))[0], bbox=[0, 0, HW[1], HW[0]]
    )
    path.write_text(json.dumps(data))
    found = write_clusters(store, tmp_path, tmp_path / 'page.html', k=1)
    assert found.sizes.tolist() == [4]
