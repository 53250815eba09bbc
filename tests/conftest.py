"""What all tests of a train script stand on."""

import pytest
import torch


@pytest.fixture
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Stand in an empty folder and compute on one thread, as the subprocesses of the tests do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    torch.set_num_threads(threads)
