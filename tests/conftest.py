"""What all tests stand on."""

import gc
import os
import signal
import sys
from pathlib import Path

# What starts the tests in the background, or so that they outlive its terminal, has these ignored, also in children.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy and torch read it: small tensors gain nothing from threads

import pytest  # noqa: E402
import torch  # noqa: E402
from commands import ROOT, meanwhile, server  # noqa: E402

import sweep  # noqa: E402
from measure import effects, figures, plans, speed  # noqa: E402
from sources import hdf5, jobs  # noqa: E402

TRIAL = hdf5.probe


def pytest_collection_modifyitems(items):
    """What waits for a run by another process comes last in its file."""
    files = {path: place for place, path in enumerate(dict.fromkeys(item.path for item in items))}
    items.sort(key=lambda item: (files[item.path], "whole" in item.fixturenames))


@pytest.fixture(autouse=True, scope="session")
def faults_at_work(request, tmp_path_factory):
    """What test_faults.py waits for: half a minute of work on another core."""
    folder = tmp_path_factory.mktemp("faults")
    yield from meanwhile(request, "short_form", ROOT / "tests/faults.py", "--short", "--jobs=1", "--json=told.json",
                         "--folder=.", folder=folder)


@pytest.fixture(autouse=True, scope="session")
def jobs_need_not_wait_for_imports(request):
    """In a long session; a short one may have no Job."""
    if len(request.session.items) > 500:
        server()


@pytest.fixture(autouse=True, scope="session")
def without_waiting_for_the_disk():
    """What a test writes need not survive a power cut, and on some machines each fsync takes 20 ms and more."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def files_of_hdf5_are_not_read_twice():
    """The trial by another process costs 50 ms a file, and more the larger this process is; tests of damage bring it
    back (hdf5_on_trial)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hdf5, "probe", lambda file, path: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def the_machine_is_not_measured():
    """At the start of each run of two of the pages: a quarter of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "RATE_SECONDS", 0)
        patch.setattr(speed, "RATE_SIZE", 64)
        yield


@pytest.fixture(autouse=True, scope="module")
def what_is_loaded_is_not_searched_for_garbage():
    """Of a million objects of torch, matplotlib and pytest: a search takes 0.2 s, and goes on all the time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def hdf5_on_trial(monkeypatch):
    monkeypatch.setattr(hdf5, "probe", TRIAL)


@pytest.fixture(autouse=True, scope="session")
def pictures_that_cannot_be_drawn_are_errors():
    """To users they are a line, and the run goes on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "STRICT", True)
        yield


@pytest.fixture(scope="module")
def one_thread():
    """For runs that several tests share: fixtures of a module are made before those of a test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def quickly(in_a_folder_of_its_own, monkeypatch):
    """Without the pictures of apelr and state, which take long."""
    for name in ("draw_loss", "draw_plans"):
        monkeypatch.setattr(plans, name, lambda *args, **options: None)
    monkeypatch.setattr(effects, "plot_metrics", lambda *args, **options: None)


@pytest.fixture
def stand_in_page(in_a_folder_of_its_own, monkeypatch):
    """stand_in_page(text): make train_tiny.py, a page without torch, where the test stands."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(jobs, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(sweep, "comparison", lambda *args: [])
    yield Path("train_tiny.py").write_text
    sys.modules.pop("train_tiny", None)


@pytest.fixture
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    """Stand in an empty folder and compute on one thread, as the subprocesses of the tests do."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    torch.set_num_threads(threads)
