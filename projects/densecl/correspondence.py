"""Draw which cells of two views are each other's most similar ones (thesis, Figures 5.4 and 5.5).

    python projects/densecl/correspondence.py CONFIG matches.png --image dog.jpg \\
        --checkpoint moco-v2.pth --checkpoint densecl.pth

One row for each image and checkpoint, so that models (Figure 5.4), or one model at several times of
its training (Figure 5.5: ``--checkpoint random --threshold -1``), can be compared: they are shown
the same views. A match is kept if it holds both ways and its cosine is at least ``--threshold``. It
is green where the crops say that both cells show the same point, red where they do not, and grey
where the other view does not show that point.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import torch
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.logging import MMLogger
from torch import Tensor

import mmdet_plugins.common.runtime  # noqa: F401
from mmdet_plugins.common.files import atomic_write
from mmdet_plugins.densecl import DenseCLDataPreprocessor, DenseCLTwoViews
from mmdet_plugins.densecl.weights import load_backbone
from mmdet_plugins.ops.contrastive import mutual_matches, true_cells

SHOWN = 448  # px, side of a view in the picture
GAP = 16
COLOURS = dict(right=(60, 180, 60), wrong=(50, 50, 220), hidden=(160, 160, 160))  # BGR


def views_of(cfg: Config, image: np.ndarray, size: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Two views of an image as the config's training makes them; uint8 [2, 3, S, S], [2, 4]."""
    (options,) = (
        step for step in cfg.train_dataloader.dataset.pipeline if step['type'] == 'DenseCLTwoViews'
    )
    options = {key: value for key, value in options.items() if key != 'type'}
    options |= dict(size=size or options['size'], seed=seed, pairs=1)
    transform = DenseCLTwoViews(**options)
    sample = transform(dict(img=image, img_id=0))
    return sample['inputs'], sample['frames_xyxy']


def matches_of(
    first: Tensor, second: Tensor, frames_xyxy: Tensor, threshold: float
) -> Iterator[tuple[int, int, str]]:
    """Cells of two views that match, and which key of ``COLOURS``.

    Args:
        first, second: Features [1, C, S, S].
        frames_xyxy: [2, 4].
        threshold: Least cosine.
    """
    match, similarity = (part[0] for part in mutual_matches(first, second))
    truth = true_cells(*frames_xyxy[:, None], first.shape[-1])[0]
    for cell in ((match >= 0) & (similarity >= threshold)).nonzero()[:, 0].tolist():
        other, true = match[cell].item(), truth[cell].item()
        yield cell, other, 'hidden' if true < 0 else 'right' if true == other else 'wrong'


def draw(views: Tensor, matches: list[tuple[int, int, str]], grid: int, title: str) -> np.ndarray:
    """The two views beside each other, BGR, a line from cell to cell."""
    pair = [cv2.resize(view.permute(1, 2, 0).numpy()[..., ::-1], (SHOWN, SHOWN)) for view in views]
    picture = np.full((SHOWN + 2 * GAP, 2 * SHOWN + GAP, 3), 255, np.uint8)
    picture[2 * GAP :, :SHOWN], picture[2 * GAP :, SHOWN + GAP :] = pair
    for cell, other, kind in matches:
        ends = [
            (
                round((at % grid + 0.5) * SHOWN / grid) + shift,
                round((at // grid + 0.5) * SHOWN / grid) + 2 * GAP,
            )
            for at, shift in ((cell, 0), (other, SHOWN + GAP))
        ]
        cv2.line(picture, *ends, COLOURS[kind], 1, cv2.LINE_AA)
        for end in ends:
            cv2.circle(picture, end, 4, COLOURS[kind], -1, cv2.LINE_AA)
    cv2.putText(picture, title, (4, 22), cv2.FONT_HERSHEY_SIMPLEX, 0.6, (0, 0, 0), 1, cv2.LINE_AA)
    return picture


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config', help='of DenseCL or MoCo-v2')
    parser.add_argument('out', type=Path, help='the picture')
    parser.add_argument('--image', type=Path, action='append', required=True, help='repeatable')
    parser.add_argument(
        '--checkpoint', action='append', required=True, help="repeatable; 'random' for none"
    )
    parser.add_argument('--threshold', type=float, default=0.9, help='least cosine; -1 for all')
    parser.add_argument('--size', type=int, help="side of a view, px; default: the config's")
    parser.add_argument('--seed', type=int, default=0, help='of the views')
    args = parser.parse_args(arguments)
    register_all_modules(init_default_scope=True)
    MMLogger.get_current_instance().setLevel('WARNING')
    cfg = Config.fromfile(args.config)
    options = cfg.model.data_preprocessor
    preprocessor = DenseCLDataPreprocessor(mean=options.mean, std=options.std)
    if not cv2.haveImageWriter(str(args.out)):
        raise SystemExit(f'{args.out}: pictures are written as .png or .jpg.')
    rows = []
    for path in args.image:
        image = cv2.imread(str(path))
        if image is None:
            raise SystemExit(f'{path} cannot be read as an image.')
        views, frames = views_of(cfg, image, args.size, args.seed)
        inputs = preprocessor(dict(inputs=views[None]))['inputs'][:, 0]
        for checkpoint in args.checkpoint:
            torch.manual_seed(0)
            weights = None if checkpoint == 'random' else checkpoint
            try:
                backbone = load_backbone(cfg.model.backbone, weights)
            except (OSError, ValueError) as error:
                raise SystemExit(str(error)) from None
            with torch.no_grad():
                features = [backbone(view[None])[-1] for view in inputs]
            found = list(matches_of(*features, frames, args.threshold))
            right = sum(kind == 'right' for *_, kind in found)
            shown = sum(kind != 'hidden' for *_, kind in found)
            title = f'{Path(checkpoint).stem}: {len(found)} matches, {right} of {shown} right'
            print(f'{path}, {title}', flush=True)
            rows.append(draw(views, found, features[0].shape[-1], title))
    with atomic_write(args.out, 'wb') as file:
        file.write(cv2.imencode(args.out.suffix, np.concatenate(rows))[1].tobytes())


if __name__ == '__main__':
    main()
