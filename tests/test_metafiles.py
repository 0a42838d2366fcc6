"""The index of models lists every config, each once, and nothing else."""

import re

import yaml
from mmengine.config import Config

from mmdet_plugins.cli import shipped_configs


def load(path):
    return yaml.safe_load(path.read_text(encoding='utf-8'))


def test_model_index_imports_every_metafile(repo):
    listed = load(repo / 'model-index.yml')['Import']
    found = [
        path.relative_to(repo).as_posix() for path in sorted(repo.glob('configs/*/metafile.yml'))
    ]
    assert sorted(listed) == found


def test_metafiles_list_every_config_of_their_folder(repo):
    configs = shipped_configs(repo / 'configs')
    seen = []
    for path in repo.glob('configs/*/metafile.yml'):
        metafile = load(path)
        collections = {collection['Name'] for collection in metafile['Collections']}
        for model in metafile['Models']:
            config = repo / model['Config']
            assert model['Name'] == config.stem and config.is_relative_to(path.parent)
            assert model['In Collection'] in collections
            seen.append(model['Name'])
    assert sorted(seen) == sorted(configs), 'configs/<method>/metafile.yml and the configs differ'


def test_collections_say_paper_readme_and_code(repo):
    for path in repo.glob('configs/*/metafile.yml'):
        for collection in load(path)['Collections']:
            assert collection['Paper']['Title']
            assert (repo / collection['README']).is_file()
            assert (repo / collection['Code']['Path']).exists()


def test_readmes_link_every_config_of_their_folder(repo):
    for path in repo.glob('configs/*/metafile.yml'):
        readme = (path.parent / 'README.md').read_text(encoding='utf-8')
        linked = re.findall(r'\]\(([^)#]+\.py)\)', readme)
        assert sorted(set(linked)) == sorted(config.name for config in path.parent.glob('*.py'))


def test_stated_batch_sizes_are_those_of_the_configs(repo):
    for path in repo.glob('configs/*/metafile.yml'):
        for model in load(path)['Models']:
            cfg = Config.fromfile(repo / model['Config'], import_custom_modules=False)
            name = model['Name']
            batch = (cfg.get('train_dataloader') or cfg.test_dataloader).batch_size
            if 'xb' in name:
                assert f'xb{batch}-' in name, f'{name} takes {batch} images a GPU'
