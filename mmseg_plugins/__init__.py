"""Box-to-mask segmentation for MMSegmentation 1.x.

Importing this package registers nothing: a config names the rooms it needs in ``custom_imports``.
"""
