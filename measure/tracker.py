"""Running metrics of a training loop under the keys of the source system, without waiting for the device."""

import math
import time

import torch

from common.errors import CheckpointError


class MetricTracker:
    """Serves any loop that calls update() after each optimizer step, before or after zero_grad().

    Sums live on the device, so that a step with log=False waits for nothing. With lr the learning rate, g the gradient
    norm and n the tokens of a step, step/* is the last one's and cum/* the sum of lr_weighted_tokens = lr n,
    gradient_signal = lr g n, fisher_proxy = g^2 n (the sum of squared gradients times tokens). A norm that is not
    finite is left out of the sums: it is that of a step that mixed precision skips. cum/tokens_per_second is since the
    start or the last resumption. loss/ma is over 100 steps, loss/ema decays by 0.9; loss/progress_to_optimal is
    (loss - optimal) / (initial - optimal), from 1 at the start to 0 at the optimum, and NaN where there is nothing to
    gain. Losses in nats.

    Args:
        lr_schedule_fn: step -> lr, where the optimizer's first parameter group does not hold it.
    """

    WINDOW, DECAY = 100, 0.9

    def __init__(self, model: torch.nn.Module, optimizer, optimal_loss: float = 0.0, lr_schedule_fn=None):
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = optimizer
        self.optimal_loss = float(optimal_loss)
        self.lr_schedule_fn = lr_schedule_fn
        self.initial = [p.detach().clone() for p in self.params]
        self.previous = [p.detach().clone() for p in self.params]
        device = self.params[0].device
        dtype = torch.float32 if device.type == "mps" else torch.float64  # Metal has no float64
        zero = torch.zeros((), dtype=dtype, device=device)
        self.sums = {
            "cum/gradient_signal": zero.clone(),
            "cum/fisher_proxy": zero.clone(),
            "params/update_l2_norm/cum": zero.clone(),
        }
        self.tokens = 0
        self.lr_weighted_tokens = 0.0
        self.steps = 0
        self.initial_loss = None
        self.window = zero.repeat(self.WINDOW)  # the last losses, in a ring
        self.ema = zero.clone()
        self.min = zero + math.inf
        self.max_distance = 0.0  # from the initial parameters, of the steps that were looked at
        self.began = (time.perf_counter(), 0)  # the clock and the tokens at the start, or when a state was taken up
        self.lap = self.began  # and when metrics were last returned
        # Gradients may be gone when update() is called, so their norm is taken when the optimizer steps.
        self.norm_at_step = None
        self.hook = None
        if hasattr(optimizer, "register_step_pre_hook"):
            self.hook = optimizer.register_step_pre_hook(self._before_step)

    def record_initial_loss(self, loss) -> None:
        """The loss before training, from which loss/progress_to_optimal counts; default the first step's."""
        self.initial_loss = float(loss)

    @torch.no_grad()
    def _before_step(self, *args) -> None:
        self.norm_at_step = self._norm_of_gradients()

    def _norm_of_gradients(self) -> torch.Tensor:
        """NaN where there are none."""
        gradients = [p.grad for p in self.params if p.grad is not None]
        return l2_norm(gradients) if gradients else torch.full_like(self.ema, math.nan)

    @torch.no_grad()
    def update(
        self,
        *,
        step: int,
        loss,
        tokens_in_batch: int,
        grad_norm=None,
        log: bool = True,
        costly: bool = True,
    ) -> dict:
        """Count a step (of the given loss, in nats); return the metrics if log, with the costly ones if costly too.

        grad_norm: default the norm of the gradients that the optimizer last stepped with.
        """
        if self.lr_schedule_fn is None:
            lr = self.optimizer.param_groups[0]["lr"]
        else:
            lr = float(self.lr_schedule_fn(step))
        loss = torch.as_tensor(loss, dtype=self.ema.dtype, device=self.ema.device).detach()
        if grad_norm is None:
            grad_norm = self.norm_at_step
            if grad_norm is None:  # an optimizer that calls nobody, or no step yet
                grad_norm = self._norm_of_gradients()
        elif self.hook is not None:  # a loop that brings the norms needs no others
            self.hook.remove()
            self.hook = None
        self.norm_at_step = None
        grad_norm = torch.as_tensor(grad_norm, dtype=self.ema.dtype, device=self.ema.device)
        moved = l2_norm(torch._foreach_sub(self.params, self.previous))
        torch._foreach_copy_(self.previous, self.params)

        if self.initial_loss is None:
            self.initial_loss = loss.clone()
        if self.steps == 0:
            self.ema = loss.clone()
        else:
            self.ema = self.DECAY * self.ema + (1 - self.DECAY) * loss
        self.min = torch.minimum(self.min, loss)
        self.window[self.steps % self.WINDOW] = loss
        self.steps += 1
        self.tokens += tokens_in_batch
        self.lr_weighted_tokens += lr * tokens_in_batch
        counted = torch.where(grad_norm.isfinite(), grad_norm, 0)
        self.sums["cum/gradient_signal"] += lr * tokens_in_batch * counted
        self.sums["cum/fisher_proxy"] += tokens_in_batch * counted**2
        self.sums["params/update_l2_norm/cum"] += moved
        if not log:
            return {}

        on_device = {
            "loss/step": loss,
            "loss/ma": self.window[: self.steps].mean(),
            "loss/ema": self.ema,
            "loss/min": self.min,
            "grads/l2_norm/step": grad_norm,
            "step/gradient_signal": lr * tokens_in_batch * grad_norm,
            "step/fisher_proxy": tokens_in_batch * grad_norm**2,
            "params/update_l2_norm/step": moved,
            **self.sums,
        }
        if costly:
            on_device["params/l2_norm"] = l2_norm(self.params)
            on_device["params/distance_from_init"] = l2_norm(torch._foreach_sub(self.params, self.initial))
        values = {key: float(value) for key, value in on_device.items()}  # here the device is waited for
        if costly:
            self.max_distance = max(self.max_distance, values["params/distance_from_init"])
            values["model/max_params_distance"] = self.max_distance
        return values | self._counted(lr, values["loss/step"], tokens_in_batch)

    def _counted(self, lr: float, loss: float, tokens: int) -> dict:
        """The metrics that are known without the device."""
        now = time.perf_counter()
        last, tokens_then = self.lap
        began, tokens_before = self.began
        self.lap = (now, self.tokens)
        gap = float(self.initial_loss) - self.optimal_loss
        progress = math.nan
        if gap > 0:
            progress = (loss - self.optimal_loss) / gap
        return {
            "step/tokens": tokens,
            "step/tokens_per_second": (self.tokens - tokens_then) / max(now - last, 1e-9),
            "step/lr_weighted_tokens": lr * tokens,
            "cum/tokens": self.tokens,
            "cum/tokens_per_second": (self.tokens - tokens_before) / max(now - began, 1e-9),
            "cum/lr_weighted_tokens": self.lr_weighted_tokens,
            "lr/step": lr,
            "loss/progress_to_optimal": progress,
        }

    def state_dict(self) -> dict:
        """Plain state for a checkpoint; the initial parameters come again from the seed."""
        names = ("sums", "tokens", "lr_weighted_tokens", "steps", "initial_loss", "window", "ema", "min",
                 "max_distance")  # fmt: skip
        return {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def load_state_dict(self, state: dict, path="the checkpoint") -> None:
        """Take up a saved state; call it after the model's own weights are loaded.

        path: where it is from, for the CheckpointError that a state of another kind raises.
        """
        wrong = unlike(state, self.state_dict(), "tracker")
        if wrong:
            raise CheckpointError(f"{path} has metrics of another kind than this code keeps: look at {wrong} in it")
        for name, value in state.items():
            if name == "sums":
                value = {key: self._own(number) for key, number in value.items()}
            setattr(self, name, self._own(value))
        torch._foreach_copy_(self.previous, self.params)
        self.began = self.lap = (time.perf_counter(), self.tokens)

    def _own(self, value):
        """A copy of a tensor on the tracker's device; anything else as it is."""
        return value.to(self.ema.device, copy=True) if isinstance(value, torch.Tensor) else value


def l2_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """l2 norm of all tensors together."""
    return torch.stack(torch._foreach_norm(tensors)).norm()


def unlike(value: object, example: object, where: str) -> str:
    """Where a value is not of the kind of an example: its names, types, and of tensors the shape; "" if it is.

    None stands for a number that is not known yet.
    """
    numbers = (int, float)
    if isinstance(example, dict):
        if not isinstance(value, dict) or value.keys() != example.keys():
            return where
        return next((wrong for name in example if (wrong := unlike(value[name], example[name], f"{where}.{name}"))), "")
    if isinstance(example, torch.Tensor):
        alike = isinstance(value, torch.Tensor) and value.shape == example.shape and value.is_floating_point()
    elif example is None:
        alike = value is None or type(value) in numbers
    else:
        alike = type(value) is type(example) or type(value) in numbers and type(example) in numbers
    return "" if alike else where
