"""What changes in a DenseCL model with the data and with time."""

from mmdet.registry import HOOKS
from mmengine.dist import get_world_size
from mmengine.hooks import Hook
from mmengine.runner import BaseLoop

from ..common.hooks import unwrapped
from .model import DenseCL


def _model(runner) -> DenseCL:
    return unwrapped(runner.model)


@HOOKS.register_module()
class DenseCLWarmupHook(Hook):
    """The global term alone for some iterations, then the model's lambda (section 5.3.4, way 2).

    As released, the dense branch is computed all along: what its head makes of features that the
    global term shapes fills the dense queue before it counts.

    Args:
        iters: Iterations with lambda 0; 10,000 for the last row of Table 5.6.
    """

    def __init__(self, iters: int = 10000) -> None:
        self.iters = iters

    def before_train(self, runner) -> None:
        self._dense_weight = _model(runner).dense_weight

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        started = runner.iter >= self.iters
        _model(runner).dense_weight = self._dense_weight if started else 0.0


@HOOKS.register_module()
class DenseCLQueueSizeHook(Hook):
    """Shortens the queues for a small data set, as negatives must not show the query's own image.

    They get half as many keys as there are images at most (COCO has 1.8 images a key), but those of
    one batch at least.
    """

    def before_run(self, runner) -> None:
        if not isinstance(runner._train_loop, BaseLoop):  # nothing is trained
            return
        loader = runner.train_loop.dataloader
        batch = loader.batch_sampler.batch_size * get_world_size()
        model = _model(runner)
        size = max(batch, len(loader.dataset) // 2)
        if size < len(model.queue.keys):
            model.resize_queues(size)
            runner.logger.info(f'Queues of {size} keys, for {len(loader.dataset)} images.')
