"""Trains the tiny detector on fixed batches, alone or as one rank of several; for test_distributed.

    python parity_run.py CONFIG OUT.pth            (and the same under torch.distributed.run)

Whatever the number of ranks, they share the same four images a step.
"""

import sys

import mmdet_plugins.common.runtime  # isort: skip  # noqa: F401  starts gloo
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.dist import all_reduce, get_dist_info, is_distributed
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import InstanceData

STEPS, IMAGES, SIZE_HW = 20, 4, (64, 96)


def batch(step: int, rank: int, world_size: int) -> dict:
    """This rank's share of the images of ``step``; their objects differ in number and size."""
    generator = torch.Generator().manual_seed(step % 5)
    inputs, samples = [], []
    for index in range(IMAGES):
        image = torch.randint(0, 256, (3, *SIZE_HW), generator=generator, dtype=torch.uint8)
        corners = torch.rand(index, 2, generator=generator) * torch.tensor([50.0, 25.0])
        sides = 8 + torch.rand(index, 2, generator=generator) * 30
        objects = InstanceData(
            bboxes=torch.cat([corners, corners + sides], 1),
            labels=torch.zeros(index, dtype=torch.long),
        )
        meta = dict(img_shape=SIZE_HW, ori_shape=SIZE_HW, pad_shape=SIZE_HW)
        inputs.append(image)
        samples.append(DetDataSample(metainfo=meta, gt_instances=objects))
    share = slice(rank, None, world_size)
    return dict(inputs=inputs[share], data_samples=samples[share])


def main(config: str, out: str) -> None:
    torch.set_num_threads(1)
    cfg = Config.fromfile(config)
    init_default_scope('mmdet')
    cfg.model.backbone.norm_eval = True  # batch statistics would be those of a rank
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    model.train()  # only now are the statistics frozen
    start = [parameter.detach().clone() for parameter in model.parameters()]
    rank, world_size = get_dist_info()
    if is_distributed():
        model = MMDistributedDataParallel(model, device_ids=None, broadcast_buffers=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.002, momentum=0.9, weight_decay=1e-4)
    wrapper = OptimWrapper(optimizer)
    curve = []
    for step in range(STEPS):
        logged = model.train_step(batch(step, rank, world_size), wrapper)
        losses = torch.stack([value.detach() for value in logged.values()])
        all_reduce(losses, op='mean')
        curve.append(losses)
    if rank == 0:
        end = [parameter.detach() for parameter in model.parameters()]
        result = dict(names=list(logged), curve=torch.stack(curve), start=start, end=end)
        torch.save({**result, 'world_size': world_size}, out)


if __name__ == '__main__':
    main(*sys.argv[1:])
