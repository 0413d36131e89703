"""Two processes that train one model are one process, up to rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.lm.distributed import Workers, workers
from medarch.lm.training import TrainingConfig, train

CHILD = Path(__file__).parent / "training_child.py"


def test_two_processes_have_the_losses_of_one(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    two = subprocess.Popen(
        [sys.executable, *torchrun, str(CHILD), str(tmp_path / "two")],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    subprocess.run([sys.executable, str(CHILD), str(tmp_path / "one")], env=environment, check=True, timeout=60)
    output, _ = two.communicate(timeout=90)
    assert two.returncode == 0
    assert output.count("step 5/5") == 1  # one of them reports
    one, both = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert len(one[0]) == 5
    for alone, together in zip(one[0], both[0], strict=True):
        for name in ("cross_entropy", "gradient_norm", "learning_rate"):
            assert together[name] == pytest.approx(alone[name], rel=1e-4), (name, alone["step"])
    assert both[1][0]["sum"] == pytest.approx(one[1][0]["sum"], rel=1e-3)


def test_a_batch_that_does_not_divide_is_refused() -> None:
    model = Decoder(DecoderConfig(23, 12, 14, 2, 2))
    config = TrainingConfig(steps=1, batch_size=6, length=7, accumulation=3)
    with pytest.raises(ValueError, match=r"batch_size=6 .* accumulation=3 .* 4 processes: make it a multiple of 12"):
        train(model, torch.arange(20), config, workers=Workers(0, 4))


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with workers() as group:
        assert group == Workers(0, 1)
        assert group.first
        assert float(group.mean(torch.tensor(3.0))) == 3.0
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert group.device("cuda") == torch.device("cuda", 1)
    assert group.device("cpu") == torch.device("cpu")
