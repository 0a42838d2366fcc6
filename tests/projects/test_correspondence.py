"""The picture of matches between two views."""

import cv2
import numpy as np
import pytest
import torch

CONFIG = 'configs/densecl/tiny/densecl_tiny_demo.py'


@pytest.fixture
def tool(load_script):
    return load_script('projects/densecl/correspondence.py')


def test_matches_by_hand(tool):
    """A view of 2 x 2 cells with four directions, and its right half, stretched to both columns."""
    first = torch.eye(4).view(1, 4, 2, 2)  # channels are cells
    second = torch.tensor([[0.0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 1, 2], [0, 0, 0, 1]])
    second = second.T.reshape(1, 4, 2, 2)
    frames = torch.tensor([[0.0, 0.0, 20.0, 20.0], [10.0, 0.0, 20.0, 20.0]])
    found = list(tool.matches_of(first, second, frames, 0.4))
    assert found == [(0, 1, 'hidden'), (1, 0, 'wrong'), (3, 3, 'right')]
    found = list(tool.matches_of(first, second, frames, 0.9))  # the second one's is 0.71
    assert found == [(0, 1, 'hidden'), (3, 3, 'right')]


def test_lines_end_in_the_middle_of_their_cells(tool):
    picture = tool.draw(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), [(1, 2, 'right')], 2, '')
    assert picture.shape == (tool.SHOWN + 32, 2 * tool.SHOWN + 16, 3)
    quarter = tool.SHOWN // 4
    for x, y in ((3 * quarter, quarter + 32), (tool.SHOWN + 16 + quarter, 3 * quarter + 32)):
        assert tuple(picture[y, x]) == tool.COLOURS['right']
        assert tuple(picture[y + 8, x - 8]) == (0, 0, 0)


def test_a_picture_of_two_models_and_an_image(tool, repo, tmp_path, capsys):
    rng = np.random.default_rng(0)
    image = cv2.resize(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8), (160, 120))
    cv2.imwrite(str(tmp_path / 'image.png'), image)
    arguments = [str(repo / CONFIG), str(tmp_path / 'out.png'), '--threshold', '-1']
    arguments += ['--image', str(tmp_path / 'image.png'), '--checkpoint', 'random']
    tool.main([*arguments, '--checkpoint', 'random'])
    assert cv2.imread(str(tmp_path / 'out.png')).shape == (2 * (tool.SHOWN + 32), 912, 3)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0] == lines[1] and ' matches, ' in lines[0]
    with pytest.raises(SystemExit, match='cannot be read as an image'):
        tool.main([*arguments, '--image', str(tmp_path / 'none.png')])
