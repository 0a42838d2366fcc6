import json
import re
import shutil
import subprocess

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmdet_plugins.common import report, report_page
from mmdet_plugins.common.overlays import (
    SHIFT,
    colours,
    draw,
    outlines,
    picture_scale,
)
from mmdet_plugins.ops.open_world import evaluate_json
from mmdet_plugins.ops.rle import encode_masks

HW = (60, 90)
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome')
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = (
    '--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars '
    '--disable-background-networking --disable-component-update --disable-sync '
    '--enable-logging=stderr --virtual-time-budget=4000'
).split()


def ellipse(x, y, a, b, hw=HW):
    mask = np.zeros(hw, np.uint8)
    return cv2.ellipse(mask, (int(x), int(y)), (int(a), int(b)), 0, 0, 360, 1, -1)


def entry(mask, **more):
    (rle,) = encode_masks(mask[None])
    x, y, width, height = cv2.boundingRect(mask)
    box = [float(v) for v in (x, y, width, height)]
    return {'segmentation': rle, 'bbox': box, 'category_id': 1, **more}


def make(seed=0, num_images=8, num_objects=6, num_results=30, noise=2.0):
    """Random annotations with crowds, and results near and far from them."""
    rng = np.random.default_rng(seed)
    images, annotations, results = [], [], []
    for image_id in range(1, num_images + 1):
        name = f'{image_id}.jpg'
        images.append({'id': image_id, 'file_name': name, 'height': HW[0], 'width': HW[1]})
        shapes = []
        for _ in range(num_objects):
            shapes.append(rng.uniform((8, 8, 3, 3), (82, 52, 25, 18)))
            mask = ellipse(*shapes[-1])
            extra = {'iscrowd': int(rng.random() < 0.15), 'area': float(mask.sum())}
            annotations.append(entry(mask, image_id=image_id, id=len(annotations) + 1, **extra))
        for _ in range(num_results if image_id > 1 else 0):
            shape = shapes[rng.integers(num_objects)] + rng.normal(0, noise, 4)
            mask = ellipse(*np.maximum(shape, 2))
            results.append(entry(mask, image_id=image_id, score=float(rng.random())))
    truth = {'images': images, 'annotations': annotations}
    return truth | {'categories': [{'id': 1, 'name': 'thing'}]}, results


@pytest.fixture
def data(tmp_path):
    """A folder with images, annotations and results; returns (annotations, results, folder)."""
    truth, results = make()
    for image in truth['images']:
        photo = np.random.default_rng(image['id']).integers(0, 255, (*HW, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / image['file_name']), photo)
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    (tmp_path / 'results.json').write_text(json.dumps(results))
    return truth, results, tmp_path


@pytest.mark.parametrize('masks', [True, False])
def test_curve_goes_through_the_values_of_pycocotools(masks):
    truth, results = make(seed=3)
    if not masks:
        results = [{k: v for k, v in r.items() if k != 'segmentation'} for r in results]
    curve = report.recall_curve(
        report._Evaluated(truth, {'ours': results}).ranks('ours'), [1, 10, 100]
    )
    coco = COCO()
    coco.dataset = truth
    coco.createIndex()
    # pycocotools wants an area of a box result, and takes a mask's from its RLE
    evaluation = COCOeval(coco, coco.loadRes(results), 'segm' if masks else 'bbox')
    evaluation.params.useCats = 0
    evaluation.evaluate()
    evaluation.accumulate()
    recall = evaluation.eval['recall'][:, 0, 0]  # T × budgets, all areas
    assert 0.05 < recall[..., 1].mean() < 0.95
    np.testing.assert_allclose(curve, recall.mean(0), rtol=0, atol=1e-12)


def test_equal_scores_go_by_category_as_in_the_table():
    mask = ellipse(40, 30, 15, 10)
    truth, _ = make(num_images=1)
    truth['annotations'] = [entry(mask, image_id=1, id=1, area=float(mask.sum()))]
    hit = entry(mask, image_id=1, score=0.5) | {'category_id': 2}
    miss = entry(ellipse(8, 8, 4, 4), image_id=1, score=0.5)
    ranks = report._Evaluated(truth, {'ours': [hit, miss]}).ranks('ours')
    table = evaluate_json(truth, [hit, miss], max_dets=(1, 2))
    assert [table['segm_AR@1'], table['segm_AR@2']] == [0, 1]
    assert report.recall_curve(ranks, [1, 2]) == [0, 1]


def test_size_bins():
    never = report.NEVER
    ranks = np.array([[0, 99, 100, never], [0, never, 3, never]])
    bins = report.size_bins(ranks, np.array([4.0, 16.0, 31.9, 700.0]))
    # 16 and 31.9 px: one of four within the first 100 at either threshold, plus rank 3
    assert bins == [('< 8', 1, 1.0), ('16–32', 2, 0.5), ('≥ 512', 1, 0.0)]


def test_choice_of_images():
    nan = float('nan')
    recalls = {1: 0.5, 2: 0.9, 3: nan, 4: 0.5, 5: 0.0, 6: 0.2}
    weights = {1: 3, 2: 1, 3: 0, 4: 8, 5: 2, 6: 1}
    chosen = report.choose_images(recalls, weights, count=2)
    assert chosen['Best'] == [2, 4]  # of the two at 0.5 the fuller
    assert chosen['Worst'] == [5, 6]
    assert sorted(chosen['Random']) == [1, 3]
    assert report.choose_images({1: 0.4}, {1: 3}, count=4) == {'Worst': [1]}
    assert report.choose_images({1: nan}, {1: 0}, count=4) == {'Random': [1]}


def test_outline_follows_the_mask_at_any_scale():
    mask = np.zeros((40, 70), np.uint8)
    mask[10:20, 30:60] = 1
    mask[13:16, 40:45] = 0
    (rle,) = encode_masks(mask[None])
    for scale in (0.3, 1.0, 6.0):
        ring, hole = sorted(outlines(rle, scale), key=lambda c: -len(c))
        corners = ring.reshape(-1, 2) / (1 << SHIFT)
        # pixel centres of the outermost row and column, ± half a traced pixel
        low = (np.array([30, 10]) + 0.5) * scale - 0.5
        high = (np.array([60, 20]) - 0.5) * scale - 0.5
        np.testing.assert_allclose(corners.min(0), low, atol=0.5 * scale + 0.1)
        np.testing.assert_allclose(corners.max(0), high, atol=0.5 * scale + 0.1)
        assert len(hole)
    (dot,) = encode_masks(ellipse(5, 5, 0, 0)[None])
    assert outlines(dot, 0.1)
    assert outlines(encode_masks(np.zeros((1, 40, 70), np.uint8))[0], 1.0) == []


def test_drawing_colours_what_is_inside_and_only_that():
    photo = np.full((40, 70, 3), 200, np.uint8)
    mask = np.zeros((40, 70), np.uint8)
    mask[10:30, 20:60] = 1
    rles = encode_masks(np.stack([mask, np.roll(mask, 5, 1)]))
    picture = draw(photo, rles[:1], [(0, 0, 255)], long_side=140)
    assert picture.shape == (80, 140, 3)
    inside, outside = picture[40, 80].astype(int), picture[70, 10].astype(int)
    assert inside[2] > inside[0] + 60 and abs(inside[0] - inside[1]) <= 1
    assert outside.max() - outside.min() <= 1
    empty = draw(photo, rles[:1], [None], long_side=140)
    assert np.array_equal(empty[40, 80], empty[70, 10])
    assert empty.max() == 255


def test_colours_differ():
    assert colours(0) == []
    many = np.array(colours(40), float)
    apart = np.linalg.norm(many[:, None] - many[None], axis=-1) + 1e9 * np.eye(40)
    assert apart[:13, :13].min() > 20
    assert min(apart[i, i + 1] for i in range(39)) > 100


def test_picture_sizes():
    assert picture_scale((3000, 4000), 800) == 0.2
    assert picture_scale((100, 50), 800) == 8
    assert picture_scale((2, 1), 800) == 8


def test_partners_share_a_colour_on_both_sides(data):
    truth, results, root = data
    evaluated = report._Evaluated(truth, {'ours': results})
    image = cv2.imread(str(root / '2.jpg'))
    photo, left, right = report.paint(evaluated, 'ours', 2, image)
    assert photo.shape == left.shape == right.shape
    found = evaluated.matches['ours'][2]
    partner = next(p for p in found.partners if p >= 0 and not evaluated.objects[2].crowd[p])
    (want,) = {colours(6)[partner]}
    for side in (left, right):
        assert (np.abs(side.astype(int) - want).max(-1) <= 3).any()
    _, lost, nothing = report.paint(evaluated, 'ours', 1, image)
    assert (lost == 255).all(-1).any()  # image 1 has no results: all its objects are outlines
    assert not (nothing == 255).all(-1).any()


def external_references(html):
    """Whatever a browser would fetch."""
    markup = re.sub(r'<script>.*?</script>', '', html, flags=re.DOTALL)
    found = re.findall(r'\b(?:src|href|srcset|action)\s*=\s*"?(?!data:)([^\s">]+)', markup)
    return found + re.findall(r'url\(|@import|https?:', html)


def test_page_holds_figures_plots_and_pictures(data):
    truth, results, root = data
    page = report.write_report(
        root / 'truth.json',
        root,
        {'ours': root / 'results.json', 'nothing <b>': []},
        root / 'out' / 'report.html',
        metrics={'ours': {'segm_AR@100': 0.1234, 'extra': 0.5}, 'published': {'segm_AP': 0.25}},
        title='Cells & <nuclei>',
        num_images=2,
    ).read_text()
    assert external_references(page) == []
    assert page.count('<svg viewBox="0 0 420 280"') == 2
    assert page.count('src="data:image/jpeg;base64,') == 3 * 6
    assert '<td class=best>0.123</td>' in page and '0.500' in page and '0.250' in page
    assert 'Cells &amp; &lt;nuclei&gt;' in page and '<nuclei>' not in page
    assert 'nothing &lt;b&gt;' in page and 'nothing <b>' not in page
    assert 'Trouble with image files' not in page
    again = root / 'again.html'
    report.write_report(truth, root, {'ours': results}, again, num_images=2)
    once = again.read_text()
    report.write_report(truth, root, {'ours': results}, again, num_images=2)
    assert again.read_text() == once


def test_page_without_images_objects_or_results(data):
    truth, _, root = data
    (root / '3.jpg').unlink()
    (root / '4.jpg').write_text('not a picture')
    page = report.write_report(truth, root, {'ours': []}, root / 'a.html', num_images=8).read_text()
    assert '>3.jpg cannot be read: No such file' in page and '4.jpg cannot be decoded' in page
    assert page.count('image file unreadable') == 2
    assert '0 of 6 found' in page or '0 of 5 found' in page

    truth['annotations'] = []
    page = report.write_report(truth, root, {'ours': []}, root / 'a.html').read_text()
    assert 'no objects · 0 predictions' in page
    assert 'nan' not in page.lower().replace('nance', '').split('<body>')[1].split('data:')[0]


def test_boxes_are_drawn_where_there_are_no_masks(data):
    truth, results, root = data
    boxes = [{k: v for k, v in r.items() if k != 'segmentation'} for r in results]
    page = report.write_report(truth, root, {'ours': boxes}, root / 'a.html').read_text()
    assert 'the box that found it' in page
    assert '>Masks<' not in page and '>Boxes<' in page


def test_wrong_input_is_refused_in_a_sentence(data):
    truth, results, root = data
    with pytest.raises(ValueError, match='at least one set of results'):
        report.write_report(truth, root, {}, root / 'a.html')
    with pytest.raises(FileNotFoundError, match='gone.json'):
        report.write_report(truth, root, {'ours': root / 'gone.json'}, root / 'a.html')
    with pytest.raises(ValueError, match='no image 99'):
        report.write_strip(truth, root, results, root / 'a.png', [99])
    assert not (root / 'a.html').exists()


def test_strip_shows_input_truth_and_ours(data):
    truth, results, root = data
    strip = report.write_strip(truth, root, results, root / 'strip.png', [2, 5], width_px=324)
    picture = cv2.imread(str(strip))
    side = (324 - 24) // 3
    assert picture.shape == (2 * round(side * 60 / 90) + 12, 324, 3)
    assert (picture[:, side : side + 12] == 255).all()
    photo = cv2.resize(cv2.imread(str(root / '2.jpg')), (side, 67), interpolation=cv2.INTER_AREA)
    assert np.abs(picture[:67, :side].astype(int) - photo).mean() < 25  # noise, resampled twice


def test_axis_reaches_above_all_values():
    for value, top in ((0.0, 0.2), (0.19, 0.3), (0.41, 0.5), (0.55, 0.6), (0.61, 0.8), (1.0, 1.0)):
        assert report_page.axis_top({'a': [(1, value)]}, {'a': []}) == pytest.approx(top), value


@pytest.fixture
def chromium(tmp_path):
    """Open a page in headless Chromium; returns ``(page, screenshot) -> (DOM, stderr)``."""
    if not CHROMIUM:
        pytest.skip('Chromium is not installed (Debian: apt-get install chromium)')

    def open_page(page, screenshot=None):
        command = [CHROMIUM, *FLAGS, f'--user-data-dir={tmp_path / "profile"}']
        command += ['--window-size=1280,2400', '--dump-dom']
        command += [f'--screenshot={screenshot}'] if screenshot else []
        done = subprocess.run(
            [*command, page.as_uri()], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    return open_page


PROBE = """
<script>
addEventListener('load', () => {
  const images = [...document.querySelectorAll('main img')];
  const shown = images.filter(image => image.offsetParent);
  document.querySelector('#view-photo').click();
  const photos = images.filter(image => image.offsetParent);
  document.querySelector('.views button.photo').click();
  parent.postMessage(JSON.stringify({
    broken: images.filter(image => !image.complete || !image.naturalWidth).length,
    shown: shown.map(image => image.alt.split(': ')[1]),
    photos: photos.map(image => image.alt.split(': ')[1]),
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    plots: [...document.querySelectorAll('.plots svg')].map(
        svg => svg.querySelectorAll('polyline, rect').length),
    table: document.querySelector('#metrics table').innerText,
    dialog: document.querySelector('dialog').open,
    fetched: performance.getEntriesByType('resource').filter(
        entry => !entry.name.startsWith('data:')).length,
  }), '*');
});
</script>
"""
# A window is at least 500 pixels wide; a frame is as narrow as we like.
FRAME = """
<body style="margin: 0"><iframe src="report.html" style="border: 0; height: 2400px"></iframe>
<script>
addEventListener('message', message => { document.body.dataset.probe = message.data; });
</script>
"""


@pytest.mark.parametrize('width', [1280, 400])
def test_page_in_a_browser(data, chromium, width):
    truth, results, root = data
    page = root / 'report.html'
    report.write_report(truth, root, {'ours': results, 'none': []}, page, num_images=2)
    page.write_text(page.read_text() + PROBE)
    frame, screenshot = root / 'frame.html', root / 'page.png'
    frame.write_text(FRAME.replace('border: 0;', f'border: 0; width: {width}px;'))
    dom, log = chromium(frame, screenshot)
    assert 'CONSOLE' not in log, log
    probe = json.loads(re.search(r'data-probe="([^"]*)"', dom)[1].replace('&quot;', '"'))
    assert probe['broken'] == probe['fetched'] == 0
    assert probe['overflow'] <= 0
    assert set(probe['shown']) == {'ground truth', 'prediction'} and len(probe['shown']) == 12
    assert set(probe['photos']) == {'photo'} and len(probe['photos']) == 6
    assert probe['plots'][0] == 2 and probe['plots'][1] >= 2
    assert probe['dialog'] is True
    assert probe['table'].count('AR@100') == 1 and 'none' in probe['table']
    picture = cv2.imread(str(screenshot))
    assert picture[:, :width].std() > 5


def test_the_browser_test_sees_an_external_reference(data, chromium):
    truth, results, root = data
    page = root / 'report.html'
    report.write_report(truth, root, {'ours': results}, page, num_images=1)
    page.write_text(page.read_text() + '<img src="http://127.0.0.1:9/a.png">')
    assert external_references(page.read_text())
    assert 'CONSOLE' in chromium(page)[1]
