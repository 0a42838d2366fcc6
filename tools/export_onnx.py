#!/usr/bin/env python
"""Export SOLOv2, its light models included, to ONNX: pixels in, instances out, plain operators.

    python tools/export_onnx.py CONFIG CHECKPOINT OUT.onnx --verify

The graph (opset 18) takes one input and gives five outputs; N, H and W are free, ``n`` is
``test_cfg.max_per_img``:

``images``         uint8 [N, 3, H, W]: resized as in the test pipeline, channels as OpenCV loads
                   them (BGR); normalisation and padding are in the graph
``boxes``          float32 [N, n, 4]: x1, y1, x2, y2 in pixels, zeros behind the last instance
``scores``         float32 [N, n]: falling, zeros behind the last instance
``labels``         int64 [N, n]: -1 behind the last instance
``masks``          bool [N, n, H, W]
``num_instances``  int64 [N]: how many of the n are instances

The names of the classes, if the checkpoint knows them, are in the metadata under ``classes``.
Deformable convolutions become gathers and a matrix product. Needs onnx and onnxscript, and
``--verify`` onnxruntime.
"""

import argparse
import importlib.util
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mmdet_plugins.common.runtime  # noqa: E402, F401  mends torchvision before mmdet is imported
from mmdet_plugins.common.checkpoint import CheckpointError  # noqa: E402
from mmdet_plugins.common.files import atomic_write  # noqa: E402
from mmdet_plugins.common.synthetic import KNOWN, make_scene  # noqa: E402
from mmdet_plugins.solo.export import BatchInstances, ExportableSOLOv2  # noqa: E402

OPSET = 18
NUM_IMAGES = 20
SIZES_HW = ((224, 320), (250, 187), (160, 213))
SCORE_TOLERANCE = 5e-3  # one pixel at the threshold changes how a small mask decays others
MIN_IOU = 0.99


class ExportError(Exception):
    """A sentence for the user."""


def load_detector(config: str, checkpoint: str) -> tuple[torch.nn.Module, list[str] | None]:
    """The detector with every one of its weights, and the names of its classes."""
    from mmdet.registry import MODELS

    try:
        cfg = Config.fromfile(config)
    except OSError as error:
        raise ExportError(f'the config cannot be read: {error}') from None
    init_default_scope('mmdet')
    detector = MODELS.build(cfg.model)
    try:
        content = load_checkpoint(detector, checkpoint, map_location='cpu', strict=True)
    except (OSError, CheckpointError) as error:
        raise ExportError(str(error)) from None
    except RuntimeError as error:
        first = next(line for line in str(error).splitlines()[1:] if line.strip())
        raise ExportError(f'{checkpoint} does not fit {config}: {first.strip()}') from None
    classes = content.get('meta', {}).get('dataset_meta', {}).get('classes')
    return detector, None if classes is None else list(classes)


def export(
    module: ExportableSOLOv2,
    image_hw: tuple[int, int] | None = None,
    classes: list[str] | None = None,
) -> bytes:
    """The ONNX file; ``image_hw`` fixes the size of the images, otherwise it is free."""
    dynamic = {0: 'batch'} if image_hw else {0: 'batch', 2: 'height', 3: 'width'}
    images = torch.zeros(2, 3, *(image_hw or (96, 160)), dtype=torch.uint8)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')
        program = torch.onnx.export(
            module,
            (images,),
            dynamo=True,
            opset_version=OPSET,
            input_names=['images'],
            output_names=list(BatchInstances._fields),
            dynamic_shapes=(dynamic,),
            verbose=False,
        )
    model = program.model_proto
    dims = {value.name: value.type.tensor_type.shape.dim for value in model.graph.output}
    for axis in dynamic.keys() - {0}:  # torch does not see that these are the input's
        dims['masks'][axis].dim_param = dynamic[axis]
    if classes is not None:
        model.metadata_props.add(key='classes', value=json.dumps(classes))
    return model.SerializeToString()


def batches(image_hw: tuple[int, int] | None, batch: int) -> Iterator[torch.Tensor]:
    """Synthetic scenes, uint8 [N, 3, H, W]; each batch has another size unless it is fixed."""
    rng = np.random.default_rng(0)
    for start in range(0, NUM_IMAGES, batch):
        size = image_hw or SIZES_HW[start // batch % len(SIZES_HW)]
        count = min(batch, NUM_IMAGES - start)
        scenes = [make_scene(rng, size, list(KNOWN), 12, False)[0] for _ in range(count)]
        yield torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2).contiguous()


def compare(expected: BatchInstances, found: BatchInstances) -> float:
    """The least IoU of a mask with its counterpart on the other side, 1 where there are none.

    Counterparts have one label, and scores within the tolerance: ranks of equal scores may differ.
    Where all slots are taken, an instance that scores like the last one may have lost its slot.
    """
    worst = 1.0
    for image, count in enumerate(expected.num_instances.tolist()):
        if int(found.num_instances[image]) != count:
            raise ExportError(f'torch finds {count} instances, not {found.num_instances[image]}')
        sides = ([values[image, :count] for values in side] for side in (expected[1:4], found[1:4]))
        (scores, labels, masks), (others, other_labels, other_masks) = sides
        masks, other_masks = masks.flatten(1).float(), other_masks.flatten(1).float()
        common = masks @ other_masks.T
        union = masks.sum(1)[:, None] + other_masks.sum(1) - common
        iou = torch.where(union > 0, common / union, 1)  # padding may hold all of a mask
        iou *= labels[:, None] == other_labels
        iou *= (scores[:, None] - others).abs() < SCORE_TOLERANCE
        full = count == expected.scores.shape[1]
        for best, own in ((iou.amax(1), scores), (iou.amax(0), others)) if count else ():
            sure = best[own > own.min() + SCORE_TOLERANCE] if full else best
            worst = min([worst, *sure.tolist()])
    return worst


def verify(model: bytes, module: ExportableSOLOv2, image_hw: tuple[int, int] | None) -> str:
    """Run ONNX Runtime beside torch, and say how they agree.

    Raises:
        ExportError: They do not.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(model, providers=['CPUExecutionProvider'])
    worst, instances = 1.0, 0
    for batch in (1, 3):
        for images in batches(image_hw, batch):
            with torch.no_grad():
                expected = module(images)
            outputs = session.run(None, {'images': images.numpy()})
            worst = min(worst, compare(expected, BatchInstances(*map(torch.from_numpy, outputs))))
            instances += int(expected.num_instances.sum())
    line = f'{NUM_IMAGES} images in batches of 1 and 3, {instances} instances, IoU >= {worst:.4f}'
    if worst <= MIN_IOU:
        raise ExportError(f'ONNX Runtime does not agree with torch ({line}); nothing is written')
    return f'ONNX Runtime agrees with torch: {line}'


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('config')
    parser.add_argument('checkpoint')
    parser.add_argument('out', metavar='OUT.onnx', type=Path)
    parser.add_argument(
        '--shape', type=int, nargs=2, metavar=('H', 'W'), help='fix the size of the images'
    )
    parser.add_argument(
        '--max-candidates',
        type=int,
        metavar='C',
        help='masks made for an image at most, by class score: bounds the memory, and may miss '
        'instances where more scores exceed the threshold (no bound)',
    )
    parser.add_argument(
        '--verify', action='store_true', help='compare with torch on synthetic images first'
    )
    args = parser.parse_args(arguments)
    needed = ('onnx', 'onnxscript', *(['onnxruntime'] if args.verify else []))
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        print(f'This needs more packages: pip install {" ".join(missing)}', file=sys.stderr)
        return 1
    try:
        detector, classes = load_detector(args.config, args.checkpoint)
        try:
            module = ExportableSOLOv2(detector, args.max_candidates)
        except ValueError as error:
            raise ExportError(f'{args.config}: {error}') from None
        model = export(module, args.shape and tuple(args.shape), classes)
        checked = verify(model, module, args.shape and tuple(args.shape)) if args.verify else None
    except ExportError as error:
        print(error, file=sys.stderr)
        return 1
    with atomic_write(args.out, 'wb') as file:
        file.write(model)
    print(f'{args.out}: opset {OPSET}, {len(model) / 2**20:.1f} MiB')
    print(checked or 'not verified (--verify compares it with torch)')
    return 0


if __name__ == '__main__':
    sys.exit(main())
