"""What moves together, as plain data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True, eq=False)
class Member:
    """Where a group's units stand in one dimension of one parameter or buffer.

    Attributes:
        name: of the parameter or buffer, as in the model's state dict.
        dim: the dimension.
        index: int64 [units, block]: the places of each unit along `dim`. A block is longer than 1 where a unit is several
            rows or columns, such as the H * W columns of a channel behind a flatten.
        rows: only these places [start, stop) of dimension 0 (a convolution's inputs in one of its groups); None: all.
    """

    name: str
    dim: int
    index: Tensor
    rows: tuple[int, int] | None = None

    @property
    def block(self) -> int:
        """Places of one unit."""
        return self.index.shape[1]

    @property
    def offset(self) -> int | None:
        """First place where the units stand one after the other, in order; None where they do not."""
        flat = self.index.reshape(-1)
        first = int(flat[0])
        return first if bool((flat == flat.new_tensor(range(first, first + flat.numel()))).all()) else None

    def __str__(self) -> str:
        inside = "" if self.rows is None else f" of rows {self.rows[0]}..{self.rows[1]}"
        return f"{self.name} dim {self.dim}{inside}" + (f" in blocks of {self.block}" if self.block > 1 else "")


@dataclass(frozen=True, eq=False)
class Group:
    """Units that may change places with each other, if they do so in every member at once.

    Reordering the units of one group in all its members leaves a network that computes the same; dropping a unit's places in
    all of them leaves the same network without that channel (a convolution in groups must lose equally many in each).
    """

    units: int
    members: tuple[Member, ...]

    @property
    def name(self) -> str:
        """The first member's name: the layer whose outputs the units are, in most cases."""
        return self.members[0].name

    def __str__(self) -> str:
        return f"{self.units} units: " + ", ".join(map(str, self.members))


@dataclass(frozen=True)
class Pinned:
    """A dimension of a parameter whose places must not move, and why."""

    name: str
    dim: int
    reason: str

    def __str__(self) -> str:
        return f"{self.name} dim {self.dim}: {self.reason}"


@dataclass(frozen=True, eq=False)
class Coupling:
    """Everything that `couple` found: the groups, and what does not move. A dimension may be in several groups."""

    groups: tuple[Group, ...]
    pinned: tuple[Pinned, ...]
    _where: dict[tuple[str, int], list[tuple[Group, Member]]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        for group in self.groups:
            for member in group.members:
                self._where.setdefault((member.name, member.dim), []).append((group, member))

    def of(self, name: str, dim: int) -> list[tuple[Group, Member]]:
        """Return the groups, each with its member, that places of this dimension belong to."""
        return list(self._where.get((name, dim), ()))

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __str__(self) -> str:
        return "\n".join([*map(str, self.groups), *(f"fixed: {p}" for p in self.pinned)])
