"""Which dimensions of a model's parameters must move together: the groups that channel surgery works on."""

from __future__ import annotations

from rarefy.coupling.follow import couple
from rarefy.coupling.groups import Coupling, Group, Member, Pinned

__all__ = ["Coupling", "Group", "Member", "Pinned", "couple"]
