"""AR@100/300/1000 of 1000 boxes an image, float32 on the CPU: 100 or 1000 images of 7.3 objects.

Ours is ``OpenWorldMetric``, the peer mmdet's ``CocoMetric(metric='proposal')``. Either is handed
the data samples a detector makes, in batches of 8, and asked for its numbers, as a validation loop
does. Of the boxes, 80 % are jittered copies of objects, 20 % lie anywhere; one object in fifty is
a crowd. Reading the annotation file belongs to neither side.
"""

import contextlib
import functools
import io
import json
import tempfile
from pathlib import Path

import numpy as np
from _case import Case, Floor, Sides

HEIGHT, WIDTH = 480, 640
BUDGETS = (100, 300, 1000)


def make_case(num_images: int, num_boxes: int, folder: str) -> tuple[str, list[dict]]:
    """An annotation file and the data samples of a detector, seeded."""
    import torch

    rng = np.random.default_rng(0)
    annotations, samples = [], []
    for image_id in range(1, num_images + 1):
        num_objects = rng.poisson(7.3)
        size = np.exp(rng.uniform(np.log(12), np.log(300), (num_objects, 2)))
        boxes = np.concatenate((rng.random((num_objects, 2)) * ((WIDTH, HEIGHT) - size), size), 1)
        annotations += [
            {
                'id': len(annotations) + i,
                'image_id': image_id,
                'category_id': 1,
                'bbox': box,
                'area': box[2] * box[3],
                'iscrowd': int(rng.random() < 0.02),
            }
            for i, box in enumerate(boxes.tolist(), start=1)
        ]
        found = np.concatenate(
            (rng.random((num_boxes, 2)) * (WIDTH, HEIGHT), 10 + 200 * rng.random((num_boxes, 2))), 1
        )
        if num_objects:
            near = rng.random(num_boxes) < 0.8
            source = boxes[rng.integers(num_objects, size=near.sum())]
            spread = rng.choice((0.02, 0.08, 0.2), (len(source), 1)) * np.tile(source[:, 2:], 2)
            found[near] = source + rng.normal(size=source.shape) * spread
        found[:, 2:] = found[:, :2] + found[:, 2:].clip(2)
        samples.append(
            {
                'img_id': image_id,
                'ori_shape': (HEIGHT, WIDTH),
                'pred_instances': {
                    'bboxes': torch.from_numpy(found.astype(np.float32)),
                    'scores': torch.from_numpy(rng.random(num_boxes, np.float32)),
                    'labels': torch.zeros(num_boxes, dtype=torch.int64),
                },
            }
        )
    path = Path(folder, 'annotations.json')
    path.write_text(
        json.dumps(
            {
                'images': [
                    {'id': i, 'height': HEIGHT, 'width': WIDTH, 'file_name': f'{i}.jpg'}
                    for i in range(1, num_images + 1)
                ],
                'annotations': annotations,
                'categories': [{'id': 1, 'name': 'object'}],
            }
        )
    )
    return str(path), samples


def build(num_images: int, num_boxes: int, device: str) -> Sides:
    """Both sides; the device is the CPU's whatever is asked, as evaluation has no other."""
    import mmdet_plugins.common.runtime  # noqa: F401, I001 mends torchvision, so it goes first
    from mmdet.evaluation.metrics import CocoMetric, coco_metric
    from mmdet_plugins.common.open_world_metric import OpenWorldMetric

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path, samples = make_case(num_images, num_boxes, folder)
        ours = OpenWorldMetric(path, metric='bbox', max_dets=BUDGETS)
        peer = CocoMetric(path, metric='proposal', proposal_nums=BUDGETS)
    peer.dataset_meta = {'classes': ('object',)}

    class Unrounded(coco_metric.COCOeval):
        """Keeps the statistics that CocoMetric rounds to three digits."""

        stats_of_last_run = None

        def summarize(self):
            super().summarize()
            Unrounded.stats_of_last_run = self.stats

    def run(metric):
        with contextlib.redirect_stdout(io.StringIO()):
            for start in range(0, num_images, 8):
                metric.process({}, samples[start : start + 8])
            return metric.evaluate(num_images)

    def run_peer():
        stock, coco_metric.COCOeval = coco_metric.COCOeval, Unrounded
        try:
            run(peer)
        finally:
            coco_metric.COCOeval = stock
        return Unrounded.stats_of_last_run[6:12]

    def parity(ours_result, peer_result):
        names = [f'AR@{k}' for k in BUDGETS]
        names += [f'AR@1000_{area}' for area in ('small', 'medium', 'large')]
        values = np.array([ours_result[f'open_world/bbox_{name}'] for name in names])
        difference = np.abs(values - peer_result).max()
        assert difference <= 1e-9, f'{dict(zip(names, values, strict=True))} against {peer_result}'
        return f'{", ".join(names)} equal to {difference:.0e} (AR@100 = {values[0]:.4f})'

    return Sides(ours=functools.partial(run, ours), peer=run_peer, parity=parity)


FLOORS = {'cpu': Floor(ratio=60, memory=1 / 3)}
CASES = [
    Case('100 images x 1000 boxes', functools.partial(build, 100, 1000), FLOORS),
    Case('1000 images x 1000 boxes', functools.partial(build, 1000, 1000), FLOORS),
]
