# Copyright 2026 The MEViT authors.
# SPDX-License-Identifier: Apache-2.0
"""The losses of a multi-exit Vision Transformer, equations 1, 2, 4 and 5, as pure functions.

B samples, E exits in ascending order (the last one is the last encoder layer's), L labels. Everything is computed in
float32, whatever the logits' precision, and averaged over the batch, never over the exits.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(exit_logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of each exit, the first term of equation 1.

    Args:
        exit_logits: (B, E, L).
        labels: (B,), int64.

    Returns:
        (E,), means over the batch.

    Raises:
        ValueError: if a label is not in 0 … L − 1.

    Example:

    ```python
    >>> import torch
    >>> exit_logits = torch.tensor([[[0.8, 0.2], [0.5, 0.5]]]).log()  # 1 sample, 2 exits, 2 labels
    >>> cross_entropy(exit_logits, torch.tensor([0])).exp()  # 1 / 0.8 and 1 / 0.5
    tensor([1.2500, 2.0000])

    ```
    """
    num_exits, num_labels = exit_logits.shape[1:]
    is_compiling = torch.compiler.is_compiling()  # a check of values would break the graph
    if not is_compiling and labels.numel() and not (labels.min() >= 0 and labels.max() < num_labels):
        raise ValueError(
            f"labels must be from 0 to {num_labels - 1}, since the model has {num_labels} labels; "
            f"got {labels.min().item()} to {labels.max().item()}."
        )
    per_sample = F.cross_entropy(
        exit_logits.float().flatten(0, 1),  # (B·E, L)
        labels.repeat_interleave(num_exits),  # (B·E,)
        reduction="none",
    )
    return per_sample.view(-1, num_exits).mean(0)


def uncertainty_target(exit_logits: Tensor, labels: Tensor) -> Tensor:
    """What the uncertainty predictor is to predict, detached: equation 4, `ũ_i = tanh(|f_i(h_i) − y|)`.

    The paper writes a difference of logits and label. It is read here as the L1 distance between the softmax and the
    one-hot label, `tanh(‖softmax(f_i) − onehot(y)‖₁)`: the label's own entry gives 1 − p_y and all others together
    give 1 − p_y as well, so the norm is 2·(1 − p_y).

    Args:
        exit_logits: (B, E, L).
        labels: (B,), int64.

    Returns:
        (B, E), in [0, tanh 2], without gradient.

    Example:

    ```python
    >>> import torch
    >>> exit_logits = torch.tensor([[[0.8, 0.2], [0.5, 0.5]]]).log()
    >>> uncertainty_target(exit_logits, torch.tensor([0])).atanh()
    tensor([[0.4000, 1.0000]])

    ```
    """
    logits = exit_logits.detach().float()
    label_index = labels[:, None, None].expand(-1, logits.shape[1], 1)  # (B, E, 1)
    label_probability = logits.softmax(-1).gather(-1, label_index).squeeze(-1)  # (B, E)
    return torch.tanh(2 * (1 - label_probability))


def uncertainty_loss(uncertainty: Tensor, target: Tensor) -> Tensor:
    """Squared error of the predicted uncertainty, equation 2, `(u_i − ũ_i)²`.

    Args:
        uncertainty: (B, E), predicted.
        target: (B, E), of [`uncertainty_target`].

    Returns:
        (E,), means over the batch.
    """
    return (uncertainty.float() - target).square().mean(0)


def distillation_loss(exit_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback–Leibler divergence of each early exit from the last one, equation 5, times temperature².

    `KL_i = Σ_c p_n(c) · ln(p_n(c) / p_i(c))`, where p is the softmax of logits / temperature. The teacher p_n is
    detached: the last exit learns from labels alone.

    Args:
        exit_logits: (B, E, L), the teacher's in last place.
        temperature: above 0; the factor temperature² keeps the gradient's size (Hinton et al., 2015).

    Returns:
        (E − 1,), means over the batch.
    """
    log_probabilities = F.log_softmax(exit_logits.float() / temperature, dim=-1)
    students, teacher = log_probabilities[:, :-1], log_probabilities[:, -1:].detach()
    divergence = F.kl_div(students, teacher.expand_as(students), reduction="none", log_target=True).sum(-1)
    return temperature**2 * divergence.mean(0)
