import os
import stat

import pytest

from mmdet_plugins.common.files import atomic_write


def test_replaces_the_file_only_when_complete(tmp_path):
    path = tmp_path / 'new_folder' / 'a.json'
    with atomic_write(path) as file:
        file.write('first ä')
        file.flush()
        assert not path.exists()
    assert path.read_bytes() == 'first ä'.encode()

    with atomic_write(path, 'wb') as file:
        file.write(b'second')
    assert path.read_bytes() == b'second'


def test_a_failure_keeps_the_old_file_and_leaves_nothing_behind(tmp_path):
    path = tmp_path / 'a.json'
    path.write_text('old')
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as file:
        file.write('half of the n')
        raise KeyboardInterrupt
    assert path.read_text() == 'old'
    assert os.listdir(tmp_path) == ['a.json']


def test_permissions_are_those_of_an_ordinary_new_file(tmp_path):
    with atomic_write(tmp_path / 'a') as file:
        file.write('a')
    (tmp_path / 'b').write_text('b')
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in 'ab'}
    assert modes['a'] == modes['b']


def test_refuses_a_mode_that_could_not_be_atomic(tmp_path):
    with pytest.raises(ValueError, match="not 'a'"), atomic_write(tmp_path / 'a', 'a'):
        pass
