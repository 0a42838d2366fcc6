"""Sort the objects that were found by their embeddings, and write a page of each sort.

    python projects/freesolo/clusters.py STORE --images photographs/ --clusters 20

STORE is a finished store of pseudo-labels, or a pseudo-label file with its embeddings beside it.
"""

import argparse
import sys

from mmdet_plugins.freesolo.clusters import write_clusters


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('store')
    parser.add_argument('--images', required=True, help='folder that file names are relative to')
    parser.add_argument('--clusters', type=int, default=20, help='how many (default: 20)')
    parser.add_argument('--out', default='clusters.html', help='the page (default: %(default)s)')
    parser.add_argument('--json', help='also write the labels, a category for each cluster')
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args(arguments)
    try:
        found = write_clusters(
            args.store, args.images, args.out, args.clusters, args.json, seed=args.seed
        )
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f'{args.out}: {len(found.labels)} objects in {len(found.sizes)} clusters')
    return 0


if __name__ == '__main__':
    sys.exit(main())
