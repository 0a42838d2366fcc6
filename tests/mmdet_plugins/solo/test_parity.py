"""Ours against mmdet's heads with the same weights: losses, gradients, detections."""

import copy

import pytest
import torch

from .conftest import HEADS
