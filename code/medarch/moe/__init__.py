"""Mixture of experts: a layer that holds E feed-forward networks and pays for k of them."""

from medarch.moe.config import MoEConfig
from medarch.moe.dense import DenseMLP
from medarch.moe.experts import Experts
from medarch.moe.layer import MoELayer
from medarch.moe.mixtral import from_mixtral_block, load_mixtral_, save_mixtral_
from medarch.moe.reference import moe_forward_reference
from medarch.moe.router import NO_EXPERT, RouterStatistics, Routing, TopKRouter, router_statistics

__all__ = [
    "NO_EXPERT",
    "DenseMLP",
    "Experts",
    "MoEConfig",
    "MoELayer",
    "RouterStatistics",
    "Routing",
    "TopKRouter",
    "from_mixtral_block",
    "load_mixtral_",
    "moe_forward_reference",
    "router_statistics",
    "save_mixtral_",
]
