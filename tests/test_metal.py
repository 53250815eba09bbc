"""What is on a Mac's GPU, which has no float64, is taken to the CPU before it becomes double."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import train_ghmm
from common.runtime import Runtime
from measure.baselines import train_baselines
from measure.sequences import continue_sequences


class Metal(torch.Tensor):
    """A tensor that behaves as if it were there: whatever is made of it is too, until it is taken to the CPU."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        found = super().__torch_function__(function, types, args, kwargs or {})
        to_cpu = function is torch.Tensor.to and isinstance(args[1], torch.device)
        if function is torch.Tensor.cpu or to_cpu:
            return found.as_subclass(torch.Tensor)
        if isinstance(found, Metal) and found.dtype == torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
        return found


def test_the_stand_in_refuses_what_metal_refuses():
    there = torch.ones(2).as_subclass(Metal)
    for convert in (lambda: there.double(), lambda: there.to(torch.ones(1, dtype=torch.float64)),
                    lambda: (there + 1).to(torch.float64), lambda: there.sum(dtype=torch.float64)):
        with pytest.raises(TypeError, match="MPS"):
            convert()
    assert there.cpu().double().dtype == there.to(torch.device("cpu")).double().dtype == torch.float64


def model_there(V: int):
    """A model whose logits [B, T, V] are there, and which knows nothing."""

    class Model(torch.nn.Module):
        def forward(self, tokens):
            return torch.zeros(*tokens.shape, V).as_subclass(Metal), None

    return Model()


def test_the_loss_of_a_process_is_computed_from_logits_that_are_there():
    rt = Runtime(SimpleNamespace(seed=0, device="cpu", precision="fp32", compile="false"))
    process = train_ghmm.make_process("mess3")
    contexts = train_ghmm.make_contexts(process, 4, 100, 100, 0)
    floor = torch.zeros(4, dtype=torch.float64)
    found = train_ghmm.evaluate(model_there(3), contexts, floor, rt)
    entropy = -(contexts.optimal * contexts.optimal.log()).sum(-1)
    wanted = contexts.weights @ (np.log(3) - entropy)  # KL of the true predictions from the uniform ones
    assert found["kl_by_position"] == pytest.approx(wanted.tolist(), abs=1e-12)


def test_tokens_are_drawn_from_logits_that_are_there():
    start = torch.zeros(2, 1, dtype=torch.int64)
    drawn = continue_sequences(model_there(3), start, 6, 4, torch.Generator().manual_seed(0), torch.device("cpu"))
    assert drawn.shape == (2, 6) and len(drawn.unique()) == 3


def test_means_of_cells_that_are_there_are_of_double_precision():
    X = np.array([[16.1], [16.1], [0.5], [2.5]], np.float32)
    cells = SimpleNamespace(
        file=np.zeros(4, int), cell_type=np.zeros(4, int), perturbation=np.array([1, 1, 0, 0]), control=0,
        is_control=np.array([False, False, True, True]), member=np.ones(4, int), cell_types=["c"],
        perturbations=["non-targeting", "p"], rows=lambda split, controls: np.array([0, 1]),
        read=lambda rows, which: torch.from_numpy(X[rows]).as_subclass(Metal))
    found = train_baselines(cells, "input").predict([((0, 0), 1)], 1)
    assert found["context_mean"] == pytest.approx(float(np.float32(16.1)), abs=1e-12)
    assert found["control_mean"] == pytest.approx(1.5) and found["perturbation_mean"].dtype == np.float64
