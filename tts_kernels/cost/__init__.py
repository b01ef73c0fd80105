"""What a query costs: N candidates and their verifier, part by part, and where sharing their prefix pays.

Formulas in plain Python; figures are models unless they say that they were measured."""

from .account import PARTS, PLANNED, Efficiency
from .formulas import (
    best_of_k,
    break_even,
    imperfect_verifier_limit,
    kinetics,
    kv_saving,
    pass_at_k,
    prefix_speedup_limit,
    train_flops,
)
from .hardware import Hardware
from .query import Part, Price, QueryCost, query_cost
from .scenario import Scenario, scenarios
from .shapes import ModelShape
from .traces import Traces
from .workload import Lognormal, Workload

__all__ = [
    "PARTS",
    "PLANNED",
    "Efficiency",
    "Hardware",
    "Lognormal",
    "ModelShape",
    "Part",
    "Price",
    "QueryCost",
    "Scenario",
    "Traces",
    "Workload",
    "best_of_k",
    "break_even",
    "imperfect_verifier_limit",
    "kinetics",
    "kv_saving",
    "pass_at_k",
    "prefix_speedup_limit",
    "query_cost",
    "scenarios",
    "train_flops",
]
