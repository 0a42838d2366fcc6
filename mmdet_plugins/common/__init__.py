"""Pieces that need the OpenMMLab stack and serve two rooms or more."""
