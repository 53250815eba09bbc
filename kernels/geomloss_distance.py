"""Distances of geomloss between pairs of sets, sinkhorn, gaussian and laplacian, with gradients in full float32.

The plain form, which `geomloss_distance` equals (values and gradients of x, held together by a test in float64):

    def plain_geomloss_distance(x, y, loss, blur):
        return SamplesLoss(loss, blur=blur, backend="tensorized")(x, y)

The gradient of the plain one is made when the loss goes backward: by then TF32 is on again, and autocast may be. Both
round the small differences of large numbers that squared distances are. Here it is made beside the value, where neither
is on, and kept in place of the graph, as kernels/energy.py does.
"""

import torch
from geomloss import SamplesLoss
from torch import Tensor

from common.products import float32_products


def plain_geomloss_distance(x: Tensor, y: Tensor, loss: str, blur: float) -> Tensor:
    """sinkhorn | gaussian | laplacian of geomloss (Feydy et al. 2019): x [B, N, D], y [B, M, D] -> [B]."""
    # Even weights, which geomloss makes on the CPU and sends to the device, where it waits for them.
    of_x, of_y = (cells.new_ones(cells.shape[:2]) / cells.shape[1] for cells in (x, y))
    return SamplesLoss(loss, blur=blur, backend="tensorized")(of_x, x, of_y, y)


def geomloss_distance(x: Tensor, y: Tensor, loss: str, blur: float) -> Tensor:
    """The same, [B]; y has no gradient.

    Args:
        x, y: sets of cells [B, N, D] and [B, M, D], float32 or float64. loss: sinkhorn | gaussian | laplacian.
        blur: length scale of the distance, in units of the features.
    """
    return GeomlossDistance.apply(x.contiguous(), y.detach().contiguous(), loss, blur)


class GeomlossDistance(torch.autograd.Function):
    """The distance with its gradient made on the way. A set has a part in its own distance alone, so that the gradient
    of the sum of all distances holds those of each."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, loss: str, blur: float) -> Tensor:
        gradient = None  # an evaluation asks for none
        exact = torch.autocast(x.device.type, enabled=False)
        # geomloss switches gradients on and leaves them so: set_grad_enabled puts back what was.
        with torch.set_grad_enabled(ctx.needs_input_grad[0]), float32_products("highest", x.device), exact:
            cells = x.detach().requires_grad_(ctx.needs_input_grad[0])
            value = plain_geomloss_distance(cells, y, loss, blur)
            if ctx.needs_input_grad[0]:
                (gradient,) = torch.autograd.grad(value.sum(), cells)
        ctx.save_for_backward(gradient)
        return value.detach()

    @staticmethod
    def backward(ctx, outer: Tensor):
        (gradient,) = ctx.saved_tensors
        return outer[:, None, None] * gradient, None, None, None
