"""The README's configs for a data set of one's own, written out and used."""

import re

import mmdet.utils
import mmseg.utils
import pytest
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from mmdet_plugins.common.synthetic import make_demo_data

HOSTS = {'my_detector.py': mmdet.utils, 'my_segmenter.py': mmseg.utils}


@pytest.mark.parametrize('name', HOSTS)
def test_configs_for_ones_own_json(repo, tmp_path, monkeypatch, name):
    text = (repo / 'README.md').read_text(encoding='utf-8')
    (body,) = re.findall(rf'```python\n# {name}\n(.*?)```', text, re.DOTALL)
    (tmp_path / name).write_text(body)
    (tmp_path / 'configs').symlink_to(repo / 'configs')
    make_demo_data(tmp_path / 'my', num_train=6, num_val=4)
    for split in ('train', 'val'):
        (tmp_path / f'my/instances_{split}.json').rename(tmp_path / f'my/{split}.json')
    monkeypatch.chdir(tmp_path)

    HOSTS[name].register_all_modules(init_default_scope=False)
    config = Config.fromfile(name)
    with DefaultScope.overwrite_default_scope(config.default_scope):
        for split in ('train', 'val', 'test'):
            loader = config[f'{split}_dataloader']
            loader.update(num_workers=0, persistent_workers=False)
            batch = next(iter(Runner.build_dataloader(loader, seed=0)))
            assert 'my/images/' in batch['data_samples'][0].img_path
