"""The inner optimizers: how one gradient changes weights and momenta. Imports torch.

Scion: Pethick et al., Training deep learning models with norm-constrained LMOs, 2025, with the
update of matrices of Muon (Jordan et al., 2024): five Newton-Schulz steps, Nesterov form.
AdamW: Loshchilov and Hutter, Decoupled weight decay regularization, 2019.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from meshd.node.workloads.training.outer import momentum_decay
from meshd.node.workloads.training.parameters import Trained
from meshd.node.workloads.training.settings import TrainSettings

_QUINTIC: Final = (3.4445, -4.7750, 2.0315)


class InnerOptimizer:
    """Changes weights and momenta in place, one inner step at a time."""

    def __init__(
        self,
        weights: Sequence[Trained],
        settings: TrainSettings,
        theta: Mapping[str, Tensor],
        momentum: Mapping[str, Tensor],
        second: Mapping[str, Tensor],
    ) -> None:
        self._weights = weights
        self._settings = settings
        self._theta = theta
        self._momentum = momentum
        self._second = second

    @torch.no_grad()
    def step(self, gradients: Mapping[str, Tensor], step: int) -> float:
        """Take inner step number `step` of the job; return the gradient's length before it.

        Nothing is changed when the length is NaN or infinite.
        """
        settings = self._settings
        total = torch.zeros(())
        for weight in self._weights:
            total = total + gradients[weight.name].square().sum()
        length = math.sqrt(float(total)) if math.isfinite(float(total)) else math.inf
        if not math.isfinite(length):
            return length
        shorter = min(1.0, settings.clip / (length + 1e-6)) if settings.clip else 1.0
        rate = settings.learning_rate(step)
        for weight in self._weights:
            theta, momentum = self._theta[weight.name], self._momentum[weight.name]
            gradient = gradients[weight.name] * shorter
            theta.mul_(1 - rate * settings.weight_decay)
            if settings.optimizer == "scion":
                self._scion(weight, theta, momentum, gradient, rate)
            elif settings.optimizer == "adamw":
                second = self._second[weight.name]
                self._adamw(theta, momentum, second, gradient, rate, step + 1)
            else:
                momentum.mul_(settings.beta).add_(gradient)
                theta.add_(momentum, alpha=-rate)
        return length

    def _scion(
        self, weight: Trained, theta: Tensor, momentum: Tensor, gradient: Tensor, rate: float
    ) -> None:
        settings = self._settings
        beta = momentum_decay(weight, settings)
        momentum.mul_(beta).add_(gradient, alpha=1 - beta)
        if weight.matrices is None:
            theta.add_(torch.sign(momentum), alpha=-rate * settings.rest_scale)
            return
        ahead = torch.lerp(gradient, momentum, beta).reshape(weight.matrices)
        update = orthogonalised(ahead, settings.newton_schulz).reshape(weight.shape)
        longest = max(weight.matrices[1:])
        theta.add_(update, alpha=-rate * settings.matrix_scale * math.sqrt(longest))

    def _adamw(
        self,
        theta: Tensor,
        momentum: Tensor,
        second: Tensor,
        gradient: Tensor,
        rate: float,
        count: int,
    ) -> None:
        settings = self._settings
        momentum.mul_(settings.beta).add_(gradient, alpha=1 - settings.beta)
        second.mul_(settings.beta_second).addcmul_(
            gradient, gradient, value=1 - settings.beta_second
        )
        first = 1 - settings.beta**count
        root = (second / (1 - settings.beta_second**count)).sqrt_().add_(settings.epsilon)
        theta.sub_(momentum.div(root).mul_(rate / first))


def orthogonalised(matrices: Tensor, steps: int) -> Tensor:
    """Return matrices (count, n, k) with all singular values near 1, by Newton-Schulz steps.

    Source: K. Jordan et al., Muon, 2024; the quintic polynomial's coefficients are theirs.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.flatten(1).norm(dim=1)[:, None, None] + 1e-7)
    first, third, fifth = _QUINTIC
    for _ in range(steps):
        square = x @ x.transpose(1, 2)
        inner = torch.baddbmm(square, square, square, beta=third, alpha=fifth)
        x = torch.baddbmm(x, inner, x, beta=first)
    return x.transpose(1, 2) if tall else x
