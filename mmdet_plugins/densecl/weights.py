"""A backbone out of a training checkpoint, or as exported."""

from collections.abc import Mapping

from mmdet.registry import MODELS
from mmengine.runner import CheckpointLoader
from torch import nn

PREFIX = 'backbone.'


def load_backbone(cfg: Mapping, checkpoint: str | None) -> nn.Module:
    """The backbone of a config, in evaluation mode, with weights from a file.

    Args:
        cfg: Of the backbone.
        checkpoint: Of a model that has it as ``backbone``, or of it alone; None for random weights.

    Raises:
        ValueError: The file holds another backbone's weights.
    """
    backbone = MODELS.build(cfg)
    backbone.eval()  # mmdet's returns None
    if checkpoint is None:
        backbone.init_weights()
        return backbone
    loaded = CheckpointLoader.load_checkpoint(checkpoint, map_location='cpu')
    state = loaded.get('state_dict', loaded)
    if any(name.startswith(PREFIX) for name in state):
        state = {n[len(PREFIX) :]: v for n, v in state.items() if n.startswith(PREFIX)}
    wanted = backbone.state_dict()
    fitting = {n: v for n, v in state.items() if n in wanted and v.shape == wanted[n].shape}
    if len(fitting) < len(wanted):
        lacking = next(name for name in wanted if name not in fitting)
        raise ValueError(
            f'{checkpoint} fits {len(fitting)} of the {len(wanted)} tensors of the backbone, and '
            f'not {lacking}: give the config it was trained with.'
        )
    backbone.load_state_dict(fitting)
    return backbone
