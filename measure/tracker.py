"""Running metrics of a training loop under the keys of the source system, without waiting for the device."""

import math
import time

import torch


class MetricTracker:
    """Serves any loop that calls update() after each optimizer step.

    Sums live on the device, so that a step with log=False waits for nothing. With lr the learning rate, g the gradient
    norm and n the tokens of a step: cum/lr_weighted_tokens = sum lr n, cum/gradient_signal = sum lr g n,
    cum/fisher_proxy = sum g^2; loss/ma is over 100 steps, loss/ema decays by 0.9; loss/progress_to_optimal is
    (initial - loss) / (initial - optimal). Losses in nats.

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
        self.lap = (time.perf_counter(), 0)  # when metrics were last returned, and tokens by then

    def record_initial_loss(self, loss) -> None:
        """The loss before training, from which loss/progress_to_optimal counts; default the first step's."""
        self.initial_loss = float(loss)

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
        """Count a step (of the given loss, in nats); return the metrics if log, with the costly ones if costly too."""
        if self.lr_schedule_fn is None:
            lr = self.optimizer.param_groups[0]["lr"]
        else:
            lr = float(self.lr_schedule_fn(step))
        loss = torch.as_tensor(loss, dtype=self.ema.dtype, device=self.ema.device).detach()
        if grad_norm is None:
            grad_norm = l2_norm([p.grad for p in self.params if p.grad is not None])
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
        self.sums["cum/gradient_signal"] += lr * tokens_in_batch * grad_norm
        self.sums["cum/fisher_proxy"] += grad_norm**2
        self.sums["params/update_l2_norm/cum"] += moved
        if not log:
            return {}

        on_device = {
            "loss/step": loss,
            "loss/ma": self.window[: self.steps].mean(),
            "loss/ema": self.ema,
            "loss/min": self.min,
            "grads/l2_norm/step": grad_norm,
            "params/update_l2_norm/step": moved,
            **self.sums,
        }
        if costly:
            on_device["params/l2_norm"] = l2_norm(self.params)
            on_device["params/distance_from_init"] = l2_norm(torch._foreach_sub(self.params, self.initial))
        values = {key: float(value) for key, value in on_device.items()}  # here the device is waited for
        return values | self._counted(lr, values["loss/step"], tokens_in_batch)

    def _counted(self, lr: float, loss: float, tokens: int) -> dict:
        """The metrics that are known without the device."""
        now = time.perf_counter()
        began, done = self.lap
        self.lap = (now, self.tokens)
        initial = float(self.initial_loss)
        gap = initial - self.optimal_loss
        progress = math.nan
        if gap:
            progress = (initial - loss) / gap
        return {
            "step/tokens": tokens,
            "step/tokens_per_second": (self.tokens - done) / max(now - began, 1e-9),
            "cum/tokens": self.tokens,
            "cum/lr_weighted_tokens": self.lr_weighted_tokens,
            "lr/step": lr,
            "loss/progress_to_optimal": progress,
        }

    def state_dict(self) -> dict:
        """Plain state for a checkpoint; the initial parameters come again from the seed."""
        names = ("sums", "tokens", "lr_weighted_tokens", "steps", "initial_loss", "window", "ema", "min")
        return {name: getattr(self, name) for name in names}

    @torch.no_grad()
    def load_state_dict(self, state: dict) -> None:
        """Take up a saved state; call it after the model's own weights are loaded."""
        for name, value in state.items():
            if name == "sums":
                value = {key: self._own(number) for key, number in value.items()}
            setattr(self, name, self._own(value))
        torch._foreach_copy_(self.previous, self.params)
        self.lap = (time.perf_counter(), self.tokens)

    def _own(self, value):
        """A copy of a tensor on the tracker's device; anything else as it is."""
        return value.to(self.ema.device, copy=True) if isinstance(value, torch.Tensor) else value


def l2_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """l2 norm of all tensors together."""
    return torch.stack(torch._foreach_norm(tensors)).norm()
