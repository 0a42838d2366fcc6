"""Fine-tuning from what was learnt without labels (section 6.3.1)."""

from collections.abc import Sequence

import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import CheckpointLoader
from torch import Tensor

from ..common.hooks import unwrapped


@HOOKS.register_module()
class FreeSOLOTransferHook(Hook):
    """Take over all parameters but the last classifier's, and say which were and were not.

    In place of ``load_from``, which keeps the classifier where the number of classes happens to
    agree, does not say what it has loaded, and is passed over by ``--resume`` before there is a
    checkpoint. A run that resumes is left alone.

    Args:
        checkpoint: File or URL.
        skip: Beginnings of the names that are not taken over.
    """

    priority = 'VERY_HIGH'

    def __init__(self, checkpoint: str, skip: Sequence[str] = ('mask_head.conv_cls.',)) -> None:
        self.checkpoint = checkpoint
        self.skip = tuple(skip)

    def before_train(self, runner) -> None:
        if runner.iter > 0:
            return
        model = unwrapped(runner.model)
        loaded = CheckpointLoader.load_checkpoint(self.checkpoint, map_location='cpu')
        message = transfer(model, loaded.get('state_dict', loaded), self.skip)
        runner.logger.info(f'{self.checkpoint}: {message}')


def transfer(model: torch.nn.Module, source: dict[str, Tensor], skip: tuple[str, ...]) -> str:
    """Copy tensors whose name and shape agree.

    Args:
        model: What they are copied into.
        source: A state dict.
        skip: Beginnings of the names that are left out.

    Returns:
        What was and was not copied.

    Raises:
        ValueError: None agrees.
    """
    own = model.state_dict()
    taken = [
        name
        for name, value in source.items()
        if name in own and own[name].shape == value.shape and not name.startswith(skip)
    ]
    if not taken:
        raise ValueError(
            f'none of the {len(source)} tensors of the checkpoint fits the model; they are called '
            f'{", ".join(list(source)[:3])} ...'
        )
    model.load_state_dict({name: source[name] for name in taken}, strict=False)
    kept = [name for name in own if name not in taken and 'num_batches_tracked' not in name]
    unused = [name for name in source if name not in taken and 'num_batches_tracked' not in name]
    count = sum(own[name].numel() for name in taken)
    return (
        f'loaded {len(taken)} tensors of {count} numbers\n'
        f'  left as initialised ({len(kept)}): {_listed(kept)}\n'
        f'  not used ({len(unused)}): {_listed(unused)}'
    )


def _listed(names: list[str]) -> str:
    return ', '.join(names) or 'none'
