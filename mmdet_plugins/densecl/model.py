"""The momentum pair of encoders, their heads and queues (thesis, section 5.2).

Shapes: N images of a view, C channels of the backbone, E of an embedding, S the side of the grid.
"""

import copy
import logging
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from mmdet.registry import MODELS
from mmengine.dist import all_gather, get_world_size
from mmengine.logging import print_log
from mmengine.model import BaseDataPreprocessor, BaseModel, BaseModule
from torch import Tensor, nn

from ..ops.contrastive import info_nce, match_cells, true_cells
from .shuffle import Exchange

MATCHING = ('backbone', 'dense', 'random')
NEGATIVES = ('pooled', 'sampled')


@MODELS.register_module()
class DenseCLDataPreprocessor(BaseDataPreprocessor):
    """Stacks the views of a batch, one stack a view, and normalises them on the device.

    mmengine's ``ImgDataPreprocessor`` takes one image a sample.

    Args:
        mean, std: Of the channels, RGB, on the scale of 0 to 255.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.register_buffer('mean', torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, data: dict, training: bool = False) -> dict:
        """``inputs`` uint8 [N, views, 3, H, W] -> float [views, N, 3, H, W]; others as they are."""
        data = self.cast_data(data)
        views = data['inputs'].transpose(0, 1).contiguous()
        return {**data, 'inputs': (views.float() - self.mean) / self.std}


@MODELS.register_module()
class DenseCLHead(BaseModule):
    """Projections to embeddings, of the whole view and of every cell (section 5.2.2).

    Both are two layers with a ReLU between, of as many parameters: linear after global pooling,
    and 1 x 1 convolutions.

    Args:
        in_channels: C.
        hidden_channels: Of the layer between.
        out_channels: E.
        grid_size: S; features of another size are brought to it by adaptive average pooling.
        init_cfg: By default as released: He's for the linear layers, PyTorch's for convolutions.
    """

    def __init__(
        self,
        in_channels: int = 2048,
        hidden_channels: int = 2048,
        out_channels: int = 128,
        grid_size: int = 7,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg or dict(type='Kaiming', layer='Linear', mode='fan_in'))
        self.out_channels = out_channels
        self.grid_size = grid_size
        self.global_mlp = nn.Sequential(
            nn.Linear(in_channels, hidden_channels),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_channels, out_channels),
        )
        self.dense_mlp = nn.Sequential(
            nn.Conv2d(in_channels, hidden_channels, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden_channels, out_channels, 1),
        )

    def to_grid(self, feat: Tensor) -> Tensor:
        """Features [N, C, h, w] -> [N, C, S, S]."""
        grid_hw = (self.grid_size, self.grid_size)
        return feat if feat.shape[-2:] == grid_hw else F.adaptive_avg_pool2d(feat, grid_hw)

    def forward(self, feat: Tensor) -> Tensor:
        """Features [N, C, h, w] -> global embeddings [N, E]."""
        return self.global_mlp(feat.mean((2, 3)))

    def forward_dense(self, grid: Tensor) -> Tensor:
        """Features [N, C, S, S] -> dense embeddings [N, E, S, S]."""
        return self.dense_mlp(grid)


class DenseCLQueue(nn.Module):
    """The last ``size`` keys, a ring; random directions until it is full.

    Attributes:
        keys: Buffer [K, E], unit vectors.
        written: Buffer, int64, how many keys were ever written.
    """

    def __init__(self, size: int, channels: int) -> None:
        super().__init__()
        self.register_buffer('keys', F.normalize(torch.randn(size, channels), dim=1))
        self.register_buffer('written', torch.zeros((), dtype=torch.long))

    @property
    def fill(self) -> Tensor:
        """Share of it that holds keys of images."""
        return self.written.clamp(max=len(self.keys)) / len(self.keys)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        """Keys of a queue of another size are not taken: it begins anew, and says so."""
        keys = state_dict.get(f'{prefix}keys')
        if keys is not None and keys.shape != self.keys.shape:
            print_log(
                f'{prefix[:-1]}: the checkpoint has {len(keys)} keys, this queue {len(self.keys)}; '
                'it begins with random ones.',
                'current',
                logging.WARNING,
            )
            state_dict[f'{prefix}keys'] = self.keys
            state_dict[f'{prefix}written'] = torch.zeros_like(self.written)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def write(self, keys: Tensor) -> None:
        """Put ``keys`` [n, E] in the place of the oldest ones."""
        size = len(self.keys)
        if len(keys) > size:
            raise ValueError(
                f'A queue of {size} keys cannot take the {len(keys)} of one batch: '
                'set model.queue_size higher.'
            )
        index = (self.written + torch.arange(len(keys), device=keys.device)) % size
        self.keys.index_copy_(0, index, keys.to(self.keys.dtype))
        self.written += len(keys)


class _Encoded(NamedTuple):
    """One view: features [N, C, S, S], unit embeddings [N, E], dense [N, E, S, S], pooled [N, E].

    The last two are missing if the dense branch was not computed.
    """

    grid: Tensor
    embedding: Tensor
    dense: Tensor | None = None
    pooled: Tensor | None = None


@MODELS.register_module()
class DenseCL(BaseModel):
    """Dense contrastive learning; MoCo-v2 if ``dense_weight`` is 0.

    Neither mmdet nor mmseg has self-supervised models. The class trains in their runner; its
    checkpoint initialises a backbone by ``dict(type='Pretrained', checkpoint=..., prefix=
    'backbone.')``.

    Args:
        backbone: Any of mmdet or timm; its last level is used.
        head: A :class:`DenseCLHead`.
        data_preprocessor: A :class:`DenseCLDataPreprocessor`.
        dense_weight: Lambda of equation 5.3, of the dense term; the global term has the rest. May
            be set between iterations. Built with 0, the model never computes the dense branch.
        matching: What decides which cells match (Table 5.7): ``'backbone'`` features (max-sim F),
            ``'dense'`` embeddings (max-sim Theta), or ``'random'``.
        negatives: What the dense queue gets of an image: its ``'pooled'`` dense embeddings, or
            those of one cell, ``'sampled'`` at random.
        queue_size: Keys in either queue.
        momentum: Share of the key encoder that stays in an iteration.
        temperature: Of the loss.
        shuffle_bn: Encode keys beside images of other ranks.

    Raises:
        ValueError: An option is none of those above.
    """

    def __init__(
        self,
        backbone: dict,
        head: dict,
        data_preprocessor: dict | None = None,
        dense_weight: float = 0.5,
        matching: str = 'backbone',
        negatives: str = 'pooled',
        queue_size: int = 65536,
        momentum: float = 0.999,
        temperature: float = 0.2,
        shuffle_bn: bool = True,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(data_preprocessor, init_cfg)
        for name, value, known in (
            ('matching', matching, MATCHING),
            ('negatives', negatives, NEGATIVES),
        ):
            if value not in known:
                raise ValueError(f'{name} must be one of {", ".join(known)}, not {value!r}.')
        if not 0 <= dense_weight <= 1:
            raise ValueError(f'dense_weight must lie between 0 and 1, not at {dense_weight}.')
        self.dense_weight = dense_weight
        self.with_dense = dense_weight > 0
        self.matching = matching
        self.negatives = negatives
        self.momentum = momentum
        self.temperature = temperature
        self.shuffle_bn = shuffle_bn
        self.backbone = MODELS.build(backbone)
        self.head = MODELS.build(head)
        self.key_encoder = nn.ModuleDict(
            dict(backbone=copy.deepcopy(self.backbone), head=copy.deepcopy(self.head))
        ).requires_grad_(False)
        self.queue = DenseCLQueue(queue_size, self.head.out_channels)
        self.dense_queue = DenseCLQueue(queue_size, self.head.out_channels)

    def init_weights(self) -> None:
        """Initialise; the key encoder begins as a copy."""
        super().init_weights()
        self.key_encoder['backbone'].load_state_dict(self.backbone.state_dict())
        self.key_encoder['head'].load_state_dict(self.head.state_dict())

    def forward(
        self, inputs: Tensor, frames_xyxy: Tensor | None = None, mode: str = 'tensor'
    ) -> dict[str, Tensor] | list[dict[str, int]] | tuple[Tensor, ...]:
        """Losses of two views, what of them is matched rightly, or the backbone's features.

        Args:
            inputs: ``'loss'``: [2, N, 3, H, W], queries and keys; ``'predict'``: [2 P, N, 3, H, W],
                pairs of views; ``'tensor'``: [N, 3, H, W].
            frames_xyxy: [N, 2 P, 4], see :func:`~mmdet_plugins.ops.contrastive.true_cells`.
            mode: One of these three.
        """
        if mode == 'loss':
            return self.loss(inputs, frames_xyxy)
        if mode == 'predict':
            return self.predict(inputs, frames_xyxy)
        if mode == 'tensor':
            return self.backbone(inputs)
        raise ValueError(f"DenseCL has no mode {mode!r}, only 'loss', 'predict' and 'tensor'.")

    def loss(self, inputs: Tensor, frames_xyxy: Tensor | None = None) -> dict[str, Tensor]:
        """Both terms of equation 5.3, weighted, and what tells of the training's health.

        Returns:
            ``loss_global``, ``loss_dense`` (with the dense branch), ``similarity_global`` and
            ``similarity_dense`` of the positives, ``queue_fill_global`` and ``queue_fill_dense``,
            and, with ``frames_xyxy``, ``agreement``: the share of cells, of those that both views
            show, which the backbone's features match with the cell that shows the same point.
            Chance is 1 / S^2.
        """
        weight = self.dense_weight
        query = self._encode(self.backbone, self.head, inputs[0])
        with torch.no_grad():
            self._update_key_encoder()
            key = self._encode_keys(inputs[1])
            match = match_cells(query.grid, key.grid)

        def contrast(name: str, queries: Tensor, keys: Tensor, queue: Tensor, share: float) -> dict:
            loss = info_nce(queries, keys, queue, self.temperature).mean()
            similarity = (queries.detach() * keys).sum(1).mean()
            return {f'loss_{name}': share * loss, f'similarity_{name}': similarity}

        logged = contrast('global', query.embedding, key.embedding, self.queue.keys, 1 - weight)
        if self.with_dense:
            positives = _cells_of(key.dense, self._match(query, key, match))
            queries = query.dense.flatten(2).transpose(1, 2).flatten(0, 1)
            logged |= contrast('dense', queries, positives, self.dense_queue.keys, weight)
        self._enqueue(key)
        logged['queue_fill_global'] = self.queue.fill
        if self.with_dense:
            logged['queue_fill_dense'] = self.dense_queue.fill
        if frames_xyxy is not None:
            truth = true_cells(*frames_xyxy.unbind(1), self.head.grid_size)
            logged['agreement'] = (match == truth).sum() / (truth >= 0).sum().clamp(min=1)
        return logged

    def predict(self, inputs: Tensor, frames_xyxy: Tensor) -> list[dict[str, int]]:
        """Correspondence by the backbone's features against the geometry of the views.

        Cells whose point has moved to another cell are counted apart: features that know where in
        the view they are, by the zeros that convolutions pad with, find the others without a look
        at the image.

        Returns:
            Of each image, over its pairs: ``shown``, the cells of the first view whose point the
            second shows too; ``right``, those of them matched with the cell that shows it;
            ``moved`` and ``right_moved``, those of both in different places; ``stayed``, the cells
            matched with the one in their own place; ``cells``, S^2; ``pairs``.
        """
        grids = [self.head.to_grid(self.backbone(view)[-1]) for view in inputs]
        side, counts = self.head.grid_size, []
        own = torch.arange(side**2, device=inputs.device)
        for i in range(0, len(grids), 2):
            match = match_cells(*grids[i : i + 2])
            truth = true_cells(*frames_xyxy[:, i : i + 2].unbind(1), side)
            right, moved = match == truth, (truth >= 0) & (truth != own)
            kinds = dict(
                shown=truth >= 0,
                right=right,
                moved=moved,
                right_moved=right & moved,
                stayed=match == own,
            )
            counts.append(torch.stack([kind.sum(1) for kind in kinds.values()], 1))
        return [
            dict(zip(kinds, total, strict=True), cells=side**2, pairs=len(counts))
            for total in torch.stack(counts).sum(0).tolist()
        ]

    def _encode(self, backbone: nn.Module, head: DenseCLHead, images: Tensor) -> _Encoded:
        feat = backbone(images)[-1]
        grid = head.to_grid(feat)
        embedding = F.normalize(head(feat), dim=1)
        if not self.with_dense:
            return _Encoded(grid, embedding)
        dense = head.forward_dense(grid)
        pooled = F.normalize(dense.mean((2, 3)), dim=1)
        return _Encoded(grid, embedding, F.normalize(dense, dim=1), pooled)

    def _encode_keys(self, images: Tensor) -> _Encoded:
        encoder = self.key_encoder['backbone'], self.key_encoder['head']
        if not self.shuffle_bn or get_world_size() == 1:
            return self._encode(*encoder, images)
        exchange = Exchange(len(images), images.device)
        encoded = self._encode(*encoder, exchange.send(images))
        return _Encoded(*exchange.back([part for part in encoded if part is not None]))

    def _match(self, query: _Encoded, key: _Encoded, by_backbone: Tensor) -> Tensor:
        """Cells [N, S^2] of the key that are the positives of the query's."""
        if self.matching == 'backbone':
            return by_backbone
        if self.matching == 'dense':
            return match_cells(query.dense, key.dense)
        return torch.randint_like(by_backbone, by_backbone.shape[1])

    def _update_key_encoder(self) -> None:
        for name, keys in self.key_encoder.items():
            queries = [parameter.detach() for parameter in getattr(self, name).parameters()]
            torch._foreach_lerp_(list(keys.parameters()), queries, 1 - self.momentum)

    def _enqueue(self, key: _Encoded) -> None:
        self.queue.write(torch.cat(all_gather(key.embedding)))
        if key.dense is None:
            return
        negatives = key.pooled
        if self.negatives == 'sampled':
            cells = key.dense.shape[2] * key.dense.shape[3]
            one = torch.randint(cells, (len(key.dense), 1), device=key.dense.device)
            negatives = _cells_of(key.dense, one)
        self.dense_queue.write(torch.cat(all_gather(negatives.contiguous())))

    def resize_queues(self, size: int) -> None:
        """Give both queues ``size`` keys at most, before any is written."""
        for queue in (self.queue, self.dense_queue):
            queue.keys = queue.keys[:size].clone()


def _cells_of(maps: Tensor, cells: Tensor) -> Tensor:
    """Vectors [N * n, E] of ``maps`` [N, E, S, S] at ``cells`` [N, n]."""
    vectors = maps.flatten(2).transpose(1, 2)
    index = cells[..., None].expand(-1, -1, vectors.shape[2])
    return vectors.gather(1, index).flatten(0, 1)
