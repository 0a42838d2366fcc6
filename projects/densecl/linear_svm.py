"""VOC2007 classification by linear SVMs on a frozen backbone (thesis, Tables 5.6 to 5.9).

    python projects/densecl/linear_svm.py configs/densecl/densecl_r50_c5_8xb32-800e_coco.py \\
        epoch_800.pth --voc data/VOCdevkit/VOC2007

The protocol of Goyal et al. (2019) as OpenSelfSup (Zhan et al.) has it, which the thesis follows:
images squeezed to 224 x 224, the last features averaged to 2 x 2, and of length one; for each class
an SVM (squared hinge, positives of weight 2) on trainval, its cost the best of 19 by the average
precision of three-fold cross-validation; difficult images are negatives in training and left out
of the test. The mean AP is the area under the precision envelope, as there; that of VOC's 11 points
is printed beside it. Any config that has a backbone will do, and its checkpoint or the backbone
alone. Needs scikit-learn.
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from mmdet.utils import register_all_modules
from mmengine.config import Config
from torch import Tensor, nn

import mmdet_plugins.common.runtime  # noqa: F401
from mmdet_plugins.densecl.weights import load_backbone

COSTS = [1.0, 10.0, 100.0, *(0.5**power for power in range(4, 20))]
SIDE = 224


def read_labels(voc: Path, split: str) -> tuple[list[str], dict[str, np.ndarray]]:
    """Image ids of a split, and of each class 1 where an image has it, -1 not, 0 difficult."""
    files = sorted((voc / 'ImageSets' / 'Main').glob(f'*_{split}.txt'))
    if not files:
        raise SystemExit(
            f'{voc}/ImageSets/Main has no file CLASS_{split}.txt: --voc takes the folder VOC2007 '
            'of the development kit.'
        )
    labels, names = {}, None
    for file in files:
        rows = [line.split() for line in file.read_text().splitlines() if line.strip()]
        found = [row[0] for row in rows]
        if names is not None and found != names:
            raise SystemExit(f'{file} lists other images than {files[0]}.')
        names = found
        labels[file.name.removesuffix(f'_{split}.txt')] = np.array([int(row[1]) for row in rows])
    return names, labels


def pooled(feat: Tensor) -> Tensor:
    """Features [N, C, h, w] -> [N, 4 C] of length one, of windows short of a row and a column."""
    height, width = feat.shape[-2:]
    return F.normalize(F.avg_pool2d(feat, (height - 1, width - 1), stride=1).flatten(1), dim=1)


@torch.no_grad()
def extract(
    backbone: nn.Module, paths: Iterable[Path], mean: Tensor, std: Tensor, rgb: bool, batch: int
) -> np.ndarray:
    """Features [N, 4 C] of images, float32."""
    device, features, paths = mean.device, [], list(paths)
    for start in range(0, len(paths), batch):
        images = []
        for path in paths[start : start + batch]:
            image = cv2.imread(str(path))
            if image is None:
                raise SystemExit(f'{path} cannot be read as an image.')
            image = cv2.resize(image, (SIDE, SIDE), interpolation=cv2.INTER_AREA)
            images.append(torch.from_numpy(image[..., ::-1].copy() if rgb else image))
        stack = torch.stack(images).to(device).permute(0, 3, 1, 2).float()
        features.append(pooled(backbone((stack - mean) / std)[-1]).cpu())
    return torch.cat(features).numpy()


def average_precision(positive: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """Area under the precision envelope, and its mean at recalls of 0, 0.1 to 1 (VOC2007).

    Args:
        positive: Bool [N].
        scores: [N]; higher is more certain.
    """
    hits = positive[np.argsort(-scores, kind='stable')]
    true = np.cumsum(hits)
    recall, precision = true / max(true[-1], 1), true / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    area = np.sum(np.diff(recall, prepend=0) * envelope)
    points = [envelope[recall >= tenth / 10 - 1e-9].max(initial=0) for tenth in range(11)]
    return float(area), float(np.mean(points))


def classify(train: np.ndarray, labels: np.ndarray, test: np.ndarray, jobs: int) -> np.ndarray:
    """Scores of the test images by the SVM of the best cost."""
    from sklearn.model_selection import GridSearchCV
    from sklearn.svm import LinearSVC

    machine = LinearSVC(class_weight={1: 2, -1: 1}, dual=True, max_iter=2000)
    search = GridSearchCV(machine, {'C': COSTS}, scoring='average_precision', cv=3, n_jobs=jobs)
    return search.fit(train, np.where(labels > 0, 1, -1)).decision_function(test)


def main(arguments: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='that has the backbone')
    parser.add_argument('checkpoint', help='of its model, or the backbone alone')
    parser.add_argument('--voc', type=Path, default=Path('data/VOCdevkit/VOC2007'))
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--batch', type=int, default=64)
    parser.add_argument(
        '--jobs', type=int, default=-1, help='processes of the search; -1: all cores'
    )
    args = parser.parse_args(arguments)
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise SystemExit('Linear SVMs need scikit-learn: pip install scikit-learn.') from None
    register_all_modules(init_default_scope=True)
    model = Config.fromfile(args.config).model
    try:
        backbone = load_backbone(model.backbone, args.checkpoint).to(args.device)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    mean, std = (
        torch.tensor(model.data_preprocessor[name], device=args.device).view(3, 1, 1)
        for name in ('mean', 'std')
    )
    rgb = model.data_preprocessor.get('bgr_to_rgb', True)
    features, labels = {}, {}
    for split in ('trainval', 'test'):
        names, labels[split] = read_labels(args.voc, split)
        paths = [args.voc / 'JPEGImages' / f'{name}.jpg' for name in names]
        features[split] = extract(backbone, paths, mean, std, rgb, args.batch)
    found = []
    for name, wanted in labels['trainval'].items():
        scores = classify(features['trainval'], wanted, features['test'], args.jobs)
        truth = labels['test'][name]
        found.append(average_precision(truth[truth != 0] > 0, scores[truth != 0]))
        print(f'{name}: AP {found[-1][0]:.3f}, of 11 points {found[-1][1]:.3f}', flush=True)
    area, points = np.mean(found, axis=0)
    print(f'mean AP {area:.3f}, of 11 points {points:.3f}')
    return float(area)


if __name__ == '__main__':
    main()
