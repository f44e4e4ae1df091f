"""Many trainings that make one result: lottery tickets, model soups, random search; side by side where there are workers."""

from __future__ import annotations

from rarefy.search.cycles import Member, Phase, branch, sparse_model_soups
from rarefy.search.held import hold
from rarefy.search.members import MemberError, Workers, run_members
from rarefy.search.tickets import Ticket, Tickets, Training, lottery_ticket, retrain, shuffled

__all__ = [
    "Member",
    "MemberError",
    "Phase",
    "Ticket",
    "Tickets",
    "Training",
    "Workers",
    "branch",
    "hold",
    "lottery_ticket",
    "retrain",
    "run_members",
    "shuffled",
    "sparse_model_soups",
]
