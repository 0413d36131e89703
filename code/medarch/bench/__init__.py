"""Timing, memory, FLOPs and the records of what was measured."""
