"""common/runtime.py: randomness, precision, signals, and training on several ranks.

One run of `rank_main` in two ranks serves all tests on ranks: it leaves what each rank saw.
"""

import contextlib
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from commands import two_ranks
from comparison import unequal

import bench
import prepare_data
import sample
import sweep
import train_apelr
import train_arxiv
import train_ghmm
import train_state
from common import checkpoint, runlog, runtime
from common.errors import (
    STOPS,
    InputError,
    Stopped,
    clear_errors,
    exit_code,
    machine_memory,
    stop_now,
    system_sentence,
)
from common.products import exact
from common.runtime import STOP_CHECK_STEPS, Meter, Runtime

ROOT = Path(__file__).resolve().parents[1]
TINY = ("--n_layers=1", "--d_model=16", "--d_mlp=32", "--n_ctx=6", "--batch_size=16", "--max_words=800",
        "--eval_sequences=64", "--device=cpu", "--precision=fp32")
# Not the transformer: the gradient of its key biases is 0, and AdamW makes steps of the rounding error.
FIVE = (*TINY, "--model=gru", "--max_steps=5", "--warmup_steps=0", "--log_interval=1")
LONG = (*TINY, "--max_steps=140", "--carry_state=true", "--log_interval=1", "--eval_interval=30", "--save_interval=7",
        "--out_dir=run")
TIMED = {"time_s", "step/tokens_per_second", "cum/tokens_per_second"}


@pytest.fixture(autouse=True)
def one_thread_and_no_pictures(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(train_ghmm, "plot_run", lambda *args, **options: None)
    yield
    torch.set_num_threads(threads)


def settings(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"seed": 7, "device": "cpu", "precision": "fp32", "compile": "false", **changes})


def as_rank(rank: int, world_size: int, **changes) -> Runtime:
    """A runtime that believes to be one of several ranks."""
    rt = Runtime(settings(**changes))
    rt.rank, rt.world_size, rt.is_main = rank, world_size, rank == 0
    return rt


def small_config(**changes) -> train_ghmm.Config:
    tiny = {"n_layers": 1, "d_model": 16, "d_mlp": 32, "n_ctx": 6, "batch_size": 16, "device": "cpu",
            "precision": "fp32"}
    return train_ghmm.Config(**{**tiny, **changes})


def gradients(rt: Runtime, micro_steps: int) -> dict[str, torch.Tensor]:
    """The gradient of the first batch's loss, summed up over micro-steps as the training loop does."""
    cfg = small_config()
    process = train_ghmm.build_process(cfg)
    rt.reseed()
    model = train_ghmm.build_model(cfg, process.vocab_size)
    trained = rt.wrap(model)
    for i, part in enumerate(train_ghmm.Batches(rt, process, cfg)(0).chunk(micro_steps)):
        with rt.sync(trained, last=i == micro_steps - 1):
            logits, _ = trained(part[:, :-1])
            rt.backward(train_ghmm.next_token_loss(logits, part[:, 1:]) / micro_steps)
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_close(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=tolerance, atol=tolerance,
                                   msg=lambda text, name=name: f"{name}: {text}")


def trained_state(folder: Path) -> dict:
    state = checkpoint.load(folder)
    return {key: state[key] for key in ("step", "best", "model", "optimizer", "ranks", "extra")}


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]


# --------------------------------------------------------------------------------------------------- random numbers


def test_the_same_counter_always_opens_the_same_stream():
    draws = [torch.rand(8, generator=Runtime(settings()).generator(3, 4)) for _ in range(2)]
    assert torch.equal(*draws)


def test_drawing_from_other_generators_does_not_move_a_stream():
    rt = Runtime(settings())
    before = torch.rand(8, generator=rt.generator(3))
    torch.rand(5)
    torch.rand(5, generator=rt.generator(2))
    np.random.rand(3)
    assert torch.equal(before, torch.rand(8, generator=rt.generator(3)))


def test_streams_of_neighbouring_seeds_and_counters_differ():
    seeds = {Runtime(settings(seed=seed)).generator(*counter).initial_seed()
             for seed in range(20) for counter in [(step,) for step in range(1, 50)] + [(1, 2), (2, 1), (3, 3)]}
    assert len(seeds) == 20 * 52


def test_counters_of_different_lengths_open_different_streams():
    rt = Runtime(settings())
    counters = [(), (0,), (0, 0), (5,), (5, 0), (0, 5)]
    assert len({rt.generator(*counter).initial_seed() for counter in counters}) == len(counters)


def test_seeds_of_more_than_32_bits_do_not_run_into_the_counter():
    small, large = Runtime(settings(seed=5)), Runtime(settings(seed=5 + (7 << 32)))
    assert small.generator(7, 3).initial_seed() != large.generator(3).initial_seed()


def test_reseed_makes_initial_weights_a_function_of_the_seed_alone():
    weights = []
    for seed, rank in ((7, 0), (7, 1), (8, 0)):
        rt = as_rank(rank, 2, seed=seed)
        torch.rand(rank + 3)
        rt.reseed()
        weights.append(torch.nn.Linear(4, 4).weight.detach().clone())
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


# ----------------------------------------------------------------------------------------------------------- batches


def batches(rank: int = 0, world_size: int = 1, seed: int = 7, **changes) -> train_ghmm.Batches:
    cfg = small_config(seed=seed, **changes)
    return train_ghmm.Batches(as_rank(rank, world_size, seed=seed), train_ghmm.build_process(cfg), cfg)


def test_a_batch_is_a_pure_function_of_seed_and_step():
    draw, other = batches(), batches()
    expected = {step: draw(step) for step in (0, 1, 2, 50)}
    for step in (50, 1, 0, 2, 1):  # in any order, any number of times
        assert torch.equal(other(step), expected[step])
    assert expected[0].shape == (16, 7)
    found = (*expected.values(), batches(seed=8)(0), batches(seed=8)(1))
    distinct = {tuple(tokens.flatten().tolist()) for tokens in found}
    assert len(distinct) == 6


@pytest.mark.parametrize("carry_state", [False, True])
@pytest.mark.parametrize("process", ["mess3", "tom_quantum"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_shares_of_ranks_partition_the_global_batch(world_size, process, carry_state):
    whole = batches(process=process, carry_state=carry_state)
    ranks = [batches(rank, world_size, process=process, carry_state=carry_state) for rank in range(world_size)]
    for step in range(3):
        shares = [draw(step) for draw in ranks]
        assert {len(share) for share in shares} == {16 // world_size}
        assert torch.equal(torch.stack(shares, 1).flatten(0, 1), whole(step))


def test_carry_state_continues_each_sequence_where_the_last_batch_left_it():
    draw = batches(process="zero_one_random", p=1.0, carry_state=True)  # 0, 1, 1, over and over
    stream = torch.cat([draw(step) for step in range(4)], 1)
    assert torch.equal(stream[:, 3:], stream[:, :-3]) and (stream.sum(1) > 0).all()
    fresh = batches(process="zero_one_random", p=1.0)
    stream = torch.cat([fresh(step) for step in range(4)], 1)
    assert not torch.equal(stream[:, 3:], stream[:, :-3])


# ------------------------------------------------------------------------------------------------ device, precision


@pytest.mark.parametrize("changes, words", [
    ({"device": "toaster"}, "device=toaster is unknown"),
    ({"precision": "fp16"}, "precision=fp16 needs a GPU"),
])  # fmt: skip
def test_what_the_machine_lacks_is_one_error_line_and_exit_code_2(changes, words, capsys):
    with pytest.raises(SystemExit) as exit_:
        Runtime(settings(**changes))
    errors = capsys.readouterr().err.splitlines()
    assert exit_.value.code == 2 and len(errors) == 1 and errors[0].startswith("error: ") and words in errors[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_cuda_on_a_machine_without_it_is_exit_code_2(capsys):
    with pytest.raises(SystemExit) as exit_:
        Runtime(settings(device="cuda"))
    assert exit_.value.code == 2 and "device=cpu" in capsys.readouterr().err


def test_only_the_first_rank_of_a_machine_prints_such_an_error(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(SystemExit) as exit_:
        Runtime(settings(precision="fp16"))
    assert exit_.value.code == 2 and capsys.readouterr().err == ""


def is_flushed() -> bool:
    """Whether this thread takes numbers too small for all their digits as 0."""
    return float(torch.full((64,), 1e-30).mul(1e-10).max()) == 0


def test_a_run_has_the_precision_of_products_that_was_asked_for_and_no_denormals():
    other = torch.get_float32_matmul_precision()
    assert not is_flushed()
    for asked in ("highest", "high", "medium"):
        with Runtime(settings(matmul_precision=asked, precision="bf16")) as rt:
            assert torch.get_float32_matmul_precision() == ("medium" if exact() else asked) and is_flushed()
            full = " (of full precision here)" if asked != "highest" else ""
            assert f"float32 products {asked}{f'{full} by oneDNN' if exact() else ''} |" in rt.describe()
        assert torch.get_float32_matmul_precision() == other and not is_flushed()
    with Runtime(settings()) as rt:  # of a copy of an older page
        assert "float32 products highest" in rt.describe()


def test_autocast_computes_in_the_precision_that_was_asked_for():
    x, y = torch.randn(4, 4), torch.randn(4, 4)
    found = {}
    for precision in ("fp32", "bf16"):
        with Runtime(settings(precision=precision)).autocast():
            found[precision] = (x @ y).dtype
    assert found == {"fp32": torch.float32, "bf16": torch.bfloat16}


def test_compile_is_off_on_the_cpu_unless_asked_for():
    assert [Runtime(settings(compile=value)).compile for value in ("auto", "false", "true")] == [False, False, True]


def test_the_gradient_norm_is_reported_before_clipping_and_zero_does_not_clip():
    moved = {}
    for limit in (0.0, 0.5):
        rt, weight = Runtime(settings()), torch.nn.Parameter(torch.zeros(4))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        rt.backward((weight * torch.tensor([3.0, 0.0, 4.0, 0.0])).sum())
        assert float(rt.step(optimizer, [weight], limit, 1.0)) == pytest.approx(5)
        moved[limit] = float(weight.detach().norm())
    assert moved == {0.0: pytest.approx(5), 0.5: pytest.approx(0.5, rel=1e-4)}


# ------------------------------------------------------------------------------------------------- signals, checks


def handlers() -> list:
    return [signal.getsignal(number) for number in STOPS]


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_asks_to_stop_and_leaving_the_runtime_restores_the_handlers(number, capfd):
    before = handlers()
    with Runtime(settings()) as rt:
        assert handlers() == before  # nothing is lost by stopping before training
        rt.take_signals()
        assert handlers() != before and not rt.stopping(1)
        os.kill(os.getpid(), number)
        assert rt.stopping(1) and rt.stopping(2)
    assert handlers() == before
    assert capfd.readouterr().err == f"{number.name}: stopping after this step; again to end now\n"


def test_a_hang_up_that_nohup_has_off_stays_off():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Runtime(settings()) as rt, contextlib.suppress(KeyboardInterrupt):
        rt.take_signals()
        os.kill(os.getpid(), signal.SIGHUP)
        assert not rt.stopping(1)
        stop_now(signal.SIGTERM, None)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    assert signal.signal(signal.SIGHUP, before) == signal.SIG_IGN


@pytest.mark.parametrize("first", STOPS)
@pytest.mark.parametrize("second", STOPS)
def test_a_second_signal_of_any_kind_stops_at_once(first, second, monkeypatch):
    monkeypatch.setattr(runtime, "ECHO_SECONDS", 0)
    with pytest.raises(Stopped) as stopped, Runtime(settings()) as rt:
        rt.take_signals()
        os.kill(os.getpid(), first)
        assert rt.stopping(1)
        os.kill(os.getpid(), second)
        rt.synchronize()
    assert exit_code(stopped.value) == 128 + second


def test_the_echo_of_a_signal_changes_nothing(capfd):
    """A scheduler that signals all processes of a job signals torchrun too, which passes it on."""
    with Runtime(settings()) as rt:
        rt.take_signals()
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert rt.stopping(1)
    assert capfd.readouterr().err.count("\n") == 1


def test_a_signal_names_what_it_waits_for(capfd):
    with Runtime(settings()) as rt:
        rt.take_signals()
        meter = Meter(rt, 1, began=time.perf_counter())
        for step in (10, 20, 99, 100):
            rt.due(step, 100, 10, 20, None)
            rt.stop_signal = None
            os.kill(os.getpid(), signal.SIGTERM)
            meter.start(step)
        rt.doing = "this step"
        rt.from_main(lambda: "the best weights")
        rt.stop_signal = None
        os.kill(os.getpid(), signal.SIGTERM)
    told = [line.split(";")[0] for line in capfd.readouterr().err.splitlines()]
    assert told == ["SIGTERM: stopping after " + what
                    for what in ("this step", "this evaluation", "this step", "the analysis", "the analysis")]


def test_handlers_are_restored_after_an_error_too():
    before = handlers()
    with pytest.raises(ZeroDivisionError), Runtime(settings()) as rt:
        rt.take_signals()
        assert 1 / 0
    assert handlers() == before


def test_a_thread_can_hold_a_runtime_without_touching_signals():
    before, seen = handlers(), []

    def work():
        with Runtime(settings()) as rt:
            rt.take_signals()
            seen.append(handlers())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]


def signalled(monkeypatch, module, name: str, *numbers: int) -> None:
    """Let these signals come when a function of a module is called, which then goes on."""
    function = getattr(module, name)

    def disturbed(*args, **options):
        for number in numbers:
            os.kill(os.getpid(), number)
        return function(*args, **options)

    monkeypatch.setattr(module, name, disturbed)


@pytest.mark.parametrize("module, name, words", [
    (train_ghmm, "build_process", ()), (train_arxiv, "open_data", ()), (train_apelr, "open_data", ()),
    (train_state, "open_data", ()), (prepare_data, "configure", ("text",)), (bench, "print", ("ghmm",)),
    (sample, "run_named", ("out/none",)), (sweep, "import_page", ("train_ghmm.py",)),
], ids=lambda value: getattr(value, "__name__", None))  # fmt: skip
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_before_it_trains_and_in_other_commands_a_signal_ends_all_at_once(module, name, words, number, tmp_path, capfd,
                                                                           monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "print", print, raising=False)
    signalled(monkeypatch, module, name, number)
    before = handlers()
    with pytest.raises(SystemExit) as end:
        module.main(list(words))
    assert end.value.code == 128 + number and handlers() == before
    assert capfd.readouterr().err == ("stopped\n" if number == signal.SIGINT else "stopped by SIGTERM\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", STOPS)
def test_a_signal_that_comes_while_an_object_is_finalised_is_not_lost(number, capsys):
    class Finalised:
        def __del__(self):
            os.kill(os.getpid(), number)
            time.sleep(0.001)  # here the handler raises, which Python passes over

    with pytest.raises(SystemExit) as end, clear_errors():
        Finalised()
        time.sleep(5)
        pytest.fail("the signal is lost")
    word = "stopped" if number == signal.SIGINT else f"stopped by {number.name}"
    assert (end.value.code, capsys.readouterr().err) == (128 + number, f"{word}\n")


def test_a_signal_in_the_analysis_waits_for_it_and_a_second_one_ends_it(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runtime, "ECHO_SECONDS", 0)
    with monkeypatch.context() as patch:
        signalled(patch, train_ghmm, "finish", signal.SIGTERM, signal.SIGINT)
        with pytest.raises(SystemExit) as end:
            train_ghmm.main([*FIVE, "--out_dir=run"])
    told = capfd.readouterr().err.splitlines()
    assert end.value.code == 130 and told[0] == "SIGTERM: stopping after the analysis; again to end now"
    assert len(told) == 2 and "step 5" in told[1]
    assert not (tmp_path / "run" / "summary.json").exists() and checkpoint.load(tmp_path / "run")["step"] == 5
    signalled(monkeypatch, train_ghmm, "finish", signal.SIGTERM)
    assert train_ghmm.main([*FIVE, "--out_dir=run"])["steps"] == 5
    assert (tmp_path / "run" / "summary.json").exists()


def meter_on(units: int = 1, state: dict | None = None) -> Meter:
    return Meter(Runtime(settings()), units, began=time.perf_counter(), state=state)


def test_the_meter_names_the_first_bad_step_and_the_broken_parameter():
    model, meter = torch.nn.Linear(2, 2), meter_on()
    for step, loss in enumerate((1.0, 2.0, float("inf"), float("nan"), 1.0)):
        meter.check(step, torch.tensor(loss))
    with pytest.raises(FloatingPointError, match=r"step 2 .*all parameters are still finite"):
        meter.pause(4, model, 0.1)
    model.bias.data[0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"step 2 .*lr = 0\.1.*1 parameters .*bias"):
        meter.pause(4, model, 0.1)


def test_the_meter_lets_finite_losses_pass():
    meter = meter_on()
    meter.check(1, torch.tensor(1e30))
    meter.pause(1, torch.nn.Linear(2, 2), 0.1)


def test_the_meter_counts_laps_and_nothing_between_them(monkeypatch):
    meter, model, clock = meter_on(units=10), torch.nn.Linear(2, 2), iter([10.0, 12.0, 100.0, 101.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    meter.start(0)
    assert meter.pause(5, model, 0.1) == 25
    meter.start(5)
    assert meter.pause(6, model, 0.1) == 10
    assert (meter.seconds, meter.units) == (3.0, 60)


def test_the_meter_goes_on_from_a_checkpoint_in_the_middle_of_a_mean():
    meter = meter_on()
    meter.add({"loss": torch.tensor(1.0)})
    meter.add({"loss": torch.tensor(2.0)})
    meter.seconds, meter.units, meter.began = 4.0, 80, meter.began - 100
    later = meter_on(state={"meter": meter.state()})
    later.add({"loss": torch.tensor(6.0)})
    assert later.read() == {"loss": 3.0}
    assert (later.seconds, later.units) == (4.0, 80)
    assert 100 <= time.perf_counter() - later.began < 110
    assert meter_on(state={}).state()["since"] == {}  # of an older checkpoint


# ------------------------------------------------------------------------------------------------------- micro-steps


def test_four_micro_steps_give_the_gradient_of_one_step():
    with Runtime(settings()) as rt:
        assert_close(gradients(rt, 4), gradients(rt, 1), 1e-6)


def test_one_times_64_trains_like_four_times_16(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, micro_steps in (("one", 1), ("four", 4)):
        train_ghmm.main([*FIVE, "--batch_size=64", f"--grad_accum={micro_steps}", f"--out_dir={name}"])
    one, four = (checkpoint.load(tmp_path / name)["model"] for name in ("one", "four"))
    assert_close(four, one, 2e-6)
    losses = [[r["loss/step"] for r in metrics(tmp_path / name) if r["split"] == "train"] for name in ("one", "four")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5) and len(losses[0]) == 5


# ------------------------------------------------------------------------------------------------------------- logs


def test_a_long_log_goes_on_in_a_new_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runlog, "LOG_BYTES", 500)
    train_ghmm.main([*FIVE, "--out_dir=run"])
    old, new = (tmp_path / "run" / "train.log.1").read_text(), (tmp_path / "run" / "train.log").read_text()
    assert len(old) > 500 > len(new) and "done: mess3" in old + new and "all of it in run/report.html" in new


def test_wandb_settings_come_from_the_environment_or_a_dotenv_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    assert runlog._dotenv("WANDB_PROJECT") is None
    (tmp_path / ".env").write_text("# mine\nOTHER=1\nexport WANDB_PROJECT='beliefs'\n")
    assert runlog._dotenv("WANDB_PROJECT") == "beliefs"
    monkeypatch.setenv("WANDB_PROJECT", "asked")
    assert runlog._dotenv("WANDB_PROJECT") == "asked"


# ---------------------------------------------------------------------------------------------------------- two ranks


@contextlib.contextmanager
def one_group_for_all():
    """Let many Runtimes share one process group."""
    open_group, close_group = dist.init_process_group, dist.destroy_process_group
    dist.init_process_group = lambda *args, **options: dist.is_initialized() or open_group(*args, **options)
    dist.destroy_process_group = dist.barrier
    yield
    dist.destroy_process_group = close_group


def rank_main(argv: list[str]) -> None:
    """What each rank does; its findings go to out/rank_N.pt."""
    out = Path(argv[0])
    out.mkdir(exist_ok=True)
    os.chdir(out)
    train_ghmm.plot_run = lambda *args, **options: None
    found, written = {}, []

    def watch_writes(event, args):
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.link") or (
            event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"))
        if writes and watching:
            written.append(f"{event} {args[:2]}")

    watching = []
    sys.addaudithook(watch_writes)

    with one_group_for_all():
        found |= findings(out, watching, written)
    with contextlib.suppress(ZeroDivisionError, SystemExit), Runtime(settings()):  # one rank says what it was
        found["open_inside"] = dist.is_initialized()
        assert 1 / 0
    found["open_after_error"] = dist.is_initialized()
    torch.save(found, out / f"rank_{os.environ['RANK']}.pt")


def findings(out: Path, watching: list, written: list) -> dict:
    found = {}
    with Runtime(settings()) as rt:
        found["rank"], found["world_size"], found["is_main"] = rt.rank, rt.world_size, rt.is_main
        found["mean"], found["gathered"] = rt.mean(torch.tensor([1.0 + rt.rank])), rt.gather({"mine": rt.rank})
        found["share"] = rt.share(torch.arange(6))
        found["gradients"], found["accumulated"] = gradients(rt, 1), gradients(rt, 2)
        runtime.STOP_CHECK_SECONDS = 1e9  # steps are fast
        found["stopping"] = [rt.stopping(1)]
        rt.stop_signal = signal.SIGTERM if rt.rank == 1 else None
        found["stopping"] += [rt.stopping(2), rt.stopping(STOP_CHECK_STEPS), rt.stopping(STOP_CHECK_STEPS + 1)]
        runtime.STOP_CHECK_SECONDS = 0  # steps are slow
        found["stopping"] += [rt.due(STOP_CHECK_STEPS + 2, 99, 99, 4, 99).stops, rt.stopping(STOP_CHECK_STEPS + 3)]
        runtime.STOP_CHECK_SECONDS = 1e9

    console = io.StringIO()
    watching.append(True)
    with contextlib.redirect_stdout(console):
        train_ghmm.main([*FIVE, "--out_dir=five"])
    watching.clear()
    found["console"], found["written"] = console.getvalue(), list(written)

    travels, after_backward = [], []
    wrap, backward = Runtime.wrap, Runtime.backward

    def counting_wrap(self, model):
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        def count(state, bucket):
            travels.append(bucket.index())
            return allreduce_hook(None, bucket)

        wrapped = wrap(self, model)
        wrapped.register_comm_hook(None, count)
        return wrapped

    def counting_backward(self, loss):
        backward(self, loss)
        after_backward.append(len(travels))

    Runtime.wrap, Runtime.backward = counting_wrap, counting_backward
    train_ghmm.main([*FIVE, "--grad_accum=2", "--out_dir=five_in_halves"])
    Runtime.wrap, Runtime.backward = wrap, backward
    found["all_reduces"] = list(after_backward)

    (out / "whole").mkdir(exist_ok=True)
    os.chdir(out / "whole")
    train_ghmm.main([*LONG])
    (out / "stopped").mkdir(exist_ok=True)
    os.chdir(out / "stopped")

    def interrupted(self, loss):
        backward(self, loss)
        after_backward.append(0)
        if self.rank == 1 and len(after_backward) == 73:
            os.kill(os.getpid(), signal.SIGTERM)

    after_backward.clear()
    Runtime.backward = interrupted
    found["stopped"] = train_ghmm.main([*LONG])
    Runtime.backward = backward
    found["resumed"] = train_ghmm.main([*LONG])["steps"]
    return found


def environment() -> dict:
    """That of a user who stands in another folder."""
    return {**{k: v for k, v in os.environ.items() if k != "PYTHONPATH"}, "OMP_NUM_THREADS": "1"}


def torchrun(*command: str) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d",
            "--rdzv_endpoint=localhost:0", *map(str, command)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> SimpleNamespace:
    out = tmp_path_factory.mktemp("ranks") / "out"
    two_ranks("test_runtime", out, function="rank_main", folder=out.parent)
    return SimpleNamespace(out=out, found=[torch.load(out / f"rank_{rank}.pt", weights_only=True) for rank in (0, 1)])


def test_ranks_know_who_they_are_and_exchange_values(ranks):
    for rank, found in enumerate(ranks.found):
        assert (found["rank"], found["world_size"], found["is_main"]) == (rank, 2, rank == 0)
        assert found["mean"].tolist() == [1.5]
        assert found["gathered"] == [{"mine": 0}, {"mine": 1}]
        assert found["share"].tolist() == list(range(rank, 6, 2))


def test_process_groups_can_be_closed_again_and_again(tmp_path):
    """The destructor of DDP once closed them with the interpreter locked, for which gloo's thread waited, for ever."""
    two_ranks("test_runtime", function="many_groups", folder=tmp_path, timeout=60)


def many_groups(argv: list[str]) -> None:
    def one():
        with Runtime(settings()) as rt:
            trained = rt.wrap(torch.nn.Linear(4, 4))  # which outlives the group
            trained(torch.ones(2, 4)).sum().backward()
            rt.gather(1)
            rt.barrier()

    for _ in range(5):
        one()


def test_all_ranks_agree_on_stopping_though_one_got_the_signal(ranks):
    assert [found["stopping"] for found in ranks.found] == [[False, False, False, True, True, True]] * 2


def test_the_process_group_is_closed_after_an_error(ranks):
    for found in ranks.found:
        assert found["open_inside"] and not found["open_after_error"]


@pytest.mark.parametrize("kind", ["gradients", "accumulated"])
def test_two_ranks_find_the_gradient_that_one_finds(ranks, kind):
    with Runtime(settings()) as rt:
        alone = gradients(rt, 1)
    for found in ranks.found:
        assert_close(found[kind], alone, 1e-6)
    assert unequal(ranks.found[0][kind], ranks.found[1][kind]) == []


def test_two_ranks_train_like_one_with_the_same_global_batch(ranks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_ghmm.main([*FIVE, "--out_dir=alone"])
    alone = checkpoint.load(tmp_path / "alone")["model"]
    untrained = train_ghmm.main([*FIVE, "--max_steps=1", "--lr=0", "--out_dir=untrained"])
    assert untrained["steps"] == 1
    start = checkpoint.load(tmp_path / "untrained")["model"]
    assert max(float((alone[name] - start[name]).abs().max()) for name in alone) > 1e-3  # it did train
    for name in ("five", "five_in_halves"):
        assert_close(checkpoint.load(ranks.out / name)["model"], alone, 5e-6)
        for one, two in zip(metrics(tmp_path / "alone"), metrics(ranks.out / name), strict=True):
            assert one.keys() == two.keys()
            for key in one:
                exact = key in ("step", "split")
                assert two[key] == (one[key] if exact else pytest.approx(one[key], rel=1e-4, abs=1e-5))


def test_only_rank_0_writes_and_prints(ranks):
    main, other = ranks.found
    assert any("last.pt" in line for line in main["written"]) and "\ndone: mess3" in main["console"]
    assert other["written"] == [] and other["console"] == ""


def test_gradients_travel_on_the_last_micro_step_only(ranks):
    for found in ranks.found:
        counts = found["all_reduces"]
        first, last = counts[0::2], counts[1::2]
        assert len(counts) == 10 and first[0] == 0
        assert all(now == before for now, before in zip(first[1:], last[:-1], strict=True))
        assert all(after > before for before, after in zip(first, last, strict=True))


def test_two_ranks_stop_on_a_signal_to_one_and_resume_to_the_bit(ranks):
    assert [found["stopped"] for found in ranks.found] == [{"stopped_at": 80}] * 2
    assert [found["resumed"] for found in ranks.found] == [140] * 2
    whole, stopped = ranks.out / "whole" / "run", ranks.out / "stopped" / "run"
    state = trained_state(whole)
    assert unequal(state, trained_state(stopped)) == []
    assert [set(rank) >= {"carried", "torch_rng"} for rank in state["ranks"]] == [True, True]
    assert not torch.equal(state["ranks"][0]["carried"], state["ranks"][1]["carried"])
    assert metrics(whole) == metrics(stopped)


def test_a_sigterm_to_torchrun_saves_and_the_same_command_goes_on_to_the_bit(ranks, tmp_path):
    command = torchrun(ROOT / "train_ghmm.py", *LONG)
    log = tmp_path / "run" / "train.log"
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as job:
        deadline = time.monotonic() + 100
        while not (log.exists() and "step     20/" in log.read_text()):
            assert job.poll() is None and time.monotonic() < deadline, "training never reached step 20"
            time.sleep(0.002)
        job.send_signal(signal.SIGTERM)
        console = job.communicate(timeout=100)[0]
    stopped = re.search(r"stopped by a signal after step (\d+)", console)
    assert stopped, console
    assert checkpoint.load(tmp_path / "run")["step"] == int(stopped[1]) < 140
    assert two_ranks("test_runtime", *LONG, function="without_pictures", folder=tmp_path).count("done: mess3") == 1
    assert unequal(trained_state(ranks.out / "whole" / "run"), trained_state(tmp_path / "run")) == []
    assert metrics(ranks.out / "whole" / "run") == metrics(tmp_path / "run")


def without_pictures(argv: list[str]) -> None:
    train_ghmm.plot_run = lambda *args, **options: None
    train_ghmm.main(argv)


def test_an_error_of_all_ranks_is_told_once(tmp_path):
    lines = two_ranks("train_ghmm", *TINY, "--grad_accum=3", folder=tmp_path, code=2).splitlines()
    assert list(tmp_path.iterdir()) == []
    first, told = lines
    assert first == "train_ghmm: mess3, transformer, 1,500 steps -> out/ghmm"
    assert told.startswith("error: ") and "multiple of grad_accum * ranks = 6" in told


class Stack(torch.nn.Module):
    """Layers of a width, in so many steps that asking for too many would never end."""

    def __init__(self, layers: int, width: int, edited: bool = False):
        super().__init__()
        self.layers = torch.nn.ModuleList()
        for _ in range(layers):
            self.layers.append(torch.nn.Linear(width, width))
        self.edited = edited and self.layers[0].weight.sum().item()  # which a tensor without memory has not


@pytest.mark.parametrize("layers, width, told", [
    (10**12, 2, "more than 10,000 tensors of weights: take fewer layers"),
    (2, 10**7, "a model of 200,000,020,000,000 parameters, which needs 3,200,000 GB in training, and this machine has"),
    (1, 10**12, "out of memory"),  # the square does not fit into 64 bits
])  # fmt: skip
def test_a_model_for_which_there_is_no_memory_is_refused_before_it_takes_any(layers, width, told):
    began = time.process_time()
    with Runtime(settings()) as rt, pytest.raises((InputError, RuntimeError)) as refused:
        rt.build(Stack, layers, width)
    assert told in (system_sentence(refused.value) or str(refused.value)) and time.process_time() < began + 5


def test_a_model_is_built_as_if_nobody_had_looked_at_its_size_first():
    with Runtime(settings()) as rt:
        rt.reseed()
        plain = Stack(2, 3).state_dict()
        for edited in (False, True):
            rt.reseed()
            assert not unequal(rt.build(Stack, 2, 3, edited).state_dict(), plain)


@pytest.mark.skipif(sys.platform != "linux", reason="where else is what a process has asked for counted?")
def test_a_run_on_the_cpu_is_refused_more_memory_than_there_is_instead_of_being_killed():
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with Runtime(settings()):
        most = resource.getrlimit(resource.RLIMIT_DATA)[0]
        assert machine_memory() // 2 <= most
        with pytest.raises(RuntimeError) as refused:
            torch.empty(most, dtype=torch.uint8)  # alone, the system would promise it
        assert system_sentence(refused.value).startswith("out of memory (")
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


@pytest.mark.parametrize("make, told", [
    (lambda: int(1e300 * 1e300), "a number is too large (OverflowError: cannot convert float infinity to integer)"),
    (lambda: np.empty(2**62), "out of memory (ValueError"), (lambda: torch.empty(2**64), "out of memory (TypeError"),
    (lambda: torch.empty(2**40, 2**40), "out of memory (RuntimeError"),
])  # fmt: skip
def test_sizes_that_no_machine_has_are_a_sentence(make, told):
    with pytest.raises((ArithmeticError, RuntimeError, TypeError, ValueError)) as error:
        make()
    assert system_sentence(error.value).startswith(told)


def test_a_batch_that_no_machine_holds_is_refused_by_its_name(capsys):
    with pytest.raises(SystemExit):
        Runtime(settings()).divide(10**11, 1)
    assert capsys.readouterr().err == "error: batch_size = 100000000000 is more than this machine has memory for\n"
