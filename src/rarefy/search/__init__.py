"""Many trainings that make one result: lottery tickets, model soups, random search; side by side where there are workers."""

from __future__ import annotations

from rarefy.search.cycles import Member, Phase, branch, sparse_model_soups
from rarefy.search.held import hold
from rarefy.search.members import MemberError, Workers, run_members
from rarefy.search.nodes import shrink
from rarefy.search.objectives import GradientNorm, InitialLoss, LossAfter, SynFlow
from rarefy.search.random_search import Comparison, Found, RandomSearch, compare_arms
from rarefy.search.samplers import Edges, LayerRatios, Nodes
from rarefy.search.tickets import Ticket, Tickets, Training, lottery_ticket, retrain, shuffled

__all__ = [
    "Comparison",
    "Edges",
    "Found",
    "GradientNorm",
    "InitialLoss",
    "LayerRatios",
    "LossAfter",
    "Member",
    "MemberError",
    "Nodes",
    "Phase",
    "RandomSearch",
    "SynFlow",
    "Ticket",
    "Tickets",
    "Training",
    "Workers",
    "branch",
    "compare_arms",
    "hold",
    "lottery_ticket",
    "retrain",
    "run_members",
    "shrink",
    "shuffled",
    "sparse_model_soups",
]
