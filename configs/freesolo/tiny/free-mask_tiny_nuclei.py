"""Coarse masks of tiles of nuclei, enlarged until each covers several cells of the features.

Nuclei look alike, and a query of one is like them all: of a mask the piece that the query lies in
is kept.
"""

_base_ = './free-mask_tiny_demo.py'

model = dict(free_mask=dict(connected=True))
