"""Timing, memory, FLOPs and the records of what was measured."""

from medarch.bench.flops import count_flops
from medarch.bench.memory import peak_memory
from medarch.bench.registry import benchmark
from medarch.bench.timing import Comparison, compare

__all__ = ["Comparison", "benchmark", "compare", "count_flops", "peak_memory"]
