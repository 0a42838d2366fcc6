"""Every shipped config: its name, its chain of bases, and one training step at reduced size."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import mmseg
import numpy as np
import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import (
    DATASETS,
    HOOKS,
    LOOPS,
    METRICS,
    MODELS,
    TRANSFORMS,
    DefaultScope,
    init_default_scope,
)
from mmengine.structures import InstanceData, PixelData
from mmengine.utils import get_installed_path

from mmdet_plugins.cli import shipped_configs

ROOT = Path(__file__).resolve().parents[1] / 'configs'
LEAVES = shipped_configs(ROOT)
IMAGE_HW = (96, 128)
# method_backbone_neck_batch_data
PATTERN = r'[a-z\d-]+(_[a-z\d-]+){2}_\d+xb\d+-[a-z\d]+_[a-z\d.-]+'
USERS_NAMES = {'cascade_rpn_swinl', 'cascade_rpn_swinl_uvo-finetune'}
# of config folders that are not called as their room is
ROOMS = {
    '_base_': set(),
    'decoupled_solo': {'solo'},
    'solov2': {'solo'},
    'uvo': {'cascade_rpn', 'box_crop'},
}


def by_size(names: Iterator[str]) -> list:
    """Test parameters; the largest backbones are slow, and a stage of one that runs on regions."""
    slow = 'swin-?l|r101|x101|_c4_'
    return [
        pytest.param(name, marks=pytest.mark.slow if re.search(slow, name) else ())
        for name in names
    ]


def assigned(path: Path) -> dict[str, ast.expr]:
    """Names that a config file assigns itself, with their expressions."""
    tree = ast.parse(path.read_text(encoding='utf-8'))
    return {node.targets[0].id: node.value for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}  # fmt: skip


def bases(path: Path) -> list[Path]:
    """Files that a config names as its bases, those of the hosts included."""
    value = ast.literal_eval(assigned(path).get('_base_', ast.Constant([])))
    found = []
    for base in [value] if isinstance(value, str) else value:
        host, _, inner = base.rpartition('::')
        root = Path(get_installed_path(host)) / '.mim' / 'configs' if host else path.parent
        found.append((root / inner).resolve())
    return found


def chain(path: Path) -> list[Path]:
    return [path, *(file for base in bases(path) for file in chain(base))]


def depth(path: Path) -> int:
    return max((1 + depth(base) for base in bases(path)), default=0)


def rooms(path: Path) -> set[str]:
    """The rooms that a config belongs to; none if all may share it."""
    folder = path.relative_to(ROOT).parts[0]
    return ROOMS.get(folder, {folder})


def test_names_are_unique_and_follow_the_pattern():
    stems = [path.stem for path in ROOT.rglob('*.py') if '_base_' not in path.parts]
    assert len(set(stems)) == len(stems) > 0
    for name, path in LEAVES.items():
        if path.parent.name == 'tiny':
            assert re.fullmatch(r'[a-z\d-]+_tiny(_[a-z\d-]+)?', name), name
        else:
            assert name in USERS_NAMES or re.fullmatch(PATTERN, name), name


@pytest.mark.parametrize('name', LEAVES)
def test_chain_is_short_and_registers_once(name):
    path = LEAVES[name]
    assert depth(path) <= 3
    definitions = [file for file in set(chain(path)) if 'custom_imports' in assigned(file)]
    assert len(definitions) == 1, [str(file) for file in definitions]
    imports = Config.fromfile(path, import_custom_modules=False).custom_imports
    assert imports.imports[0] == 'mmdet_plugins.common.runtime'
    assert imports.allow_failed_imports is False
    assert {module.split('.')[1] for module in imports.imports} <= rooms(path) | {'common'}


@pytest.mark.parametrize('path', sorted(ROOT.rglob('*.py')), ids=lambda path: path.stem)
def test_rooms_do_not_inherit_rooms(path):
    for base in bases(path):
        if base.is_relative_to(ROOT):
            assert rooms(base) <= rooms(path), f'{path} inherits {base}'


@pytest.mark.parametrize('path', sorted(ROOT.rglob('*.py')), ids=lambda path: path.stem)
def test_lists_are_not_patched_by_number(path):
    """``pipeline={1: ...}`` changes whatever stands second today."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        for key in node.keys if isinstance(node, ast.Dict) else ():
            assert not (isinstance(key, ast.Constant) and str(key.value).isdigit()), (
                f'{path.name}:{node.lineno} patches a list by number'
            )


def test_mmsegs_runtime_is_mmsegs():
    theirs = Path(mmseg.__file__).parent / '.mim' / 'configs' / '_base_' / 'default_runtime.py'
    ours = Config.fromfile(ROOT / '_base_' / 'mmseg_runtime.py')
    assert ours.to_dict() == Config.fromfile(theirs).to_dict()


def walk(node) -> Iterator[ConfigDict]:
    """Every dict inside a config value, outermost first."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node:
        if isinstance(child, (dict, list, tuple)):
            yield from walk(child)


def without_weights(model: ConfigDict) -> ConfigDict:
    """``model`` with nothing to download."""
    for node in walk(model):
        if node.get('init_cfg'):
            node['init_cfg'] = None
        if node.get('pretrained'):
            node['pretrained'] = False if node['pretrained'] is True else None
    return model


def noise(height: int, width: int) -> torch.Tensor:
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8)


def detection_batch(embed_dims: int | None = None) -> dict:
    """Two images of different size, three objects in the first one and none in the second.

    Objects of a method that learns embeddings have some, of ``embed_dims`` numbers.
    """
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks

    boxes_xyxy = torch.tensor(
        [[5.0, 8.0, 40.0, 90.0], [30.0, 20.0, 120.0, 70.0], [60.0, 3.0, 75.0, 20.0]]
    )
    samples = []
    for shape_hw, gt_xyxy in ((IMAGE_HW, boxes_xyxy), ((80, 96), boxes_xyxy[:0])):
        labels = gt_xyxy.new_zeros(len(gt_xyxy), dtype=torch.long)
        masks = np.zeros((len(gt_xyxy), *shape_hw), np.uint8)
        for mask, (x1, y1, x2, y2) in zip(masks, gt_xyxy.int().tolist(), strict=True):
            mask[y1:y2, x1:x2] = 1
        sample = DetDataSample(
            gt_instances=InstanceData(
                bboxes=gt_xyxy, labels=labels, masks=BitmapMasks(masks, *shape_hw)
            ),
            ignored_instances=InstanceData(bboxes=gt_xyxy[:0], labels=labels[:0]),
            gt_sem_seg=PixelData(sem_seg=torch.zeros(1, *shape_hw, dtype=torch.uint8)),
        )
        if embed_dims:
            sample.gt_instances.embeddings = torch.randn(len(gt_xyxy), embed_dims)
        sample.set_metainfo(dict(img_shape=shape_hw, ori_shape=shape_hw, scale_factor=(1.0, 1.0)))
        samples.append(sample)
    return dict(inputs=[noise(*sample.img_shape) for sample in samples], data_samples=samples)


def segmentation_batch() -> dict:
    from mmseg.structures import SegDataSample

    samples = []
    for _ in range(2):
        labels = torch.zeros(1, *IMAGE_HW, dtype=torch.long)
        labels[:, 20:70, 30:100] = 1
        sample = SegDataSample(gt_sem_seg=PixelData(data=labels))
        sample.set_metainfo(dict(img_shape=IMAGE_HW, ori_shape=IMAGE_HW, pad_shape=IMAGE_HW))
        samples.append(sample)
    return dict(inputs=[noise(*IMAGE_HW) for _ in samples], data_samples=samples)


def two_view_batch() -> dict:
    return dict(
        inputs=torch.stack([torch.stack([noise(96, 96) for _ in range(2)]) for _ in range(2)]),
        frames_xyxy=torch.tensor([[0.0, 0.0, 128.0, 96.0], [120.0, 8.0, 20.0, 80.0]]).repeat(
            2, 1, 1
        ),
    )


@pytest.fixture(scope='module')
def stepped() -> set[str]:
    """Models, with their optimisers, that took a step: schedules and data sets share many."""
    return set()


def take_test_step(cfg: Config) -> None:
    """What a method takes that learns nothing."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        model = MODELS.build(without_weights(cfg.model)).eval()
        model.load_state_dict(model.state_dict())  # it may refuse random weights
        for sample in model.test_step(detection_batch()):
            assert torch.isfinite(sample.pred_instances.scores).all()


@pytest.mark.parametrize('name', by_size(LEAVES))
def test_builds_and_takes_a_training_step(name, tmp_path, monkeypatch, stepped):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    cfg = Config.fromfile(LEAVES[name])
    if not cfg.get('train_dataloader'):
        init_default_scope(cfg.default_scope)
        return take_test_step(cfg)
    model_and_optimiser = str(cfg.model) + str(cfg.optim_wrapper)
    if model_and_optimiser in stepped:
        return
    stepped.add(model_and_optimiser)
    init_default_scope(cfg.default_scope)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        segmenter = cfg.default_scope == 'mmseg'
        if segmenter:
            cfg.model.data_preprocessor.size = IMAGE_HW
        model = revert_sync_batchnorm(MODELS.build(without_weights(cfg.model))).train()
        cfg.optim_wrapper.type = 'OptimWrapper'  # AmpOptimWrapper wants a GPU
        cfg.optim_wrapper.pop('loss_scale', None)
        wrapper = build_optim_wrapper(model, cfg.optim_wrapper)
        before = {key: value.detach().clone() for key, value in model.named_parameters()}
        if segmenter:
            batch = segmentation_batch()
        elif 'TwoViews' in str(cfg.train_dataloader):
            batch = two_view_batch()
        else:
            batch = detection_batch(cfg.model.get('mask_head', {}).get('embed_dims'))
        logged = model.train_step(batch, wrapper)
    assert all(torch.isfinite(value).all() for value in logged.values())
    assert logged['loss'] > 0
    for part, module in model.named_children():
        trained = [key for key, value in module.named_parameters(part) if value.requires_grad]
        state = dict(model.named_parameters())
        moved = [key for key in trained if not torch.equal(before[key], state[key])]
        assert not trained or moved, f'no parameter of {part} was trained'
    assert not list(tmp_path.iterdir()), 'building a config writes nothing'


@pytest.mark.parametrize('name', LEAVES)
def test_every_named_type_is_registered(name):
    cfg = Config.fromfile(LEAVES[name])
    init_default_scope(cfg.default_scope)
    hooks = [*cfg.default_hooks.values(), *cfg.get('custom_hooks', [])]
    wanted = [(HOOKS, hook) for hook in hooks]
    wanted += [(LOOPS, cfg[loop]) for loop in ('train_cfg', 'test_cfg') if cfg.get(loop)]
    for split in ('train', 'val', 'test'):
        if not cfg.get(f'{split}_dataloader'):
            continue
        loader, evaluator = cfg[f'{split}_dataloader'], cfg.get(f'{split}_evaluator') or []
        wanted += [
            (METRICS, one) for one in ([evaluator] if isinstance(evaluator, dict) else evaluator)
        ]
        for node in walk(loader.dataset):
            wanted += [(TRANSFORMS, step) for step in node.get('pipeline', [])]
            wanted += [(DATASETS, node)] if 'pipeline' in node else []
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        for registry, node in wanted:
            with registry.switch_scope_and_registry(node.get('_scope_')) as scoped:
                assert scoped.get(node.get('type', 'EpochBasedTrainLoop')) is not None, node
