"""Batches ahead: while a step is trained, the batch of the next one is made.

The plain form is `batches(step)` itself, which gives the same batches: each is a pure function of its step.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """A tensor of the CPU on a device. A GPU copies it from pinned memory, while it computes and nobody waits."""
    device = torch.device(device)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def begin_on(device: torch.device) -> None:
    """A thread has a GPU of its own choice, and pinned memory is made by way of it: another one would be woken."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


class Ahead:
    """Call it as the batches that it is of, step after step: from the first call on one thread makes all of them.

    What the thread raises is raised by the call of that step, which may never come. All else that the batches have,
    such as their number, is found here too.

    Args:
        batches: step -> batch, a pure function. last: the step at which training ends. device: of the batches.
    """

    def __init__(self, batches: Callable[[int], object], last: int, device: torch.device):
        self.batches, self.last = batches, last
        self.thread = ThreadPoolExecutor(1, "batches", begin_on, (device,))
        self.step, self.next = -1, Future()

    def __call__(self, step: int):
        made = self.next if step == self.step else self.thread.submit(self.batches, step)
        batch = made.result()
        if step + 1 < self.last:
            self.step, self.next = step + 1, self.thread.submit(self.batches, step + 1)
        return batch

    def __getattr__(self, name: str):
        return getattr(self.batches, name)

    def close(self) -> None:
        """Wait for the batch that is being made, and begin no other."""
        self.thread.shutdown(cancel_futures=True)
