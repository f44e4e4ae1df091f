"""The front door."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.optim import Optimizer

from rarefy import methods
from rarefy.engine import Loss, Method, Selector, Sparsifier
from rarefy.errors import OptionError


def sparsify(
    model: nn.Module,
    method: str | Method,
    *,
    sparsity: float | None = None,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    include: Selector | Sequence[Selector] | None = None,
    exclude: Selector | Sequence[Selector] | None = None,
    calibration: Iterable[Any] | None = None,
    loss: Loss | None = None,
    total_steps: int | None = None,
    seed: int = 0,
    storage: str = "masked",
    state: dict[str, Any] | None = None,
    **method_options: Any,
) -> Sparsifier:
    """Make a model sparse, in place, and keep it so while it trains.

    Names, shapes and state-dict keys stay (with masked storage); the training loop stays as it is: the work is done in hooks
    on the optimizer. Methods that train masks (`movement`, `trainable-threshold`, `lottery-jackpots`) or N:M weights (`ste`,
    `sr-ste`, `t-mask`, `bdwp`, `pgf`) compute with other weights than they train: until `finalize()`, "fc.weight" is
    "fc.parametrizations.weight.original" in the state dict, and what they train beside it has joined the optimizer (see
    `rarefy.nn.Reparametrisation`).

    Args:
        model: any module that holds Linear, Conv1d/2d/3d, Embedding, MultiheadAttention or RNN weights. Biases and norms
            stay dense; tied weights count once.
        method: a name (`rarefy methods` lists them) or a method, e.g. `rarefy.methods.RigL(sparsity=0.9)`.
        sparsity: fraction of zeros over the sparse layers, in [0, 1).
        optimizer: the optimizer, or several, that will train the model. Without one call `sparse.step()` after each step.
        include, exclude: which layers: a name glob ("blocks.*"), a compiled regular expression, a module type, a
            predicate(name, module), or a list of these. What matches nothing is an error, and so is a layer that the pattern
            does not fit; methods of N:M training leave such layers dense, listed with the reason, where `include` is not given.
        calibration: batches for methods that look at data before training.
        loss: `loss(model, batch) -> scalar` for those; by default the cross-entropy of a batch (x, y).
        total_steps: optimizer steps of the whole run; schedules given as fractions need it.
        seed: of all random choices; the same seed gives the same masks on every device and rank.
        storage: "masked" (default): dense parameters that are exactly zero outside a boolean mask. "compressed": Linear and
            Conv2d layers become `rarefy.nn` layers in their place, which hold and train their kept values and nothing
            else; `finalize()` brings the dense ones back. Unstructured and fan-in patterns; give the optimizer here, for
            it gets the new parameters. Layers that are sparse before keep their own first topology.
        state: a `Sparsifier.state_dict()` to continue from. The model and optimizer already hold what was saved with it; no
            mask is drawn and no weight changes. (Methods that train masks: load both after this call, for only then do they
            have the places for it.)
        method_options: options of the method, see `rarefy methods NAME`.

    Returns:
        The `Sparsifier`: masks, summary, state, events; `finalize()` gives the plain model back.

    Raises:
        RarefyError: a subclass that says what, where, and what to do. The model is then as it was.

    Example:
        >>> import torch, rarefy
        >>> model = torch.nn.Sequential(torch.nn.Linear(20, 30), torch.nn.ReLU(), torch.nn.Linear(30, 10))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> sparse = rarefy.sparsify(model, "rigl", sparsity=0.9, optimizer=optimizer, every=2)
        >>> for _ in range(4):
        ...     loss = model(torch.randn(8, 20)).square().mean()
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> sparse.nnz, sum(int(p.count_nonzero()) <= 90 for p in model.parameters())
        (90, 4)
    """
    if isinstance(method, str):
        method = methods.make(method, **({} if sparsity is None else {"sparsity": sparsity}), **method_options)
    elif sparsity is not None or method_options:
        given = ", ".join(["sparsity"] * (sparsity is not None) + list(method_options))
        raise OptionError(f"{given}: give the options to the method itself, or the method by its name.")
    return Sparsifier(
        model,
        method,
        optimizer=optimizer,
        include=include,
        exclude=exclude,
        calibration=calibration,
        loss=loss,
        total_steps=total_steps,
        seed=seed,
        storage=storage,
        state=state,
    )
