"""Optimizer state of dropped and grown weights: it must be as if the weight had never been trained."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.engine.step_size import step_size
from rarefy.errors import OptionError

_WRAPPER_FILE = inspect.getsourcefile(Optimizer)  # where torch's wrapper around `step` lives


def fresh_value(optimizer: Optimizer, group: dict[str, Any], key: str) -> float:
    """Return what a per-element state tensor holds for a weight that has never moved: 0, but for two optimizers."""
    if isinstance(optimizer, torch.optim.Rprop) and key == "step_size":
        return float(group["lr"])
    if isinstance(optimizer, torch.optim.Adagrad) and key == "sum":
        return float(group["initial_accumulator_value"])
    return 0.0


class Turn(NamedTuple):
    """What an optimizer's step is about: names of its parameters, and whether this is the step that counts."""

    mine: list[str]
    is_clock: bool


class Optimizers:
    """The user's optimizers, looked up afresh at every call: parameters and groups may be added at any time."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.all = list({id(optimizer): optimizer for optimizer in optimizers}.values())

    def holders(self) -> dict[int, list[Optimizer]]:
        """Return which optimizers hold each parameter, by the parameter's id."""
        found: dict[int, list[Optimizer]] = {}
        for optimizer in self.all:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    found.setdefault(id(parameter), []).append(optimizer)
        return found

    def learning_rate(self, parameter: nn.Parameter) -> float:
        """Return the learning rate of the group that holds the parameter (of several: the first); 0 where none does."""
        return next((float(group["lr"]) for _, group in self._groups(parameter)), 0.0)

    @torch.no_grad()
    def refresh(self, parameter: nn.Parameter, where: Tensor) -> None:
        """Set every per-element state tensor of `parameter` to its fresh value wherever `where` (bool) is True."""
        for optimizer, group in self._groups(parameter):
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    value.masked_fill_(where.to(value.device), fresh_value(optimizer, group, key))

    @torch.no_grad()
    def change(self, parameter: nn.Parameter, change: Callable[[Tensor], None]) -> None:
        """Let `change` work in place on every per-element state tensor of `parameter`."""
        for optimizer, _ in self._groups(parameter):
            for value in optimizer.state.get(parameter, {}).values():
                if isinstance(value, Tensor) and value.shape == parameter.shape:
                    change(value)

    def not_per_element(self, parameter: nn.Parameter) -> Iterator[tuple[Optimizer, str]]:
        """Yield the state that is neither one number for each weight nor one for all: row sums, histories."""
        for optimizer, group in self._groups(parameter):
            shared = optimizer.state.get(group["params"][0], {}) if isinstance(optimizer, torch.optim.LBFGS) else {}
            for key, value in [*optimizer.state.get(parameter, {}).items(), *shared.items()]:
                size = (
                    value.numel() if isinstance(value, Tensor) else len(value) if isinstance(value, list | tuple) else 1
                )
                if size > 1 and not (isinstance(value, Tensor) and value.shape == parameter.shape):
                    yield optimizer, key

    @torch.no_grad()
    def exchange(self, old: nn.Parameter, new: nn.Parameter, convert: Callable[[Tensor, float], Tensor]) -> None:
        """Put `new` in the place of `old`, with `convert(state tensor, fresh value)` of every per-element state tensor.

        State that is neither per element nor one number (row and column sums, histories) starts afresh.
        """
        for optimizer, group in list(self._groups(old)):
            params = group["params"]
            params[[p is old for p in params].index(True)] = new
            state, mine = optimizer.state.pop(old, {}), {}
            for key, value in state.items():
                if isinstance(value, Tensor) and value.shape == old.shape:
                    mine[key] = convert(value, fresh_value(optimizer, group, key))
                elif not isinstance(value, list | tuple) and (
                    not isinstance(value, Tensor) or value.numel() == 1 or value.shape == new.shape
                ):
                    mine[key] = value
            if len(mine) == len(state) > 0:
                optimizer.state[new] = mine
            if hasattr(optimizer, "_numel_cache"):  # L-BFGS
                optimizer._numel_cache = None

    def check_join(self, parameter: nn.Parameter, beside: nn.Parameter, name: str) -> None:
        """Raise OptionError where `join` cannot be done."""
        optimizers = [optimizer for optimizer, _ in self._groups(beside)]
        if not optimizers:
            raise OptionError(
                f"{name} {list(parameter.shape)} is trained beside its weight, which no optimizer holds: make the optimizer "
                "with this weight in it, or exclude the layer."
            )
        if parameter.dim() != 2 and any(type(o).__name__ == "Muon" for o in optimizers):
            raise OptionError(
                f"{name} {list(parameter.shape)} cannot join Muon, which trains matrices: give this layer's weight to another "
                "optimizer."
            )

    @torch.no_grad()
    def join(self, parameter: nn.Parameter, beside: nn.Parameter, name: str) -> None:
        """Train `parameter` wherever `beside` is: in the same group, whose options and schedule hold for both.

        Not in a group of its own: schedulers refuse optimizers that have more groups than when they were made.
        """
        for optimizer, group in list(self._groups(beside)):
            group["params"].append(parameter)
            if "param_names" in group:
                group["param_names"].append(name)
            if isinstance(optimizer, torch.optim.Adagrad):  # it makes its state when it is made itself
                fresh = fresh_value(optimizer, group, "sum")
                step = torch.zeros_like(optimizer.state[beside]["step"])
                optimizer.state[parameter] = {"step": step, "sum": torch.full_like(parameter, fresh)}
            _forget_history(optimizer)
        self.start_evenly()

    @torch.no_grad()
    def start_evenly(self) -> None:
        """Let fused SGD take up parameters that begin later: it refuses a group of which only some have momentum."""
        for optimizer in self.all:
            for group in optimizer.param_groups if isinstance(optimizer, torch.optim.SGD) else ():
                states = {p: optimizer.state.get(p, {}) for p in group["params"]}
                if group["fused"] and any(state.get("momentum_buffer") is not None for state in states.values()):
                    for p, state in states.items():
                        if state.get("momentum_buffer") is None:
                            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)

    def leave(self, parameter: nn.Parameter) -> None:
        """Undo `join`."""
        for optimizer, group in list(self._groups(parameter)):
            place = [p is parameter for p in group["params"]].index(True)
            for key in ("params", "param_names"):
                if key in group:
                    del group[key][place]
            optimizer.state.pop(parameter, None)
            _forget_history(optimizer)

    @torch.no_grad()
    def follow(self, parameter: nn.Parameter, old: int, change: Callable[[Tensor, float], Tensor]) -> None:
        """Give every state tensor of the `old` number of elements the content `change(tensor, fresh value)`."""
        for optimizer, group in self._groups(parameter):
            state = optimizer.state.get(parameter, {})
            for key, value in state.items():
                if isinstance(value, Tensor) and tuple(value.shape) == (old,):
                    new = change(value, fresh_value(optimizer, group, key))
                    if new.shape == value.shape:
                        value.copy_(new)
                    else:
                        state[key] = new

    def step_size(self, parameter: nn.Parameter) -> float | Tensor | None:
        """Return how far the parameter's optimizer goes along a constant gradient in a step; None: none holds it."""
        found = next(self._groups(parameter), None)
        return None if found is None else step_size(*found, found[0].state.get(parameter, {}))

    def learning_rates(self) -> list[float]:
        """Return the learning rate of every parameter group."""
        return [float(group["lr"]) for o in self.all for group in o.param_groups if "lr" in group]

    @torch.no_grad()
    def start_afresh(self) -> None:
        """Bring all state to what it was before the first step; groups and learning rates stay as they are."""
        for optimizer in self.all:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if not isinstance(optimizer, torch.optim.Adagrad):
                        optimizer.state.pop(parameter, None)  # made at the next step
                        continue
                    for key, value in optimizer.state[parameter].items():  # made with the optimizer
                        value.fill_(fresh_value(optimizer, group, key))

    def turn(self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter]) -> Turn:
        """Return which of these parameters are this optimizer's, and whether its step is the one that counts.

        The clock is the last optimizer that holds any of them, and every other that shares one with it.
        """
        if len(self.all) == 1:
            return Turn(list(parameters), True)
        found = self.holders()
        held = {name: found.get(id(parameter), []) for name, parameter in parameters.items()}
        last = next((o for o in reversed(self.all) if any(o in by for by in held.values())), None)
        is_clock = optimizer is last or any(optimizer in by and last in by for by in held.values())
        return Turn([name for name, by in held.items() if optimizer in by], is_clock)

    def _groups(self, parameter: nn.Parameter) -> Iterator[tuple[Optimizer, dict[str, Any]]]:
        for optimizer in self.all:
            for group in optimizer.param_groups:
                if any(p is parameter for p in group["params"]):
                    yield optimizer, group


def _forget_history(optimizer: Optimizer) -> None:
    """Let L-BFGS begin again: its history is of all parameters as one vector."""
    if hasattr(optimizer, "_numel_cache"):
        optimizer._numel_cache = None
        optimizer.state.clear()


def check_optimizers(optimizer: Optimizer | Sequence[Optimizer] | None) -> list[Optimizer]:
    """Return the optimizers as a list; raise OptionError for what has no step to follow."""
    if optimizer is None:
        return []
    optimizers = list(optimizer) if isinstance(optimizer, Sequence) else [optimizer]
    for item in optimizers:
        if not isinstance(item, Optimizer):
            raise OptionError(
                f"optimizer={type(item).__name__} is not a torch.optim.Optimizer. "
                "Leave it out and call sparse.step() after each of its steps."
            )
        if not hasattr(item, "_optimizer_step_post_hooks"):
            raise OptionError(
                f"optimizer={type(item).__name__} has no step hooks: its class does not call Optimizer.__init__. Give the "
                "optimizer that it wraps, or leave it out and call sparse.step() after each of its steps."
            )
    return optimizers


def was_skipped(optimizer: Optimizer) -> bool:
    """Whether GradScaler let a fused optimizer run a step that its kernel skipped because of infinities."""
    found = getattr(optimizer, "found_inf", None)
    return isinstance(found, Tensor) and bool(found.item())


def inside_another_step(optimizer: Optimizer) -> bool:
    """Whether a step hook runs inside an outer `step` of the same optimizer.

    torch runs hooks around every class's own `step`: a subclass whose `step` calls its base's runs them twice.
    """
    hooked = [cls for cls in type(optimizer).__mro__ if getattr(vars(cls).get("step"), "hooked", False)]
    if len(hooked) < 2:
        return False
    frame, depth = sys._getframe(1), 0
    while frame is not None:
        if frame.f_code.co_filename == _WRAPPER_FILE and frame.f_code.co_name == "wrapper":
            depth += frame.f_locals.get("self") is optimizer
        frame = frame.f_back  # type: ignore[assignment]
    return depth > 1
