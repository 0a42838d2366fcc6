"""One rank of several exchanges batches and trains; for test_distributed.

python -m torch.distributed.run --nproc_per_node=2 shuffle_run.py FOLDER
"""

import sys
from pathlib import Path

import mmdet_plugins.common.runtime  # isort: skip  # noqa: F401  starts gloo
import torch
from mmengine.dist import all_gather, get_dist_info
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from test_model import MOMENTUM, batch, build, sgd

from mmdet_plugins.densecl.shuffle import Exchange


def exchange(num: int, rank: int) -> dict:
    """Samples that say whose they are, sent, looked at, and brought back."""
    samples = 100 * rank + torch.arange(num).float()[:, None, None].expand(num, 2, 3)
    swap = Exchange(num, samples.device)
    visiting = swap.send(samples)
    home = swap.back([visiting * 2, visiting[:, 0, 0].bool()])
    return dict(samples=samples, visiting=visiting, home=home)


def key_statistics(rank: int, shuffle_bn: bool) -> torch.Tensor:
    """Mean of the first batch norm of the key encoder after one step."""
    model = build(shuffle_bn=shuffle_bn)
    model = MMDistributedDataParallel(model, device_ids=None, broadcast_buffers=False)
    model.train_step(batch(rank), OptimWrapper(sgd(model.parameters())))
    return model.module.key_encoder['backbone'].bn1.running_mean


def main(folder: str) -> None:
    torch.set_num_threads(1)
    rank, world_size = get_dist_info()
    torch.manual_seed(rank)
    exchanged = {num: exchange(num, rank) for num in (1, 6, 7)}
    statistics = {flag: key_statistics(rank, flag) for flag in (False, True)}

    # Frozen statistics: who stands beside whom makes no difference, so nor may the exchange.
    logged = {}
    for flag in (False, True):
        model = build(shuffle_bn=flag)
        model.key_encoder.eval()
        wrapped = MMDistributedDataParallel(model, device_ids=None, broadcast_buffers=False)
        wrapper = OptimWrapper(sgd(wrapped.parameters()))
        steps = [wrapped.train_step(batch(2 * step + rank), wrapper) for step in range(2)]
        logged[flag] = dict(steps=steps, queue=model.queue.keys, dense=model.dense_queue.keys)
        same = all_gather(model.queue.keys)
        assert all(torch.equal(one, same[0]) for one in same), 'ranks have queues of their own'
    torch.save(
        dict(exchanged=exchanged, statistics=statistics, logged=logged, momentum=MOMENTUM),
        Path(folder) / f'{rank}.pth',
    )


if __name__ == '__main__':
    main(*sys.argv[1:])
