"""Open-world, label-free and high-quality instance segmentation for MMDetection 3.x.

Importing this package registers nothing: a config names the rooms it needs in ``custom_imports``.
"""

__version__ = '0.1.0'
