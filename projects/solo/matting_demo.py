"""Pictures made with a matte: background out of focus, object before a new background, cut-out.

``python projects/solo/matting_demo.py photo.jpg matte.png --background beach.jpg``
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from mmdet_plugins.ops.matting import bokeh, composite, estimate_foreground


def read(path: str, flag: int) -> np.ndarray:
    image = cv2.imread(path, flag)
    if image is None:
        raise SystemExit(f'{path}: there is no such file, or it is no image.')
    return image


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('image')
    parser.add_argument('matte', help='8-bit grey image of the same size, 255 for the object')
    parser.add_argument('--background', help='picture to put behind the object')
    parser.add_argument('--radius', type=int, default=12, help='of the blur, px')
    parser.add_argument('--out-dir', default='.', help='for <image>_{bokeh,composite,cutout}.png')
    args = parser.parse_args(argv)

    image = read(args.image, cv2.IMREAD_COLOR)
    alpha = read(args.matte, cv2.IMREAD_GRAYSCALE)
    if alpha.shape != image.shape[:2]:
        raise SystemExit(
            f'{args.matte} has {alpha.shape[0]} x {alpha.shape[1]} pixels (h x w), but '
            f'{args.image} {image.shape[0]} x {image.shape[1]}.'
        )
    matte = alpha / 255
    front = estimate_foreground(image, matte)
    pictures = dict(bokeh=bokeh(image, matte, args.radius), cutout=np.dstack((front, alpha)))
    if args.background:
        behind = read(args.background, cv2.IMREAD_COLOR)
        behind = cv2.resize(behind, image.shape[1::-1], interpolation=cv2.INTER_AREA)
        pictures['composite'] = composite(front, matte, behind)
    folder = Path(args.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for kind, picture in pictures.items():
        cv2.imwrite(str(folder / f'{Path(args.image).stem}_{kind}.png'), picture)


if __name__ == '__main__':
    main()
