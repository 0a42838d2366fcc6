"""From the predictions of one training to the pseudo-labels of the next (section 6.2.3)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mmdet.registry import METRICS
from mmengine.logging import MMLogger
from torch import Tensor

from ..common.files import atomic_write
from ..common.streamed_metric import StreamedMetric
from ..ops.coco_json import check_coco, check_entries
from ..ops.rle import area, encode_masks, rle_to_xyxy
from .datasets import embeddings_file

# Of one image: run lengths, scores [n], and embeddings float16 [n, E] or None.
Found = tuple[list[dict], np.ndarray, np.ndarray | None]


@METRICS.register_module()
class FreeSOLOPseudoLabels(StreamedMetric):
    """Write what a test loop finds as pseudo-labels, as :class:`.FreeSOLODataset` reads them.

    Used as ``test_evaluator`` over the training images. Nothing is evaluated; the values are
    ``masks_per_image`` and the share of images ``without``.

    Args:
        ann_file: Lists the images, in the order in which they are written.
        out_file: The JSON to write.
        score_thr: Less certain objects are dropped (section 6.3.1).
        backend_args, collect_device, prefix, collect_dir: As for ``CocoMetric``.
    """

    default_prefix = 'pseudo_labels'

    def __init__(self, ann_file: str, out_file: str, score_thr: float = 0.3, **kwargs: Any) -> None:
        super().__init__(ann_file, _checked, **kwargs)
        self.out_file = out_file
        self.score_thr = score_thr
        self._state = self._new_state()

    def _new_state(self) -> dict[int, Found]:
        return {}

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Keep what is certain enough, with masks as run lengths."""
        for sample in data_samples:
            image = self._image(sample)
            pred = sample['pred_instances']
            keep = (pred['scores'] >= self.score_thr).nonzero()[:, 0]
            masks, embeddings = pred['masks'], pred.get('embeddings')
            self._state[image['id']] = (
                encode_masks(masks[keep])
                if isinstance(masks, Tensor)
                else [masks[i] for i in keep.tolist()],
                pred['scores'][keep].cpu().numpy(),
                None if embeddings is None else embeddings[keep].half().cpu().numpy(),
            )

    def compute_metrics(self, results: list) -> dict[str, float]:
        found = {image_id: one for part in results for image_id, one in part.items()}
        self._warn_of_unseen(found.keys())
        annotations, embeddings = [], []
        for image_id in self._images:
            if image_id not in found:
                continue
            rles, scores, of_image = found[image_id]
            if of_image is not None:
                embeddings.append(of_image)
            boxes = rle_to_xyxy(rles)
            boxes[:, 2:] -= boxes[:, :2]
            for rle, box, size, score in zip(
                rles, boxes.tolist(), area(rles).tolist(), scores.tolist(), strict=True
            ):
                annotations.append(
                    dict(
                        id=len(annotations) + 1,
                        image_id=image_id,
                        category_id=1,
                        iscrowd=0,
                        bbox=box,
                        area=size,
                        score=round(score, 6),
                        segmentation=rle,
                    )
                )
        self._write(annotations, np.concatenate(embeddings) if embeddings else None)
        num_images = max(len(found), 1)
        return dict(
            masks_per_image=len(annotations) / num_images,
            without=sum(not rles for rles, *_ in found.values()) / num_images,
        )

    def _write(self, annotations: list[dict], embeddings: np.ndarray | None) -> None:
        """The embeddings first: a JSON without them would be taken for complete."""
        Path(self.out_file).unlink(missing_ok=True)
        if embeddings is not None:
            with atomic_write(embeddings_file(self.out_file), 'wb') as file:
                np.save(file, embeddings)
        content = dict(
            images=[*self._images.values()],
            annotations=annotations,
            categories=[dict(id=1, name='object')],
        )
        with atomic_write(self.out_file) as file:
            json.dump(content, file)
        MMLogger.get_current_instance().info(
            f'{len(annotations)} pseudo-labels of {len(self._images)} images are in '
            f'{self.out_file}.'
        )


def _checked(data: Any, name: str) -> dict:
    return check_entries(check_coco(data, name), name)
