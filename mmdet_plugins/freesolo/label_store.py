"""Any folder or COCO file through the stock test loop into a store of pseudo-labels."""

from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.transforms import BaseTransform
from mmdet.datasets.transforms import PackDetInputs
from mmdet.registry import DATA_SAMPLERS, DATASETS, HOOKS, METRICS, TRANSFORMS
from mmengine.dataset import BaseDataset
from mmengine.dist import barrier, broadcast_object_list, get_dist_info, is_main_process
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from torch import nn
from torch.utils.data import Sampler

from ..common.hooks import unwrapped
from ..common.pseudo_store import (
    PseudoLabels,
    PseudoStore,
    digest_images,
    find_copies,
    read_image_list,
)
from ..ops.images import read_image
from ..ops.rle import area


@DATASETS.register_module()
class FreeSOLOImageDataset(BaseDataset):
    """Images without labels, of folders and COCO files.

    Args:
        data_root: What the paths in ``sources``, and file names in the labels, are relative to.
        sources: Dicts with ``img``, a folder of images, the root itself by default, and for a COCO
            file ``ann_file``.
        pipeline: Of transforms, beginning with :class:`FreeSOLOLoadImage`.

    Attributes:
        images: COCO entries of all images, in order; position ``i`` is item ``i``.
        paths: Their files.
    """

    METAINFO = {'classes': ('object',), 'palette': [(220, 20, 60)]}

    def __init__(
        self,
        data_root: str = '',
        sources: Sequence[dict] = (dict(img=''),),
        pipeline: Sequence[dict | Callable] = (),
    ) -> None:
        self.sources = sources
        self.images: list[dict] = []
        super().__init__(
            data_root=data_root, data_prefix=dict(img=''), pipeline=pipeline, test_mode=True
        )

    @property
    def paths(self) -> list[Path]:
        return [Path(self.data_root) / entry['file_name'] for entry in self.images]

    def load_data_list(self) -> list[dict]:
        """List the images of all sources; the ids of folders go on where the last source ended."""
        root, ids = Path(self.data_root), set()
        for source in self.sources:
            folder, ann_file = source.get('img', ''), source.get('ann_file')
            entries = read_image_list(root / (folder if ann_file is None else ann_file))
            first = max(ids, default=0) if ann_file is None else 0
            for entry in entries:
                entry['id'] += first
                entry['file_name'] = (Path(folder) / entry['file_name']).as_posix()
            if common := ids & {entry['id'] for entry in entries}:
                raise ValueError(f'{ann_file}: the image id {min(common)} is also in another file.')
            ids.update(entry['id'] for entry in entries)
            self.images += entries
            if ann_file is None:
                copies = find_copies([root / entry['file_name'] for entry in entries])
                if copies:
                    MMLogger.get_current_instance().warning(
                        f'Copies among the images: {len(copies)}, {copies[0][0]} of '
                        f'{copies[0][1].name} for one: they are labelled, and count, each time.'
                    )
        return [
            dict(
                img_path=str(path),
                img_id=entry['id'],
                height=entry['height'],
                width=entry['width'],
                position=position,
            )
            for position, (path, entry) in enumerate(zip(self.paths, self.images, strict=True))
        ]


@TRANSFORMS.register_module()
class FreeSOLOLoadImage(BaseTransform):
    """Read an image of the size that is planned for it.

    Where that fails, ``unreadable`` says why, and black takes its place: the batch stays what it
    is, and so do the labels of the others.
    """

    def transform(self, results: dict) -> dict:
        """Set ``img``, its shapes, and ``unreadable``, None if all went well."""
        image_hw = results['height'], results['width']
        results['unreadable'] = None
        try:
            results['img'] = read_image(results['img_path'], image_hw)
        except (OSError, ValueError) as error:
            name = Path(results['img_path']).name
            results['unreadable'] = str(error).replace(results['img_path'], name)
            results['img'] = np.zeros((*image_hw, 3), np.uint8)
        results['img_shape'] = results['ori_shape'] = image_hw
        return results


@TRANSFORMS.register_module()
class FreeSOLOPackImage(PackDetInputs):
    """mmdet's, with what :class:`FreeSOLOStoreMetric` wants to know of an image."""

    def __init__(self) -> None:
        keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
        super().__init__((*keys, 'position', 'unreadable'))


@DATA_SAMPLERS.register_module()
class FreeSOLOPlannedBatches(Sampler):
    """The batches that :class:`FreeSOLOStoreHook` assigns to this process."""

    def __init__(self, sampler: Sampler, batch_size: int) -> None:
        self.batch_size = batch_size
        self.batches: list[list[int]] | None = None

    def __iter__(self) -> Iterator[list[int]]:
        if self.batches is None:
            raise RuntimeError(
                "FreeSOLOPlannedBatches has no plan: add dict(type='FreeSOLOStoreHook', "
                'folder=...) to custom_hooks.'
            )
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches or ())


@HOOKS.register_module()
class FreeSOLOStoreHook(Hook):
    """Opens a :class:`~mmdet_plugins.common.pseudo_store.PseudoStore` for a test run.

    The configuration that it stands for: the model but for where its weights come from, the weights
    themselves, the pipeline, the threshold of the metric, and what is in some of the images: two
    folders whose files happen to have the same names and sizes do not share a store.

    Args:
        folder: Of the store.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def before_test(self, runner) -> None:
        """Plan the batches that are left.

        Raises:
            RuntimeError: The model has no weights, or the store does not fit.
        """
        model = unwrapped(runner.model)
        if hasattr(model, 'require_weights'):
            model.require_weights()
        loader = runner.test_dataloader
        metrics = [m for m in runner.test_evaluator.metrics if isinstance(m, FreeSOLOStoreMetric)]
        config = dict(
            model=_without_weights(runner.cfg.model.to_dict()),
            weights=_hash_weights(model),
            pipeline=_without_weights(runner.cfg.test_dataloader.dataset.pipeline),
            score_thr=[metric.score_thr for metric in metrics],
        )
        config['content of the images'] = digest_images(loader.dataset.paths)
        rank, world_size = get_dist_info()
        given = self.folder, loader.dataset.images, config, loader.batch_sampler.batch_size

        def opened() -> list[list[int]]:
            self.store = PseudoStore(*given)
            return self.store.pending()

        left = on_first_rank(opened)  # before any rank adds to it
        if rank > 0:
            self.store = PseudoStore(*given, rank=rank)
        loader.batch_sampler.batches = left[rank::world_size]
        for metric in metrics:
            metric.store = self.store
        total = len(self.store.batches)
        runner.logger.info(f'{self.folder}: {total - len(left)} of {total} batches are done')

    def after_test(self, runner) -> None:
        """Let others use the store."""
        self.store.close()


@METRICS.register_module()
class FreeSOLOStoreMetric(BaseMetric):
    """Writes predictions to the store of :class:`FreeSOLOStoreHook`, a batch at a time.

    Its figures are those of the whole store: images, images without masks, unreadable ones, masks,
    masks that each rule dropped.

    Args:
        score_thr: Less certain masks are dropped (section 6.2.3: 0.3, for a trained model).
    """

    default_prefix = 'store'

    def __init__(self, score_thr: float = 0.0) -> None:
        super().__init__()
        self.score_thr = score_thr
        self.store: PseudoStore | None = None

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Commit the predictions of a batch."""
        if self.store is None:
            raise RuntimeError(
                "FreeSOLOStoreMetric has no store: add dict(type='FreeSOLOStoreHook', folder=...) "
                'to custom_hooks.'
            )
        positions = [sample['position'] for sample in data_samples]
        labels = [_labels(sample, self.score_thr) for sample in data_samples]
        self.store.add(positions, labels)

    def evaluate(self, size: int) -> dict[str, int]:
        """Wait for the other ranks and write the final files."""
        counts = on_first_rank(self.store.finish)
        return {f'{self.prefix}/{key}': value for key, value in counts.items()}

    def compute_metrics(self, results: list) -> dict:
        """Nothing: see :meth:`evaluate`."""
        return {}


def on_first_rank(call: Callable) -> Any:
    """Run something once all ranks are here, on the first; all get its result, or its error."""
    barrier()
    outcome: list = [None, None]
    if is_main_process():
        try:
            outcome[0] = call()
        except Exception as error:  # the other ranks must not wait for ever
            outcome[1] = error
    broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def _labels(sample: dict, score_thr: float) -> PseudoLabels:
    if sample['unreadable'] is not None:
        none = np.zeros((0, 4))
        parts = [], none, none[:, 0], none[:, 0], none[:, :0]
        return PseudoLabels(*parts, unreadable=sample['unreadable'])
    found = sample['pred_instances']
    scores = found['scores'].float().cpu().numpy()
    keep = np.flatnonzero(scores >= score_thr)
    rles = [found['masks'][i] for i in keep]
    embeddings = found.get('embeddings', torch.zeros(len(scores), 0))
    return PseudoLabels(
        rles,
        found['bboxes'].float().cpu().numpy()[keep],
        area(rles),
        scores[keep],
        embeddings.float().cpu().numpy()[keep],
        dropped=sample.get('dropped', {}) | dict(certainty=len(scores) - len(keep)),
    )


def _without_weights(node: Any) -> Any:
    """A config value as plain JSON, without where weights come from."""
    if isinstance(node, dict):
        hidden = ('init_cfg', 'pretrained')
        return {key: _without_weights(node[key]) for key in node if key not in hidden}
    if isinstance(node, list | tuple):
        return [_without_weights(child) for child in node]
    return node


def _hash_weights(model: nn.Module) -> str:
    digest = sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]
