"""Compressed storage: only the kept values and their indices exist, in the parameter, its gradient and the optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rarefy import kernels
from rarefy.engine import conversion
from rarefy.engine.dense_gradient import DenseGradient
from rarefy.engine.distributed import active, check_length, from_first_rank
from rarefy.engine.factors import Factors
from rarefy.engine.layer import Change, Layer
from rarefy.engine.loading import AfterLoad
from rarefy.engine.optimizer_state import Optimizers
from rarefy.engine.positions import by_group, draw
from rarefy.engine.selection import Target
from rarefy.engine.state import are_positions, check_layer, check_mask
from rarefy.errors import OptionError, RarefyError, StateError
from rarefy.kernels.watch import watch
from rarefy.nn import SparseModule
from rarefy.nn.topology import Move, compress, flat_positions, problem, union
from rarefy.patterns import Pattern


class CompressedLayer(Layer):
    """A layer that becomes a `rarefy.nn.SparseModule` in its place; that module's indices are the one truth of what it keeps.

    Choices are the chosen weights' flat positions, int64, ascending. Patterns: unstructured and fan-in.
    """

    def __init__(
        self,
        target: Target,
        pattern: Pattern,
        optimizers: Optimizers,
        *,
        on_change: Callable[[Layer, Change], None],
        on_load: Callable[[Layer, int], None],
    ) -> None:
        super().__init__(target, pattern, optimizers)
        self._given = isinstance(target.module, SparseModule)
        self._chosen: Tensor | None = None  # what the weight is to keep, while it is not attached
        self._ever: Tensor | None = None  # union of all kept positions, made when they first change
        self._known = 0  # kept values when last looked at
        self._on_change = on_change
        self._attached = False
        self._handles: list[RemovableHandle] = []
        self._gradient = DenseGradient()
        self._end: Callable[[], None] | None = None

    @classmethod
    def check(cls, model: nn.Module, targets: Sequence[Target], pattern: Pattern, optimizers: Optimizers) -> None:
        conversion.check(model, targets, pattern, optimizers)

    # --- what it holds ----------------------------------------------------------------------------------------------

    @property
    def given(self) -> bool:
        return self._given

    @property
    def _sparse(self) -> SparseModule:
        assert isinstance(self.module, SparseModule)
        return self.module

    @property
    def nnz(self) -> int:
        if self._chosen is not None:
            return self._chosen.numel()
        return self.module.nnz if isinstance(self.module, SparseModule) else self.numel

    def _kept(self) -> Tensor:
        """Return the ascending flat positions of the kept weights."""
        return self._held()

    def _held(self) -> Tensor:
        """Return the ascending flat positions of all weights that the module holds."""
        device = self.target.parameter.device
        if self._chosen is not None:
            return self._chosen.to(device)
        if isinstance(self.module, SparseModule):
            return self.module.positions()
        return torch.arange(self.numel, device=device)

    def _values(self) -> Tensor:
        """Return the kept weights in the order of their positions, detached."""
        parameter = self.target.parameter.detach()
        if not isinstance(self.module, SparseModule):
            return parameter.reshape(-1)[self._kept()]
        return parameter if self._chosen is None else Move(self.module.positions(), self._kept()).carry(parameter)

    def mask(self) -> Tensor:
        flat = torch.zeros(self.numel, dtype=torch.bool, device=self.target.parameter.device)
        flat[self._kept()] = True
        return flat.view(self.shape)

    def weight(self) -> Tensor:
        if not isinstance(self.module, SparseModule) and self._chosen is None:
            return self.target.parameter.detach()
        flat = self._values().new_zeros(self.numel)
        flat[self._kept()] = self._values()
        return flat.view(self.shape)

    def newcomers(self, chosen: Tensor) -> Tensor:
        return self.counts(chosen[~torch.isin(chosen, self._kept())])

    def live_weight(self) -> Tensor:
        flat = torch.zeros(self.numel, dtype=self._sparse.values.dtype, device=self._sparse.values.device)
        return flat.index_put((self._kept(),), self._sparse.values).view(self.shape)

    def _weight_step(self) -> float | Tensor | None:
        step = super()._weight_step()
        if not isinstance(step, Tensor) or step.dim() == 0:
            return step
        return step.new_ones(self.numel).index_put((self._kept(),), step).view(self.shape)

    def values(self) -> Tensor:
        return self._values().clone()

    def counts(self, *chosen: Tensor) -> Tensor:
        if self.groups == 1 and not chosen:
            return torch.tensor([self.nnz])
        kept = union(*chosen) if chosen else self._kept()
        return torch.bincount(kept // self.units_per_group, minlength=self.groups)

    def kept_per_output(self) -> Tensor:
        return torch.bincount(self._kept() // (self.numel // self.shape[0]), minlength=self.shape[0])

    def kept_per_input(self) -> Tensor:
        kept, inputs = self._kept(), self.shape[1]
        group = kept // (self.numel // self.channel_groups)
        column = kept // (self.numel // (self.shape[0] * inputs)) % inputs
        return torch.bincount(group * inputs + column, minlength=self.channel_groups * inputs)

    def explored(self) -> int:
        return self.nnz if self._ever is None else self._ever.numel()

    # --- choosing ---------------------------------------------------------------------------------------------------

    def best(
        self, scores: Tensor, counts: Tensor, *, among: Tensor | None = None, besides: Tensor | None = None
    ) -> Tensor:
        pooled = self.pattern.pool(scores)
        if among is not None:
            only = torch.full_like(pooled, -math.inf)
            only.view(-1)[among] = pooled.reshape(-1)[among]
            pooled = only
        if besides is not None:
            pooled = pooled.reshape(-1).index_fill(0, besides, -math.inf).view(pooled.shape)
        return self._select(pooled, counts).reshape(-1).nonzero().squeeze(1)

    def kept(self, where: Tensor | None = None) -> Tensor:
        return self._kept() if where is None else self._kept()[where]

    def largest_magnitudes(self, counts: Tensor | int) -> Tensor:
        kept, scores = self._kept(), self._values().abs()
        if isinstance(counts, int) or self.groups == 1:
            return kept[self._select(scores, int(counts))]
        table, where = by_group(kept // self.units_per_group, scores, self.groups)
        return kept[self._select(table, counts)[where]]

    def largest_gradients(self, counts: Tensor | int, *, besides: Tensor | None = None) -> Tensor:
        module = self._seen()
        besides = self._kept()[:0] if besides is None else besides
        try:
            if isinstance(counts, int) or self.groups == 1:
                return self._gradient.largest(module, int(counts), besides)
            return self._gradient.largest_in_rows(module, counts, besides)
        except OptionError as error:
            raise self._diverged(error) from error

    def _keeps(self, places: Tensor) -> Tensor:
        kept = self._kept()
        if not kept.numel():
            return torch.zeros_like(places, dtype=torch.bool)
        return kept[torch.searchsorted(kept, places).clamp_(max=kept.numel() - 1)] == places

    def at(self, places: Tensor) -> Tensor:
        return places.to(self.target.parameter.device).unique()

    def mean_gradient(self) -> float:
        return float(self._gradient.at(self._seen(), self._kept()).abs().mean(dtype=torch.float64))

    def _seen(self) -> SparseModule:
        if not self._gradient.parts and not active():
            raise RarefyError(f"{self.name} {list(self.shape)}: no dense gradient was collected for this step.")
        return self._sparse

    def random(self, counts: Tensor, generator: torch.Generator, *, besides: Tensor | None = None) -> Tensor:
        if besides is None:
            besides = torch.empty(0, dtype=torch.int64, device=self.target.parameter.device)
        return draw(self.groups, self.units_per_group, counts, generator, besides)

    def spread(self, chosen: Tensor) -> Tensor:
        flat = torch.zeros(self.numel, dtype=torch.bool, device=chosen.device)
        return flat.index_fill_(0, chosen, True).view(self.shape)

    def _select(self, scores: Tensor, counts: Tensor | int) -> Tensor:
        try:
            return kernels.select_k(scores, counts)
        except OptionError as error:  # NaN: training has diverged
            raise self._diverged(error) from error

    def _diverged(self, error: OptionError) -> OptionError:
        return OptionError(f"{self.name} {list(self.shape)}: {error}; try a lower learning rate")

    # --- changing ---------------------------------------------------------------------------------------------------

    def rewire(self, *chosen: Tensor) -> Change:
        return self._keep(union(*chosen))

    def keep(self, mask: Tensor) -> Change:
        check_mask(self, mask)
        return self._keep(mask.reshape(-1).nonzero().squeeze(1).to(self.target.parameter.device))

    @torch.no_grad()
    def _keep(self, new: Tensor) -> Change:
        if self._attached:
            old = self._kept()
            check_length(self.name, old.numel(), new.numel())
            move = self._sparse.rewire_(new)
            self._optimizers.follow(self._sparse.values, old.numel(), move.carry)
            self._ever = union(old if self._ever is None else self._ever.to(new.device), new)
            self._known, self._dead = new.numel(), None
            self._enforce_bias(afresh=True)
            change = Change(move.dropped, move.grown)
        else:
            if self.nnz < self.numel:
                move = Move(self._kept(), new)
                change = Change(move.dropped, move.grown)
            else:  # all were kept
                change = Change(self.numel - new.numel(), 0)
            self._chosen = new
        self._on_change(self, change)
        return change

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        kept = self._kept()
        self._sparse.values.copy_(weight.reshape(-1).to(kept.device)[kept])

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        self._sparse.values.copy_(values)

    @torch.no_grad()
    def scale_outputs(self, factors: Tensor) -> None:
        self._sparse.values.mul_(factors.to(self._sparse.values)[self._sparse.row_indices()])

    # --- the life of the weight -------------------------------------------------------------------------------------

    def share(self) -> None:
        if not active():
            return
        mine = self._kept()
        shared = self._from_first(mine)
        if not torch.equal(mine, shared):
            self._keep(shared)

    @staticmethod
    def _from_first(mine: Tensor) -> Tensor:
        """Return rank 0's positions."""
        count = from_first_rank(torch.tensor(mine.numel(), device=mine.device))
        return from_first_rank(mine if mine.numel() == int(count) else mine.new_zeros(int(count)))

    @torch.no_grad()
    def attach(self) -> None:
        if not isinstance(self.module, SparseModule):
            conversion.compress(self.module, self._chosen, self._optimizers)
        elif self._chosen is not None:
            move = self.module.rewire_(self._chosen)
            self._optimizers.follow(self.module.values, move.dropped + move.staying, move.carry)
        self._chosen, self._attached, self._known = None, True, self._sparse.nnz
        self._handles.append(self.module.register_load_state_dict_post_hook(AfterLoad(self)))
        self._hook_parameter()

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._attached = False
        self._gradient.watch(None)
        self.watch_factors(False)

    def restore(self, compressed: bool) -> None:
        if not compressed and not self._given and isinstance(self.module, SparseModule):
            self._chosen = self._kept()
            conversion.decompress(self.module, self._optimizers)

    def enforce(self) -> None:
        if self._attached:  # nothing but what is kept exists
            self._enforce_bias()
            self._hook_parameter()

    def after_step(self) -> None:
        self.enforce()
        self._gradient.close()
        self._end_factors()

    def _hook_parameter(self) -> None:
        """Watch the parameter that the module holds now: it may have been replaced or unfrozen at any time."""
        parameter = self._sparse.values
        hooks = parameter._post_accumulate_grad_hooks
        if parameter.requires_grad and not (hooks and any(hook == self._after_backward for hook in hooks.values())):
            self._handles.append(parameter.register_post_accumulate_grad_hook(self._after_backward))

    @torch.no_grad()
    def _after_backward(self, parameter: Tensor) -> None:
        if parameter is self._sparse.values:
            self._gradient.commit(parameter)
            self._factors.commit(parameter.grad)

    def watch_gradient(self, wanted: bool, carry: float | None = 0.0) -> None:
        self._gradient.watch(self._sparse if wanted else None, carry)

    def watch_factors(self, wanted: bool) -> None:
        self._end_factors()
        self._factors.begin()
        if wanted and self._sparse.values.requires_grad:
            self._end = watch(self._sparse.crow, self._see_factors)
        else:
            self._factors.close()

    def _see_factors(self, x: Tensor, dy: Tensor, *geometry: Any) -> None:
        self._factors.see(Factors(x.detach().clone(), dy.detach().clone(), geometry), self._sparse.values.grad)

    def _end_factors(self) -> None:
        self._factors.close()
        if self._end is not None:
            self._end()
        self._end = None

    @property
    def has_gradient(self) -> bool:
        return self._gradient.usable(self.target.parameter.device)

    @torch.no_grad()
    def after_load(self) -> None:
        """Fit optimizer state to what was loaded, where its number of weights is another one and none was loaded with it."""
        self._fit_optimizers()
        self._hook_parameter()

    def _fit_optimizers(self) -> None:
        self._dead = None
        new = self._sparse.nnz
        if new != self._known:
            self._optimizers.follow(self._sparse.values, self._known, lambda t, fresh: t.new_full((new,), fresh))
        self._known = new

    # --- saving -----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, object]:
        crow, col = compress(self._kept().cpu(), *self._flat_shape())
        return {
            "shape": list(self.shape),
            "pattern": str(self.pattern),
            "crow": crow,
            "col": col,
            "explored": None if self._ever is None else self._ever.cpu(),
            "gradient": self._gradient.state(),
        }

    def _flat_shape(self) -> tuple[int, int]:
        return self.shape[0], self.numel // self.shape[0]

    def check_state(self, state: object) -> None:
        if isinstance(state, dict) and "mask" in state:
            raise StateError(f'{self.name}: the state was saved with storage="masked"; this one is compressed.')
        state = check_layer(self, state, "crow", "col", "explored", "gradient")
        crow, col, ever = state["crow"], state["col"], state["explored"]
        if not isinstance(crow, Tensor) or not isinstance(col, Tensor):
            raise StateError(f"{self.name}: the saved indices are not tensors.")
        if wrong := problem(col, crow, col, *self._flat_shape()):
            raise StateError(f"{self.name} {list(self.shape)}: the saved indices are damaged: {wrong}.")
        if ever is not None and not are_positions(ever, self.numel):
            raise StateError(f"{self.name} {list(self.shape)}: the saved explored is not a list of its positions.")
        if not self._gradient.fits(state["gradient"], *self._flat_shape()):
            raise StateError(f"{self.name} {list(self.shape)}: the saved gradient is not one of this weight.")

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        device = self.target.parameter.device
        saved = self._saved_positions(state).to(device)
        if not self._attached:
            self._chosen = saved
        elif not torch.equal(saved, self._held()):  # the weights and the optimizer's state come before or after this
            self._sparse.rewire_(saved)
            self._fit_optimizers()
        ever = state["explored"]
        self._ever = None if ever is None else ever.to(device)
        self._gradient.load_state(state["gradient"], self.target.parameter)

    def _saved_positions(self, state: dict[str, Any]) -> Tensor:
        """Return the positions that the module held when the state was saved."""
        return flat_positions(state["crow"], state["col"], self._flat_shape()[1])
