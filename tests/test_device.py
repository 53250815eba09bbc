"""Every page's training step on a device that is not there, and compiled.

torch's meta device has shapes and no numbers: a tensor left on the CPU and a number read in a step raise there, as they
would on a GPU or make it wait.
"""


import contextlib
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from geomloss import SamplesLoss
from scipy.sparse import csr_array
from torch._dynamo.testing import CompileCounterWithBackend
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import train_apelr
import train_arxiv
import train_ghmm
import train_state
from common import checkpoint, compiling
from common.runtime import Meter, Runtime
from measure.tracker import MetricTracker
from sources.cell_store import unpack

META = torch.device("meta")


class NoCopies(TorchDispatchMode):
    """No operator takes a tensor of one device to another, which meta would let pass."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        if operator.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            devices = {it.device for it in (*args, out) if isinstance(it, torch.Tensor)}
            assert len(devices) == 1, f"{operator} takes a tensor from one device to another"
        return out


class NoNumbers(TorchFunctionMode):
    """No tensor on the device is made of Python's numbers, which are sent there and waited for."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor):
            data = args[-1] if function is torch.Tensor.new_tensor else args[0]
            assert isinstance(data, torch.Tensor) or out.device != META, f"{data} is sent to the device"
        return out


def on_meta(cfg) -> Runtime:
    rt = Runtime(cfg)
    rt.device = META
    return rt


def train_on_meta(rt: Runtime, model, params, step, optimizer=None, tracker=None, steps: int = 1) -> dict:
    """Steps as the loop makes them, from the batch on; step(i) -> loss, or the terms of the loss."""
    optimizer = optimizer or rt.adamw(params, lr=0.1)
    meter = Meter(rt, 1, 0.0)
    with NoCopies(), NoNumbers(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "autocast", lambda *args, **options: contextlib.nullcontext())  # of which meta has none
        for i in range(steps):
            terms = step(i)
            terms = terms if isinstance(terms, dict) else {"loss": terms}
            norm = rt.step(optimizer, list(model.parameters()), 1.0, 0.1)
            meter.check(i, terms["loss"])
            meter.add(terms)
            if tracker:
                tracker(optimizer).update(step=i, loss=terms["loss"], tokens_in_batch=1, grad_norm=norm, log=False)
    assert all(value.device == META and value.shape == () for value in terms.values())
    assert optimizer.state and norm.device == META
    return terms


TINY = {"device": "cpu", "precision": "fp32", "compile": "false", "n_layers": 1, "d_model": 8, "batch_size": 4,
        "grad_accum": 1}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ GHMM
@pytest.mark.parametrize("settings", [
    {"grad_accum": 1}, {"positional": "rope", "normalization": "RMS", "act": "silu"},
    {"positional": "none", "normalization": "LNPre"},
    {"model": "gru"}, {"model": "lstm", "one_hot": True}, {"model": "rnn"}], ids=str)
def test_a_step_of_ghmm(settings):
    cfg = train_ghmm.Config(**{**TINY, "n_ctx": 6, "d_mlp": 8, "grad_accum": 2, **settings})
    rt, process = on_meta(cfg), train_ghmm.build_process(cfg)
    model = train_ghmm.build_model(cfg, process.vocab_size).to(META)
    tokens = train_ghmm.Batches(rt, process, cfg)(0)
    trackers = []

    def tracker(optimizer) -> MetricTracker:
        if not trackers:
            trackers.append(MetricTracker(model, optimizer, 1.0))
            trackers[0].record_initial_loss(2.0)
        return trackers[0]

    train_on_meta(rt, model, model.parameters(), lambda i: train_ghmm.train_step(model, tokens, rt, cfg),
                  tracker=tracker, steps=2)


@pytest.mark.parametrize("process", ["mess3", "tom_quantum", "nonergodic"])
def test_sequences_are_drawn_and_go_on_where_the_process_is(process):
    more = {"components": [{"process": "mess3"}, {"process": "zero_one_random"}]} if process == "nonergodic" else {}
    process = train_ghmm.build_process(train_ghmm.Config(process=process, **more))
    process.to(META)
    uniforms = torch.empty(8, 4, dtype=torch.float64, device=META)
    with NoCopies(), NoNumbers():
        tokens, state = process.generate(uniforms, None)
        tokens, _ = process.generate(uniforms, state)
    assert tokens.device == META


# ----------------------------------------------------------------------------------------------------------- arXiv
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_step_of_arxiv(dropout):
    cfg = train_arxiv.Config(**TINY, d_mlp=8, dropout=dropout, random_windows=dropout > 0)
    rt = on_meta(cfg)
    chunks = train_arxiv.Chunks(np.zeros((9, 12), np.uint16), np.zeros(9, np.int64), np.arange(9) // 3, ["a"], 7, 9)
    model = train_arxiv.build_model(cfg, 7, chunks.n_ctx).to(META)
    tokens = train_arxiv.Batches(rt, chunks, np.arange(9), cfg)(0)
    train_on_meta(rt, model, train_arxiv.parameter_groups(model, cfg),
                  lambda i: train_arxiv.train_step(model, tokens, rt, cfg))


# ---------------------------------------------------------------------------------------------------------- APEL-R
V1 = {"version": "v1_filtered_mixture", "entropy_reg_weight": 0.1, "usage_balance_weight": 0.1, "chunk_bow_weight": 0.1,
      "chunk_bow_warmup_steps": 4, "plan_mi_weight": 0.1, "chunk_post_kl_weight": 0.1}  # fmt: skip
V2 = {"loss_weights": dict.fromkeys(train_apelr.V2_TERMS, 0.1), "rep_window": 4}
ANNEALED = {"plan_commitment": "gumbel_st", "commitment_ramp_steps": 8, "plan_temperature_start": 2.0,
            "plan_temperature_end": 0.5}  # fmt: skip
APELR = {
    "v1": V1, "v1 source": V1 | {"compat": "source"}, "v2": V2, "v2 source": V2 | ANNEALED | {"compat": "source"},
    "v2 annealed": V2 | ANNEALED, "v2 bias": V2 | {"experts": "bias"}, "v2 lowrank": V2 | {"experts": "lowrank"},
    "v2 early": V2 | {"carry_posterior": False, "token_filtering": False, "compat": "source"},
    "v2 ahead": {"lookahead_feedback_scale": 0.3, "planner_temperature": 0.7, "backbone": "transformer", "n_heads": 2},
    "baseline": {"version": "baseline", "dropout": 0.1},
    "transformer_lm": {"version": "transformer_lm", "n_heads": 2, "max_seq_len": 24, "dropout": 0.1},
}  # fmt: skip


def apelr_config(name: str) -> train_apelr.Config:
    return train_apelr.Config(**{**TINY, "token_dim": 8, "fusion_dim": 8, "num_plan_states": 3, "seq_len": 12,
                                 "chunk_size": 5, "aux_token_fraction": 0.5, "max_steps": 9, **APELR[name]})


@pytest.mark.parametrize("name", APELR)
def test_a_step_of_apelr(name):
    cfg = apelr_config(name)
    rt = on_meta(cfg)
    model = train_apelr.build_model(cfg, 11).to(META)
    tokens = torch.zeros(4, 13, dtype=torch.int64, device=META)
    terms = train_on_meta(rt, model, train_apelr.parameter_groups(model, cfg),
                          lambda i: train_apelr.train_step(model, tokens, 4 + i, rt, cfg))
    assert terms.keys() >= {"loss", "nll", *cfg.weights()}


# ----------------------------------------------------------------------------------------------------------- State
STATE = {
    "llama": {}, "GPT2": {"transformer_backbone_key": "GPT2", "residual_dropout": 0.1, "embedding_dropout": 0.1},
    "rotary": {"rotary": True, "n_kv_heads": 1, "bidirectional_attention": False, "attention_dropout": 0.1},
    "masked": {"mask_attn": True, "batch_encoder": True}, "lora": {"lora": True, "lora_mlp": True},
    "tokens": {"confidence_token": True, "use_batch_token": True, "basal_mapping_strategy": "batch"},
    "confidence": {"confidence_token": True, "confidence_per_set": False, "regularization": 0.1, "pert_norm": True},
    "genes": {"output_space": "all"}, "genes, no residual": {"output_space": "all", "predict_residual": False},
    "decoder": {"embed_key": "X_pca", "decoder_hidden_dims": [8, 8]}, "adam": {"optimizer": "adam"},
    "detached": {"embed_key": "X_pca", "decoder_hidden_dims": [8, 8], "residual_decoder": True, "detach_decoder": True},
    "chunks": {"mmd_num_chunks": 2, "randomize_mmd_chunks": True}, "mse": {"loss": "mse"}, "se": {"loss": "se"},
    "sinkhorn": {"loss": "sinkhorn"}, "gaussian": {"distributional_loss": "gaussian"},
    "laplacian": {"distributional_loss": "laplacian"},
}  # fmt: skip


def state_config(name: str, **more) -> train_state.Config:
    return train_state.Config(**{**TINY, "n_heads": 2, "d_mlp": 8, "cell_set_len": 4, **STATE[name], **more})


SINKHORN = SamplesLoss.__module__.replace("samples_loss", "sinkhorn_divergence")  # it moves between versions


class TinyCells:
    """What make_batch asks of cells: 10 of them, of 6 features and 9 genes, under 3 perturbations, in 2 batches."""

    pert_dim, count_genes = 3, list("abcdefghi")
    perturbation, batch = np.arange(10) % 3, np.arange(10) % 2

    def __init__(self, features: torch.Tensor | None = None):
        self.features = features
        draw = np.random.default_rng(0)
        self.values = {"input": draw.random((10, 6)), "counts": draw.random((10, 9))}

    def read(self, rows, which="input", device="cpu") -> torch.Tensor:
        rows = torch.from_numpy(self.values[which][rows]).float()
        return rows.to(device)


def state_model(cfg) -> train_state.StateTransitionPerturbationModel:
    decodes = cfg.embed_key == "X_pca"
    return train_state.build_model(cfg, {"input_dim": 6, "output_dim": 6, "pert_dim": 3, "batch_dim": 2, "gene_dim": 9,
                                         "hvg_dim": 9, "decodes": decodes})


def state_batch(device, samples: int = 1) -> dict:
    targets = np.arange(16).reshape(4, 4) % 10
    controls = np.arange(16 * samples).reshape(4, 4, samples) % 11 - 1  # one cell has no control
    return train_state.make_batch(TinyCells(), targets, controls, device)


@pytest.mark.parametrize("name", STATE)
def test_a_step_of_state(name, monkeypatch):
    # The number of iterations of sinkhorn depends on how far cells lie apart: the one number that a step waits for.
    monkeypatch.setattr(sys.modules[SINKHORN], "max_diameter", lambda x, y: 2.0)
    cfg = state_config(name)
    rt = on_meta(cfg)
    model = state_model(cfg).to(META)
    batch = state_batch(META)
    assert all(value.device == META for value in batch.values())
    train_on_meta(rt, model, None, lambda i: train_state.train_step(model, batch, rt, cfg),
                  train_state.make_optimizer(model, cfg, rt))


def test_sparse_cells_are_unpacked_where_they_are_sent():
    rows = csr_array(np.eye(3, 5, dtype=np.float32))
    assert unpack(rows, META).shape == (3, 5) and torch.equal(unpack(rows, "cpu"), torch.eye(3, 5))


# ------------------------------------------------------------------------------------- what comes from other devices
def stepped(model, optimizer) -> None:
    model(torch.zeros(2, 3, device=model.weight.device)).sum().backward()
    with NoCopies(), NoNumbers():
        optimizer.step()


def test_the_state_of_an_optimizer_goes_where_the_one_of_this_machine_has_it():
    """The fused one counts steps on the device, the other on the CPU, and would wait for a number at each step."""
    models = [torch.nn.Linear(3, 2), torch.nn.Linear(3, 2, device=META)]
    fused, plain = (torch.optim.AdamW(it.parameters(), lr=0.1, fused=it.weight.device != META) for it in models)
    stepped(models[0], fused)
    saved = fused.state_dict()
    checkpoint._restore_optimizer(plain, saved, "last.pt")
    stepped(models[1], plain)
    known = plain.state[models[1].weight]
    assert known["step"].device.type == "cpu" and float(known["step"]) == 2 and known["exp_avg"].device == META
    assert not plain.param_groups[0]["fused"] and saved["param_groups"][0]["fused"]


def test_ranks_gather_tensors_on_the_cpu(monkeypatch):
    rt = Runtime(train_ghmm.Config(device="cpu"))
    rt.world_size = 2
    sent = []
    monkeypatch.setattr(dist, "all_gather_object", lambda values, value: sent.append(value))
    rt.gather({"a": [torch.ones(2), 1], "b": (None, "x")})
    assert torch.equal(sent[0].pop("a")[0], torch.ones(2)) and sent == [{"b": (None, "x")}]
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta"):  # it was not left there
        rt.gather({"a": [{"deep": torch.ones(2, device=META)}]})


# ------------------------------------------------------------------------------------------- the test can fail
@pytest.mark.parametrize("slip", [
    lambda loss: float(loss), lambda loss: loss.cpu(), lambda loss: loss + torch.ones(2), lambda loss: loss.tolist(),
    lambda loss: loss + torch.tensor(1.0, device=META), lambda loss: loss + torch.ones(1).to(META),
    lambda loss: torch.ones(3, device=META)[torch.ones(3, device=META) > 0]],
    ids=["number", "to the CPU", "left on the CPU", "list", "a new number", "from the CPU", "those that are"])
def test_what_would_make_a_gpu_wait_is_found(slip, monkeypatch):
    plain = train_ghmm.training_loss

    def slipped(model, tokens):
        loss = plain(model, tokens)
        slip(loss)
        return loss

    monkeypatch.setattr(train_ghmm, "training_loss", slipped)
    with pytest.raises((RuntimeError, AssertionError)):
        test_a_step_of_ghmm({"model": "gru"})


# --------------------------------------------------------------------------------------------------------- compiled
def annealed(**settings) -> train_apelr.Config:
    return train_apelr.Config(**{**TINY, "token_dim": 8, "fusion_dim": 8, "num_plan_states": 3, "seq_len": 12,
                                 "chunk_size": 5, "max_steps": 9, **settings})  # fmt: skip


def compiled_pages() -> dict:
    """{name: (graphs of each step, what makes the model, a step of it)}"""
    ghmm = train_ghmm.Config(**TINY, n_ctx=6, d_mlp=8)
    arxiv = train_arxiv.Config(**TINY, d_mlp=8)
    v1 = annealed(**V1 | {"chunk_bow_warmup_steps": 3})
    v2 = annealed(**ANNEALED | {"commitment_warmup_steps": 1, "commitment_ramp_steps": 2})
    state = state_config("llama", dropout=0.0)
    genes = state_config("decoder", dropout=0.0, decoder_dropout=0.0, confidence_token=True)
    tokens = torch.randint(7, (4, 13), generator=torch.Generator().manual_seed(1))

    def step_of_state(cfg):
        return lambda model, i, rt: train_state.train_step(model, state_batch("cpu"), rt, cfg)["loss"]

    return {
        "ghmm": ([1] * 4, lambda: train_ghmm.build_model(ghmm, 7),
                 lambda model, i, rt: train_ghmm.train_step(model, tokens[:, :7], rt, ghmm)),
        "arxiv": ([1] * 4, lambda: train_arxiv.build_model(arxiv, 7, 12),
                  lambda model, i, rt: train_arxiv.train_step(model, tokens, rt, arxiv)),
        "apelr v1": ([6] * 4, lambda: train_apelr.build_model(v1, 7),
                     lambda model, i, rt: train_apelr.train_step(model, tokens, i, rt, v1)["loss"]),
        # One more where samples of the plan begin; then a temperature and a share that move at every step.
        "apelr v2": ([5, 5, 6, 6], lambda: train_apelr.build_model(v2, 7),
                     lambda model, i, rt: train_apelr.train_step(model, tokens, i, rt, v2)["loss"]),
        "state": ([2] * 4, lambda: state_model(state), step_of_state(state)),
        "state genes": ([3] * 4, lambda: state_model(genes), step_of_state(genes)),
    }


@pytest.mark.parametrize("name", ["ghmm", "arxiv", "apelr v1", "apelr v2", "state", "state genes"])
def test_a_compiled_page_has_few_graphs_no_new_ones_and_the_same_losses(name, monkeypatch):
    graphs, build, step = compiled_pages()[name]
    counter = CompileCounterWithBackend("aot_eager")  # traces and differentiates as the real one, and stops there
    monkeypatch.setattr(compiling, "BACKEND", counter)
    losses, names, seen = {}, {}, []
    for compile_ in ("false", "true"):
        torch._dynamo.reset()
        torch.manual_seed(3)
        with Runtime(train_ghmm.Config(device="cpu", compile=compile_)) as rt:
            model = build()
            trained = rt.wrap(model)
            optimizer = rt.adamw(model.parameters(), lr=1e-2)
            losses[compile_] = []
            for i in range(4):
                torch.manual_seed(i)
                losses[compile_].append(step(trained, i, rt))
                rt.step(optimizer, list(model.parameters()), 1.0, 1e-2)
                seen.append(counter.frame_count)
            names[compile_] = list(model.state_dict())
    assert seen[4:] == graphs and names["true"] == names["false"]
    torch.testing.assert_close(*map(torch.stack, losses.values()), rtol=1e-5, atol=1e-5)
    assert rt.compiler.news().startswith(f"compiled {graphs[-1]} graph") and not rt.compiler.news()
    assert rt.compiler.seconds > 0


def test_what_cannot_be_compiled_says_so_in_a_line_and_runs(monkeypatch, capsys):
    def refuses(graph, inputs):
        raise ValueError("no compiler\nis here")

    monkeypatch.setattr(compiling, "BACKEND", refuses)
    torch._dynamo.reset()
    before = torch._dynamo.config.suppress_errors
    with Runtime(train_ghmm.Config(device="cpu", compile="true")) as rt:
        model = torch.nn.Linear(2, 2)
        trained = rt.wrap(model)
        for size in (1, 3):
            x = torch.ones(size, 2)
            assert torch.equal(trained(x), model(x))
    told = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(told) == 1 and told[0].startswith("note: not compiled, runs eager: ")
    assert "ValueError" in told[0] and "no compiler is here" in told[0]
    assert torch._dynamo.config.suppress_errors == before and not compiling.LOGGER.filters


def test_the_clock_of_training_stands_while_a_model_is_compiled():
    rt = Runtime(train_ghmm.Config(device="cpu"))
    meter = Meter(rt, 1, 0.0)
    rt.compiler = SimpleNamespace(seconds=5.0)
    meter.start(0)
    rt.compiler.seconds += 100.0
    meter.pause(1, torch.nn.Linear(1, 1), 0.1)
    assert -100 < meter.seconds < -90
