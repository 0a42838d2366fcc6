"""Write the synthetic demo set: ``python tools/make_demo_data.py work_dirs/demo/data``."""

import argparse

from mmdet_plugins.common.synthetic import make_demo_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out_dir', help='folder for images/ and instances_{train,val}.json')
    parser.add_argument('--num-train', type=int, default=320)
    parser.add_argument('--num-val', type=int, default=80)
    parser.add_argument('--size-hw', type=int, nargs=2, default=(160, 224), metavar=('H', 'W'))
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--large', action='store_true', help='few objects, all of them large')
    args = parser.parse_args()
    size_hw = tuple(args.size_hw)
    make_demo_data(args.out_dir, args.num_train, args.num_val, size_hw, args.seed, args.large)
    print(f'{args.num_train} + {args.num_val} images in {args.out_dir}')


if __name__ == '__main__':
    main()
