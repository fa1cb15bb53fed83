"""In which mode a model must be for its examples to have gradients of their own."""

from __future__ import annotations

from torch import nn

from gradscale.errors import GradscaleError


def check_mode(model: nn.Module) -> None:
    """Raises: GradscaleError if a BatchNorm or an active dropout is in training mode."""
    check_dropout(model)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or module.running_mean is None):
            raise GradscaleError(
                f"BatchNorm {name} must be in eval mode with running statistics, got batch statistics, under which an "
                "example has no gradient of its own; return model.eval() from task.model()"
            )


def check_dropout(model: nn.Module) -> None:
    """Raises: GradscaleError if an active dropout is in training mode."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.training and module.p > 0:
            raise GradscaleError(
                f"dropout {name} must be off, got p={module.p} in training mode, under which a gradient is different "
                "every time; return model.eval() from task.model()"
            )
