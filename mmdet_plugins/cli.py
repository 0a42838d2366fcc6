"""The ``mminstance`` command: finds the configs that the package ships, from any folder.

``mim train mmdet $(mminstance config cascade_rpn_swinl)`` works in a checkout and after
``pip install``. Nothing heavier than the standard library is imported.
"""

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

CONFIG_ROOT = Path(__file__).resolve().parent / '.mim' / 'configs'


def shipped_configs(root: Path = CONFIG_ROOT) -> dict[str, Path]:
    """Name without suffix -> path of each runnable config; ``_base_`` folders hold fragments."""
    root = root.resolve()
    paths = sorted(p for p in root.rglob('*.py') if '_base_' not in p.relative_to(root).parts)
    return {path.stem: path for path in paths}


def find_config(name: str, root: Path = CONFIG_ROOT) -> Path:
    """Path of the shipped config called ``name``; folders and the suffix in ``name`` are optional.

    Raises:
        LookupError: there is none; the message holds the nearest names.
    """
    configs = shipped_configs(root)
    stem = name.replace('\\', '/').rsplit('/', 1)[-1].removesuffix('.py')
    if stem in configs:
        return configs[stem]
    near = difflib.get_close_matches(stem, configs, n=5, cutoff=0.4)
    near += [other for other in configs if stem and stem in other and other not in near]
    hint = 'did you mean ' + ', '.join(near[:8]) if near else 'see mminstance config --list'
    raise LookupError(f'no config called {stem!r} among the {len(configs)} in {root}: {hint}')


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog='mminstance', description='Plug-ins for mmdet and mmseg')
    commands = parser.add_subparsers(dest='command', required=True)
    config = commands.add_parser('config', help='print the path of a shipped config')
    wanted = config.add_mutually_exclusive_group(required=True)
    wanted.add_argument('name', nargs='?', help='its file name, with or without .py')
    wanted.add_argument('--list', action='store_true', help='print the name of every config')
    args = parser.parse_args(argv)
    if args.list:
        print('\n'.join(shipped_configs()))
        return 0
    try:
        print(find_config(args.name))
    except LookupError as error:
        print(f'mminstance: {error.args[0]}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
