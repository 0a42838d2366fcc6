"""How well the features of two views find each other, on images that were not learnt from."""

import json
from collections.abc import Sequence

from mmdet.registry import METRICS
from mmengine.evaluator import BaseMetric

from ..common.files import atomic_write


@METRICS.register_module()
class DenseCLCorrespondence(BaseMetric):
    """Share of the cells that are matched with the cell of the same point.

    Neither mmdet nor mmengine has it. ``accuracy`` is over the cells of all images that both views
    show in different places (see :meth:`.DenseCL.predict`), ``chance`` that of a match drawn from
    the S^2 cells, ``times_chance`` their ratio; ``accuracy_all`` takes in the cells in the same
    place. ``same_place`` is the share of all cells that are matched with the cell in their own
    place: near 1, the features tell places and not what is seen.

    Args:
        out_file: Where to write what :meth:`.DenseCL.predict` counts, a list over images each.
        **kwargs: As for mmengine's ``BaseMetric``.
    """

    default_prefix = 'densecl'

    def __init__(self, out_file: str | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        self.out_file = out_file

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        self.results.extend(data_samples)

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        if self.out_file:
            with atomic_write(self.out_file) as file:
                json.dump({key: [one[key] for one in results] for key in results[0]}, file)
        total = {key: sum(one[key] for one in results) for key in results[0]}
        cells = results[0]['cells']
        accuracy = total['right_moved'] / max(total['moved'], 1)
        return dict(
            accuracy=accuracy,
            accuracy_all=total['right'] / max(total['shown'], 1),
            chance=1 / cells,
            times_chance=accuracy * cells,
            same_place=total['stayed'] / (total['pairs'] * cells),
        )
