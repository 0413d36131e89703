"""The Triton kernels, run by Triton's interpreter, and on a GPU where there is one, against the loop."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medarch.ssm.scan import selective_scan

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def differences(device: str) -> dict[str, dict[str, float]]:
    environment = os.environ | {"TRITON_INTERPRET": "1" if device == "cpu" else "0"}
    command = [sys.executable, str(HERE / "triton_cases.py"), device]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def check(found: dict[str, dict[str, float]], cases: int, most: float = 1e-5) -> None:
    assert len(found) == cases
    for case, parts in found.items():
        assert len(parts) == (11 if case in ("everything", "one step") else 7)
        for quantity, difference in parts.items():
            assert difference < most, f"{case}: {quantity} differs by {difference}"


@needs_triton
def test_interpreted_kernels_equal_the_loop():
    check(differences("cpu"), cases=4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@needs_triton
def test_kernels_on_a_gpu_equal_the_loop():
    # Over a thousand steps float32 sums of another order differ more: by 1.1e-5 in the gradient of A, on an H200.
    check(differences("cuda"), cases=2, most=3e-5)


@needs_triton
def test_without_a_gpu_it_is_refused_with_the_way_out():
    u = torch.ones(1, 2, 3)
    with pytest.raises(ValueError, match=r"these are on cpu.*method='chunked'"):
        selective_scan(u, u, -torch.ones(2, 4), torch.ones(1, 4, 3), torch.ones(1, 4, 3), method="triton")
