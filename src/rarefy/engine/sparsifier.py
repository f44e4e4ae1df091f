"""The life of a sparse model: masks held, optimizer hooked, state saved and resumed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rarefy.engine import penalties
from rarefy.engine.compressed import CompressedLayer
from rarefy.engine.events import Cost, Event, net
from rarefy.engine.freezing import Freezer
from rarefy.engine.layer import Change, Layer
from rarefy.engine.loading import AfterLoad, check_free
from rarefy.engine.masked import MaskedLayer
from rarefy.engine.method import Method
from rarefy.engine.optimizer_state import Optimizers, check_optimizers, inside_another_step, was_skipped
from rarefy.engine.reparametrised import ReparametrisedLayer
from rarefy.engine.reserve import RESERVING, show
from rarefy.engine.selection import Selector, Target, check_fit, check_unmasked, find_targets, leave_all, set_aside
from rarefy.engine.state import check_state, collect
from rarefy.engine.summary import Row, Summary, added_since
from rarefy.errors import OptionError, nearest
from rarefy.metrics.flops import flops
from rarefy.nn import SparseModule
from rarefy.patterns import Pattern, parse_pattern

STORAGES: Mapping[str, type[MaskedLayer] | type[CompressedLayer]] = {
    "masked": MaskedLayer,
    "compressed": CompressedLayer,
}
REPORT_EVERY = 100
"""Steps between two log entries of a mask that moves at every step."""

Loss = Callable[[nn.Module, Any], Tensor]


class Sparsifier:
    """Holds the sparse layers of one model and works in hooks on the optimizer. Made by `rarefy.sparsify`.

    Attributes:
        layers: parameter name -> `Layer`, in the model's order.
        method: the method, with its options.
        clock: the method's update times.
        step_count: optimizer steps seen so far.
        events: every change of a mask, in order.
        memory: what the method remembers between steps.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        *,
        optimizer: Optimizer | Sequence[Optimizer] | None = None,
        include: Selector | Sequence[Selector] | None = None,
        exclude: Selector | Sequence[Selector] | None = None,
        calibration: Iterable[Any] | None = None,
        loss: Loss | None = None,
        total_steps: int | None = None,
        seed: int = 0,
        storage: str = "masked",
        state: dict[str, Any] | None = None,
    ) -> None:
        if storage not in STORAGES:
            raise OptionError(
                f"storage={storage!r} is not known{nearest(storage, STORAGES)}; it is one of {[*STORAGES]}."
            )
        if total_steps is not None and total_steps < 1:
            raise OptionError(f"total_steps={total_steps} must be at least 1, or None when it is not known.")
        if method.needs_calibration and calibration is None and state is None:
            raise OptionError(f"{method.name} looks at data before training: pass calibration=[batch, ...].")
        self.model = model
        self.method = method
        self.total_steps = total_steps
        self.clock = method.clock(total_steps)
        self.calibration = calibration
        self.loss = loss
        self.seed = seed
        self.step_count = 0
        self.events: list[Event] = []
        self.memory: dict[str, Any] = {}
        self.generator = torch.Generator().manual_seed(seed)
        self._optimizers = Optimizers(check_optimizers(optimizer))
        self._dense_gradient_steps = 0
        self._watching = self._factors_wanted = False
        self._freezer = Freezer(model)
        self._reloaded: dict[str, int] = {}
        self._handles: list[RemovableHandle] = []
        self._following: list[RemovableHandle] = []
        self._attached = False

        if method.prunes:
            targets, self.left_out = find_targets(model, include, exclude)
            if include is None:
                targets, aside = set_aside(targets, method.leaves)
                self.left_out += aside
        else:
            targets, self.left_out = [], leave_all(model, method.name, include, exclude)
        pattern: Pattern = parse_pattern(getattr(method, "pattern", "unstructured"))
        for cut in method.must_fit():
            check_fit(cut, targets)
        check_free(targets)
        check_unmasked(targets)
        self._stores = (RESERVING if method.reserves else STORAGES)[storage]
        self._computed = ReparametrisedLayer.made_for(method, targets, storage, self._optimizers, state is not None)
        plain, computed = ([t for t in targets if (t.name in self._computed) is which] for which in (False, True))
        self._stores.check(model, plain, pattern, self._optimizers)
        ReparametrisedLayer.check(model, computed, pattern, self._optimizers)
        self.layers: dict[str, Layer] = {t.name: self._make_layer(t, pattern) for t in targets}
        penalties.prepare(method, self.layers, self._optimizers)
        self._kept_steps = dict.fromkeys(self.layers, 0)
        self._further_gradients = dict.fromkeys(self.layers, 0)
        method.check(self)
        if state is None:
            method.choose(self)
            for layer in self.layers.values():
                layer.share()
            self.events = net(self.events)
            self._attach()
            with torch.no_grad():
                method.initialise(self)
            self._prepare_next_step()
        else:  # the weights are already those of the saved run: take its masks, and draw none
            check_state(state, self.method, self.total_steps, self.layers)
            self._take(state)
            self._attach()
        if not method.keeps_calibration:
            self.calibration = None  # seen, and not ours to keep alive
        held = self._optimizers.holders()
        if held and self.layers and not any(id(layer.target.parameter) in held for layer in self.layers.values()):
            warnings.warn(
                "The optimizer holds none of the sparse weights: was it made for another copy of the model? Until they are "
                "added to it, its steps do not train them.",
                stacklevel=4,
            )

    def _make_layer(self, target: Target, pattern: Pattern) -> Layer:
        told: Any = {"on_change": self._changed, "on_load": self._loaded}
        if target.name in self._computed:
            return ReparametrisedLayer(target, pattern, self._optimizers, self._computed[target.name], **told)
        return self._stores(target, pattern, self._optimizers, **told)

    # --- what it is -------------------------------------------------------------------------------------------------

    @property
    def nnz(self) -> int:
        """Kept weights of all sparse layers."""
        return sum(layer.nnz for layer in self.layers.values())

    @property
    def numel(self) -> int:
        """Weights of all sparse layers, kept or not."""
        return sum(layer.numel for layer in self.layers.values())

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the sparse layers; 0 where there are none."""
        return 1 - self.nnz / self.numel if self.layers else 0.0

    def masks(self) -> dict[str, Tensor]:
        """Return a bool copy of every mask by parameter name; True = kept."""
        return {name: layer.mask() for name, layer in self.layers.items()}

    def _dense_masks(self) -> dict[str, Tensor]:
        """The masks of weights that are dense tensors; compressed ones are counted as they are."""
        return {n: layer.mask() for n, layer in self.layers.items() if not isinstance(layer.module, SparseModule)}

    def magnitudes(self) -> dict[str, Tensor]:
        """Return |w| of every layer, weight-shaped."""
        return {name: layer.weight().abs() for name, layer in self.layers.items()}

    @property
    def has_penalty(self) -> bool:
        """Whether the method adds anything to the loss, at some time of its run."""
        return penalties.has_penalty(self.method) or penalties.has_proximal(self.method)

    def penalty(self) -> float:
        """Return what the method adds to the loss now, to be reported beside it; 0 where it adds nothing."""
        return penalties.value(self)

    def explored(self) -> float:
        """Return R_s, the share of weights that have been kept at any time so far (ITOP, arXiv 2102.02887)."""
        return sum(layer.explored() for layer in self.layers.values()) / self.numel if self.layers else 1.0

    def training_cost(self) -> dict[str, Cost]:
        """Return, for every layer, the sums that training FLOPs are counted from."""
        dense = {n: self.step_count if n in self._computed else self._dense_gradient_steps for n in self.layers}
        further = self._further_gradients
        return {n: Cost(self.step_count, kept, dense[n], further[n]) for n, kept in self._kept_steps.items()}

    def summary(self, example_input: Any = None) -> Summary:
        """Return a table of the layers; with an example input, also of their FLOPs (one forward pass is run)."""
        report = None if example_input is None else flops(self.model, example_input, self._dense_masks())
        rows = []
        for name, layer in self.layers.items():
            dense, kept = report.layers.get(name, (None, None)) if report is not None else (None, None)
            rows.append(Row(name, layer.shape, str(layer.pattern), layer.nnz, layer.numel, kept, dense))
        title = (
            f"{self.method.name}: {self.sparsity:.2%} of {self.numel:,} weights are zero, after {self.step_count} steps"
        )
        whole = None if report is None else (report.sparse, report.dense)
        return Summary(title, rows, self.left_out + added_since(self.model, self.layers, self.left_out), whole)

    def __repr__(self) -> str:
        return f"Sparsifier({self.method}, layers={len(self.layers)}, sparsity={self.sparsity:.4f}, step={self.step_count})"

    # --- one step ---------------------------------------------------------------------------------------------------

    def step(self) -> None:
        """Do what follows an optimizer step. Only for loops whose optimizer was not given to `sparsify`."""
        if self._optimizers.all:
            raise OptionError(
                "step() is for loops without a torch optimizer: this sparsifier follows its optimizer's steps."
            )
        if self.has_penalty:
            raise OptionError(
                f"{self.method.name} has a penalty, which joins the optimizer's steps: pass optimizer=..."
            )
        if any(layer.extras for layer in self.layers.values()):
            raise OptionError(f"{self.method.name} trains parameters of its own: pass optimizer=..., and they join it.")
        for layer in self.layers.values():
            layer.after_step()
        self._advance()

    def _before_optimizer_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        return show([layer for layer in self.layers.values() if id(layer.target.parameter) in held], args, kwargs)

    def _after_optimizer_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if inside_another_step(optimizer):
            return
        turn = self._optimizers.turn(optimizer, {n: layer.target.parameter for n, layer in self.layers.items()})
        mine, is_clock = [self.layers[name] for name in turn.mine], turn.is_clock
        skipped = was_skipped(optimizer)
        for layer in mine:
            layer.after_step()
            if skipped:
                layer.watch_gradient(self._watching, carry=None)
                layer.watch_factors(self._factors_wanted)
            else:
                penalties.proximal_step(self, layer)
        if is_clock and not skipped:
            self._advance()

    def _advance(self) -> None:
        self._announce_reload()
        self.step_count += 1
        self._dense_gradient_steps += self._watching
        for name, layer in self.layers.items():
            self._kept_steps[name] += layer.nnz
            self._further_gradients[name] += layer.resting
            layer.refresh()
        with torch.no_grad():
            self.method.after_step(self, self.step_count)
        for name, layer in self.layers.items():
            self._further_gradients[name] += layer.further_gradients
            layer.further_gradients = 0
        if self.step_count % REPORT_EVERY == 0:
            self._report()
        self._prepare_next_step()

    def _report(self) -> None:
        for layer in self.layers.values():
            layer.report()

    def _prepare_next_step(self, *, resumed: bool = False) -> None:
        step = self.step_count + 1
        self._watching = self.method.wants_gradient(self, step)
        carry = None if resumed else self.method.carries_gradient(self, step)
        self._factors_wanted = self.method.wants_factors(self, step)
        for layer in self.layers.values():
            layer.watch_gradient(self._watching, carry)
            layer.watch_factors(self._factors_wanted)
        if (still := self.method.freezes(self, step)) != self._freezer.on:
            self._freezer.set(still, {id(extra) for layer in self.layers.values() for extra in layer.extras.values()})
            self._optimizers.start_evenly()

    def _changed(self, layer: Layer, change: Change) -> None:
        self.events.append(Event(self.step_count, layer.name, change.dropped, change.grown, layer.nnz))

    # --- attaching and leaving --------------------------------------------------------------------------------------

    def _attach(self) -> None:
        for layer in self.layers.values():
            layer.attach()
        self._handles.append(self.model.register_load_state_dict_post_hook(AfterLoad(self)))
        self._attached = True
        self.follow(self._optimizers.all)

    def follow(self, optimizer: Optimizer | Sequence[Optimizer]) -> None:
        """Follow these optimizers from now on and no others: made after `sparsify`, or anew for another training."""
        if not self._attached:
            raise OptionError("This sparsifier has left its model: there is nothing for an optimizer to keep sparse.")
        self._optimizers.all = Optimizers(check_optimizers(optimizer)).all
        for handle in self._following:
            handle.remove()
        self._following = [o.register_step_post_hook(self._after_optimizer_step) for o in self._optimizers.all]
        if self.method.reserves:
            self._following += [o.register_step_pre_hook(self._before_optimizer_step) for o in self._optimizers.all]
        if penalties.has_penalty(self.method):
            hook = penalties.PenaltyHook(self)
            self._following += [o.register_step_pre_hook(hook) for o in self._optimizers.all]

    def detach(self) -> None:
        """Stop managing the model and leave its weights as they are: from now on nothing keeps the zeros.

        Where the network computed with other weights than it trained, the trained ones are left.
        """
        self._report()
        self._freezer.set(False)
        for layer in self.layers.values():
            layer.detach()
        for handle in self._handles + self._following:
            handle.remove()
        self._handles.clear()
        self._following.clear()
        self._attached = False

    def finalize(self, *, compressed: bool = False) -> nn.Module:
        """Make every dropped weight exactly zero, stop managing the model, and return it: plain again.

        With compressed storage the dense layers come back, their parameters and state in the optimizers too;
        `compressed=True` leaves the sparse layers in their place. Layers that were sparse before stay so in any case.
        Where the network computed with other weights than it trained, the computed ones become its own, names as before,
        and what was trained beside them leaves the optimizers.
        """
        if self._attached:
            for layer in self.layers.values():
                layer.refresh()  # weights that no mask can be found for are refused before anything is changed
            for layer in self.layers.values():
                layer.enforce()
            self.detach()
            for layer in self.layers.values():
                layer.restore(compressed)
        return self.model

    # --- loading dense weights --------------------------------------------------------------------------------------

    def _loaded(self, layer: Layer, revived: int) -> None:
        self._reloaded[layer.name] = revived

    def after_load(self) -> None:
        """Apply the masks where only another name of a tied weight was loaded, and say what was not zero."""
        for layer in self.layers.values():
            if layer.target.aliases:
                layer.after_load()
        self._announce_reload()

    def _announce_reload(self) -> None:
        if self._reloaded:
            names = ", ".join(f"{name} ({count:,})" for name, count in self._reloaded.items())
            self._reloaded = {}
            warnings.warn(
                f"The loaded state has non-zero weights where the masks are zero: {names}. The masks were applied to them; "
                "loading a sparsifier's state before the next step brings its own masks and weights back.",
                stacklevel=2,
            )

    # --- saving and resuming ----------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return everything an exact resume needs beside the model's and the optimizer's state.

        Only tensors, numbers, strings, lists and dicts: `torch.load(weights_only=True)` reads it. Masks are bit-packed.
        """
        return collect(self) | {
            "dense_gradient_steps": self._dense_gradient_steps,
            "kept_steps": dict(self._kept_steps),
            "further_gradients": dict(self._further_gradients),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state_dict()` was taken, in any order with the model's and the optimizer's own loading.

        Raises StateError, and changes nothing, when the state is of another method, other options or another model.
        """
        check_state(state, self.method, self.total_steps, self.layers)
        self._take(state)

    def _take(self, state: dict[str, Any]) -> None:
        for name, layer in self.layers.items():
            layer.load_state_dict(state["layers"][name])
        names = list(self.layers)
        self.events = [Event(s, names[i], d, g, k) for s, i, d, g, k in state["events"].tolist()]
        self.step_count = state["step"]
        self.seed = state["seed"]
        self.generator.set_state(state["generator"])
        self.memory = dict(state["memory"])
        self._dense_gradient_steps = state["dense_gradient_steps"]
        self._kept_steps = dict(state["kept_steps"])
        self._further_gradients = dict(state["further_gradients"])
        self._reloaded = {}
        self._prepare_next_step(resumed=True)
