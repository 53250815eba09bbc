"""Several ranks: what they must agree on, what happens when one of them ends, and what their environment may be."""

import ctypes
import os
import platform
import re
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from commands import two_ranks

import train_ghmm
from common import checkpoint, ranks, runtime
from common.errors import DataError, InputError, clear_errors
from common.runtime import Runtime
from sources import cell_store, shared

TINY = ("--n_layers=1", "--d_model=16", "--d_mlp=32", "--n_ctx=6", "--batch_size=16", "--max_words=800",
        "--eval_sequences=64", "--device=cpu", "--precision=fp32", "--out_dir=run")


def settings(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"seed": 7, "device": "cpu", "precision": "fp32", "compile": "false", **changes})


def exchange(argv: list[str]) -> None:
    """Both ranks: what rank 0 alone can read, what it cannot, what they have of one thing."""

    def missing():
        raise DataError("no such file")

    with Runtime(settings()) as rt:
        assert rt.from_main(lambda: {"read by": rt.rank}) == {"read by": 0}
        with pytest.raises(DataError, match="no such file"):
            rt.from_main(missing)
        rt.agree(lr=0.1, data={"a": "1"})
        with pytest.raises(InputError) as error:
            rt.agree(lr=0.1, data={"a": str(rt.rank)})
        host = os.uname().nodename
        assert str(error.value).startswith(f"data is not the same on all ranks: {{'a': '0'}} on rank 0 ({host}), "
                                           f"{{'a': '1'}} on rank 1 ({host}). ")


def test_ranks_know_what_rank_0_reads_and_whether_they_have_the_same(tmp_path):
    assert two_ranks("test_ranks", function="exchange", folder=tmp_path) == ""


def test_one_rank_reads_for_itself_and_agrees_with_itself():
    with Runtime(settings()) as rt:
        assert rt.from_main(lambda: 5) == 5
        rt.agree(lr=0.1)


def make_on_disks_of_their_own(argv: list[str]) -> None:
    """The second rank is the first of another machine, whose disk shows nothing of what rank 0 makes."""
    shared.LATE_S, made = 0.2, []
    if os.environ["RANK"] == "1":
        os.environ["LOCAL_RANK"] = "0"
        os.mkdir("elsewhere")
        os.chdir("elsewhere")
    with Runtime(settings()):
        for _ in range(2):
            shared.make_once(Path("data"), lambda: made.append(Path("data").write_text("made")))
    assert len(made) == 1


def test_each_machine_makes_data_that_its_disk_does_not_show(tmp_path):
    assert two_ranks("test_ranks", function="make_on_disks_of_their_own", folder=tmp_path) == ""


def look_on_another_disk(argv: list[str]) -> None:
    """The second rank stands in another folder, and is not the first of its machine."""
    shared.LATE_S = 0.2
    if os.environ["RANK"] == "1":
        os.mkdir("elsewhere")
        os.chdir("elsewhere")
    with clear_errors(), Runtime(settings()) as rt:
        if argv[0] == "file":
            shared.make_once(Path("data"), lambda: Path("data").write_text("made"))
        else:
            if rt.is_main:
                os.makedirs("data/e-0")
            cell_store.wait_for_store("data", "0")
        rt.barrier()


@pytest.mark.parametrize("what", ["file", "cells"])
def test_ranks_of_a_machine_that_see_different_folders_are_told_so(what, tmp_path):
    told = two_ranks("test_ranks", what, function="look_on_another_disk", folder=tmp_path, code=2)
    path = "data" if what == "file" else "data/0"
    assert told.startswith(f"error: {path} did not come into {tmp_path / 'elsewhere'}, ") and told.count("\n") == 1


def wait_for_a_long_analysis(argv: list[str]) -> None:
    """Rank 0 alone is at work for longer than an exchange may take."""
    open_group = dist.init_process_group
    dist.init_process_group = lambda *args, **options: open_group(*args, **options, timeout=timedelta(seconds=1))
    with Runtime(settings()) as rt:
        assert rt.from_main(lambda: time.sleep(1.2) or "results") == "results"
        if rt.is_main:
            time.sleep(1.2)


def test_a_long_analysis_of_rank_0_does_not_run_into_the_timeout_of_exchanges(tmp_path):
    assert two_ranks("test_ranks", function="wait_for_a_long_analysis", folder=tmp_path) == ""


# --------------------------------------------------------------------------------------------- how a job of ranks ends


def train_to_an_end(argv: list[str]) -> None:
    """Both ranks train, until at the twelfth step something happens on one of them: argv is what, and on which."""
    what, whom = argv
    backward, count = Runtime.backward, []
    if what == "killed_elsewhere":  # where no process sees the other's
        platform.node, ranks.NOTICE_SECONDS = lambda: f"host{os.environ['RANK']}", 1.5

    def interrupted(self, loss):
        backward(self, loss)
        count.append(loss)
        if len(count) != 12:
            return
        if self.rank == int(whom):
            globals()[what]()
        elif what == "killed_where_the_other_is_blocked":
            ranks.GRACE_SECONDS = 0.2
            libc = ctypes.CDLL(None)
            while True:
                libc.pause()  # as NCCL waits: in C, whatever signals come

    Runtime.backward = interrupted
    train_ghmm.main([*TINY, "--max_steps=400", "--log_interval=100", "--eval_interval=100", "--save_interval=5"])


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


killed_where_the_other_is_blocked = killed_elsewhere = killed


def differ(argv: list[str]) -> None:
    """Rank 1 has other data, or other settings."""
    if os.environ["RANK"] == "1" and argv[0] == "data":
        train_ghmm.data_of = lambda *args: {"components": "7f3a"}
    elif os.environ["RANK"] == "1":
        argv = [*argv, "--lr=0.5"]
    train_ghmm.main([*TINY, "--max_steps=3", *argv[1:]])


@pytest.mark.parametrize("what, words", [
    ("data", "the fingerprint of the data is not the same on all ranks: {'components': ''} on rank 0 (HOST), "
             "{'components': '7f3a'} on rank 1 (HOST). Give all"),
    ("settings", "lr is not the same on all ranks: 0.003 on rank 0 (HOST), 0.5 on rank 1 (HOST). Give all"),
])  # fmt: skip
def test_ranks_with_other_data_or_settings_are_refused_before_anything_is_written(what, words, tmp_path):
    first, told = two_ranks("test_ranks", what, function="differ", folder=tmp_path, code=2).splitlines()
    assert first == "train_ghmm: mess3, transformer, 3 steps -> run"
    assert told.startswith("error: " + words.replace("HOST", platform.node())), told
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_tasks_of_srun_that_are_no_ranks_are_told_so(environment, capsys):
    environment(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="4")
    assert Runtime(settings()).world_size == 1
    assert capsys.readouterr().err.startswith("note: every task of srun trains a run of its own")
    environment(SLURM_PROCID="1", SLURM_LOCALID="1", WORLD_SIZE="2", MASTER_ADDR="a", MASTER_PORT="1")
    assert Runtime(settings()).rank == 1


def misled() -> None:
    raise DataError("data/mine is not on this disk: copy it")


def edited() -> None:
    raise ZeroDivisionError("an edit")


@pytest.mark.parametrize("agent", [True, False], ids=["torchrun", "alone"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_others_which_name_it_once(rank, agent, tmp_path):
    told = two_ranks("test_ranks", "killed", rank, function="train_to_an_end", folder=tmp_path, agent=agent,
                     code=(-signal.SIGKILL, 1) if rank == 0 else (1, -signal.SIGKILL))
    errors = [line for line in told.splitlines() if not re.match("train_ghmm: |device |process |floor |step ", line)]
    assert len(errors) == 1, told
    who = rf"error: rank {rank} died \({platform.node()}, pid \d+\)"
    assert re.fullmatch(f"{who}: the same command goes on from step 10", errors[0])
    assert checkpoint.load(tmp_path / "run")["step"] == 10


def test_a_rank_that_dies_on_another_machine_is_named_by_its_silence(tmp_path):
    told = two_ranks("test_ranks", "killed_elsewhere", 1, function="train_to_an_end", folder=tmp_path,
                     code=(1, -signal.SIGKILL))
    assert re.search(r"^error: rank 1 died \(host1, pid \d+\): the same command goes on from step 10$", told, re.M)


def test_a_rank_that_is_blocked_when_another_dies_is_ended(tmp_path):
    told = two_ranks("test_ranks", "killed_where_the_other_is_blocked", 1, function="train_to_an_end", folder=tmp_path,
                     code=(1, -signal.SIGKILL))
    assert told.count("error: rank 1 died") == 1 and "Traceback" not in told


@pytest.mark.parametrize("what, rank, code, words", [
    ("misled", 0, 2, ["error: data/mine is not on this disk: copy it"]),
    ("misled", 1, 2, ["error: data/mine is not on this disk: copy it"]),
    ("edited", 1, 1, ["Traceback", "ZeroDivisionError: an edit"]),
])  # fmt: skip
def test_a_rank_that_ends_by_an_error_of_its_own_says_so_and_the_others_end_quietly(what, rank, code, words, tmp_path):
    told = two_ranks("test_ranks", what, rank, function="train_to_an_end", folder=tmp_path, code=code)
    assert [told.count(word) for word in words] == [1] * len(words), told
    assert "died" not in told and "gloo" not in told and told.count("error:") == (code == 2), told


def told_to_stop_before_training(argv: list[str]) -> None:
    train_ghmm.build_process = lambda cfg: os.kill(os.getpid(), signal.SIGTERM)
    train_ghmm.main([*TINY])


def test_ranks_told_to_stop_before_training_end_at_once_and_one_says_so(tmp_path):
    told = two_ranks("test_ranks", function="told_to_stop_before_training", folder=tmp_path, code=128 + signal.SIGTERM)
    assert told.splitlines()[1:] == ["stopped by SIGTERM"] and list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------ the environment of a job


@pytest.mark.parametrize("variables, words", [
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is no number"),
    ({"WORLD_SIZE": "-1"}, "WORLD_SIZE=-1 is no number"),
    ({"RANK": "1"}, "RANK=1 with WORLD_SIZE=1, where ranks are below"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 without RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT: start ranks by torchrun"),
    ({"WORLD_SIZE": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "MASTER_PORT": "1"}, "without MASTER_ADDR: start"),
    ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, "RANK=2 with"),
    ({"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "PORT=x is no"),
    ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
     "nobody answers at MASTER_ADDR and MASTER_PORT, localhost:1, within 0.1 s"),
])  # fmt: skip
def test_an_environment_that_is_of_no_job_is_one_sentence(variables, words, environment, capsys, monkeypatch):
    monkeypatch.setattr(ranks, "JOIN_SECONDS", 0.1)
    environment(**variables)
    with pytest.raises(SystemExit), Runtime(settings()):
        pass
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("error: ") and words in told[0]


@pytest.fixture
def environment(monkeypatch):
    """environment(NAME=value): these variables, and no other that says anything of ranks."""

    def set_all(**variables):
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "SLURM_LOCALID")
        for name in names:
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(ranks, "_job", {})

    return set_all


@pytest.mark.parametrize("agent", [True, False])
def test_ranks_that_never_come_are_one_sentence(agent, environment, capsys, monkeypatch):
    monkeypatch.setattr(ranks, "JOIN_SECONDS", 0.1)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    port, job = str(store.port), {"WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}
    if agent:
        job["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    else:
        del store
    environment(**job, MASTER_PORT=port)
    with pytest.raises(SystemExit) as end, Runtime(settings()):
        pass
    told, = capsys.readouterr().err.splitlines()
    assert end.value.code == 1
    assert told.startswith("error: 1 of 4 ranks came within 0.1 s, not rank 1, rank 2, rank 3: start as many")
    assert torch.tensor(1e-40) > 0  # a run that did not begin leaves denormal numbers as they were


@pytest.mark.parametrize("attempt, words", [("0", "a rank 0 is there already: give every process a RANK of its own"),
                                            ("1", "1 of 2 ranks came within 0.1 s, not rank 1: start as many as")])
def test_a_rank_that_is_there_twice_is_told_so_and_one_started_again_is_not(attempt, words, environment, capsys,
                                                                            monkeypatch):
    monkeypatch.setattr(ranks, "JOIN_SECONDS", 0.1)
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT=str(store.port),
                TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT=attempt)
    dist.PrefixStore("group 1", dist.PrefixStore("attempt 0", store)).add("came 0", 1)
    with pytest.raises(SystemExit), Runtime(settings()):
        pass
    told, = capsys.readouterr().err.splitlines()
    assert told.startswith(f"error: {words}")


def test_a_port_that_is_taken_is_one_sentence(environment, capsys):
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        environment(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="localhost", MASTER_PORT=port)
        with pytest.raises(SystemExit), Runtime(settings()):
            pass
    told, = capsys.readouterr().err.splitlines()
    assert "(another program is there): set another MASTER_PORT" in told


@pytest.mark.parametrize("asked, count, local_rank, found", [
    ("cuda", 8, 3, "cuda:3"), ("auto", 8, 0, "cuda:0"), ("cuda", 1, 3, "cuda:0"), ("cuda:5", 8, 3, "cuda:5"),
    ("cuda", 2, 3, "cuda:3 does not exist: there are 2"), ("cuda:1", 1, 0, "cuda:1 does not exist: there are 1"),
])  # fmt: skip
def test_each_rank_takes_the_gpu_of_its_number_or_the_one_it_is_shown(asked, count, local_rank, found, monkeypatch,
                                                                      capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    try:
        assert str(runtime._pick_device(asked, local_rank)) == found
    except SystemExit as end:
        assert end.code == 2 and found in capsys.readouterr().err


def shown_one_gpu(argv: list[str]) -> None:
    """Ranks of a machine that all compute on GPU 0, of which there is no need here."""
    gpu = SimpleNamespace(uuid="GPU-1f2e" if argv[0] == "the same" else os.environ["RANK"])
    runtime._pick_device = lambda *asked: torch.device("cuda:0")
    torch.cuda.get_device_properties = lambda device: gpu
    for name in ("set_device", "synchronize"):
        setattr(torch.cuda, name, lambda *device: None)
    dist.init_process_group = lambda *args, **options: None
    dist.barrier = lambda: None
    with Runtime(settings()) as rt:
        print(rt.device)


def test_ranks_that_would_share_a_gpu_are_refused_and_those_shown_one_each_are_not(tmp_path):
    told, = two_ranks("test_ranks", "the same", function="shown_one_gpu", folder=tmp_path, code=2).splitlines()
    assert told == (f"error: ranks 0, 1 of {platform.node()} would share one GPU: use device=cuda, and start as many "
                    "ranks as there are GPUs")
    assert two_ranks("test_ranks", "another", function="shown_one_gpu", folder=tmp_path) == "cuda:0\n" * 2
