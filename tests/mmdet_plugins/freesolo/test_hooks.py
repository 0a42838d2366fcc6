"""What fine-tuning takes over from pre-training."""

import logging
from types import SimpleNamespace

import pytest
import torch
from mmengine.registry import HOOKS
from torch import nn

from mmdet_plugins.freesolo.hooks import transfer

SKIP = ('mask_head.conv_cls.',)


def network(classes: int, width: int = 4) -> nn.Module:
    head = nn.ModuleDict(dict(conv_cls=nn.Conv2d(4, classes, 1), conv=nn.Conv2d(width, 4, 1)))
    return nn.ModuleDict(dict(backbone=nn.Conv2d(3, 4, 1), mask_head=head))


def test_all_but_the_classifier():
    """Left out even where the shapes agree; what does not fit is told."""
    source, model = network(1), network(1, width=5)
    before = model['mask_head']['conv_cls'].weight.clone()
    message = transfer(model, {**source.state_dict(), 'extra': torch.zeros(2)}, SKIP)
    assert torch.equal(model['backbone'].weight, source['backbone'].weight)
    assert torch.equal(model['mask_head']['conv'].bias, source['mask_head']['conv'].bias)
    assert torch.equal(model['mask_head']['conv_cls'].weight, before)
    kept, unused = message.splitlines()[1:]
    assert 'loaded 3 tensors of 20 numbers' in message
    assert kept.endswith(
        '(3): mask_head.conv_cls.weight, mask_head.conv_cls.bias, mask_head.conv.weight'
    )
    assert unused.endswith('mask_head.conv.weight, extra') and '(4)' in unused


def test_a_stranger_is_refused():
    with pytest.raises(ValueError, match='none of the 1 tensors .* called other'):
        transfer(network(1), {'other': torch.zeros(2)}, SKIP)


@pytest.mark.parametrize('done', [0, 7])
def test_a_resumed_run_is_left_alone(tmp_path, caplog, done):
    source, model = network(1), network(80)
    torch.save(dict(state_dict=source.state_dict()), tmp_path / 'old.pth')
    hook = HOOKS.build(dict(type='FreeSOLOTransferHook', checkpoint=str(tmp_path / 'old.pth')))
    logger = logging.getLogger('transfer')
    with caplog.at_level(logging.INFO):
        hook.before_train(SimpleNamespace(iter=done, model=model, logger=logger))
    assert torch.equal(model['backbone'].weight, source['backbone'].weight) == (done == 0)
    assert ('left as initialised' in caplog.text) == (done == 0)
