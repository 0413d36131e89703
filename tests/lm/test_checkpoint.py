"""Runs that are killed, disks that are full, folders that hold something else."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from medarch.lm.checkpoint import FILE, data_hash, load_state, write_atomically
from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.lm.training import TrainingConfig, train

CHILD = Path(__file__).parent / "training_child.py"
TOKENS = torch.randint(23, (211,), generator=torch.Generator().manual_seed(3))
CONFIG = TrainingConfig(steps=6, batch_size=4, length=7, learning_rate=0.01, checkpoint_every=2)


def tiny() -> Decoder:
    return Decoder(DecoderConfig(23, 12, 14, 2, 2), torch.Generator().manual_seed(5))


class StopError(Exception):
    """Raised in the place of a kill."""


def stop_at(last: int):
    def before_step(step: int) -> None:
        if step == last:
            raise StopError

    return before_step


def test_a_run_that_is_killed_three_times_has_the_losses_of_an_unbroken_one(tmp_path: Path) -> None:
    command = [sys.executable, str(CHILD), str(tmp_path / "broken"), "kill", "5", "12", "19"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    history = json.loads(done.stdout.splitlines()[-1])
    kept = 0
    for (begun, reached, state), kill in zip(history, (5, 12, 19, 26), strict=True):
        assert begun == kept + 1, "a part did not go on from the checkpoint before it"
        assert kill <= reached < kill + 5
        assert kill - 1 <= state <= reached + 2
        kept = state
    broken, unbroken = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("broken", "whole"))
    assert len(unbroken[0]) == 26
    assert broken == unbroken  # bit for bit: JSON keeps every digit of a float


def test_the_whole_state_comes_back(tmp_path: Path) -> None:
    """Weights, moments, step counts and a generator that a module owns; after it, equal weights, not only losses."""

    class Noisy(Decoder):
        def __init__(self) -> None:
            super().__init__(DecoderConfig(23, 12, 14, 2, 2), torch.Generator().manual_seed(5))
            self.noise = torch.Generator().manual_seed(11)
            self.register_buffer("seen", torch.zeros((), dtype=torch.long))

        def forward(self, input_ids: torch.Tensor, *rest: object, **more: object):
            output = super().forward(input_ids)
            self.seen += 1
            noise = torch.randn(output.logits.shape, generator=self.noise)
            return output._replace(logits=output.logits + nn.functional.dropout(noise, 0.5))

    unbroken, broken = Noisy(), Noisy()
    first = train(unbroken, TOKENS, CONFIG, tmp_path / "whole")
    with pytest.raises(StopError):
        train(broken, TOKENS, CONFIG, tmp_path / "broken", before_step=stop_at(5))
    resumed = Noisy()
    second = train(resumed, TOKENS, CONFIG, tmp_path / "broken")
    assert second.steps == first.steps
    assert int(resumed.seen) == 6
    for (name, mine), theirs in zip(resumed.state_dict().items(), unbroken.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    states = [load_state(tmp_path / name) for name in ("whole", "broken")]
    assert states[0] is not None
    assert states[1] is not None
    assert states[0].optimizer.keys() == dict(unbroken.named_parameters()).keys()
    for name, moments in states[0].optimizer.items():
        assert set(moments) == {"step", "exp_avg", "exp_avg_sq"}
        for key, tensor in moments.items():
            assert torch.equal(tensor, states[1].optimizer[name][key]), (name, key)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = train(tiny(), TOKENS, CONFIG, tmp_path)
    other = tiny()
    assert train(other, TOKENS, CONFIG, tmp_path, before_step=stop_at(0)).steps == first.steps
    assert not torch.equal(other.norm.weight, tiny().norm.weight)  # it has the trained weights


def test_other_data_or_settings_are_refused_with_both_values(tmp_path: Path) -> None:
    train(tiny(), TOKENS, CONFIG, tmp_path)
    content = (tmp_path / FILE).read_bytes()
    other = TOKENS.clone()
    other[100] = (other[100] + 1) % 23
    changed = TrainingConfig(**{**vars(CONFIG), "learning_rate": 0.02})
    wide = Decoder(DecoderConfig(23, 12, 16, 2, 2))
    for model, tokens, config, words in (
        (tiny(), other, CONFIG, rf"data was '{data_hash(TOKENS)}' and is now '{data_hash(other)}'"),
        (tiny(), TOKENS, changed, r"training.learning_rate was 0.01 and is now 0.02"),
        (wide, TOKENS, CONFIG, r"model.intermediate_size was 14 and is now 16"),
    ):
        with pytest.raises(ValueError, match=words) as refusal:
            train(model, tokens, config, tmp_path)
        assert "\n" not in str(refusal.value)
    assert (tmp_path / FILE).read_bytes() == content
    # How often the state is kept changes no number.
    train(tiny(), TOKENS, TrainingConfig(**{**vars(CONFIG), "checkpoint_every": 5}), tmp_path)


def test_the_hash_depends_on_order_and_value_and_not_on_type() -> None:
    assert data_hash(TOKENS) == data_hash(TOKENS.to(torch.int32))
    assert data_hash(TOKENS) != data_hash(TOKENS.flip(0))
    assert data_hash(torch.tensor([1])) == "7c9fa136d4413fa6173637e883b6998d32e1d675f88cddff9dcbcf331820f4b8"


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk does to a write: it fails in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    train(tiny(), TOKENS, CONFIG, tmp_path / "run")
    expected = train(tiny(), TOKENS, CONFIG, tmp_path / "whole").steps
    with pytest.raises(StopError):
        train(tiny(), TOKENS, CONFIG, tmp_path / "broken", before_step=stop_at(2))
    state = (tmp_path / "broken" / FILE).read_bytes()
    with files_of_at_most(len(state) // 2), pytest.raises(OSError, match="the one before it is as it was") as error:
        train(tiny(), TOKENS, CONFIG, tmp_path / "broken")
    assert "\n" not in str(error.value)
    assert (tmp_path / "broken" / FILE).read_bytes() == state
    assert sorted(path.name for path in (tmp_path / "broken").iterdir()) == [FILE, "training-log.json"]
    assert train(tiny(), TOKENS, CONFIG, tmp_path / "broken").steps == expected


def test_a_file_is_whole_or_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=r"file could not be written \(No space left on device\); there was none"):
        write_atomically(tmp_path / "file", b"content")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", [0, 5, 1000])
def test_a_damaged_state_is_named(tmp_path: Path, keep: int) -> None:
    train(tiny(), TOKENS, CONFIG, tmp_path)
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"state.safetensors is damaged .*delete it"):
        train(tiny(), TOKENS, CONFIG, tmp_path)


def test_weights_are_no_training_state(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"weight": torch.zeros(3)}, tmp_path / FILE)
    with pytest.raises(ValueError, match="not a training state"):
        train(tiny(), TOKENS, CONFIG, tmp_path)


def test_the_log_beside_the_state_is_for_people(tmp_path: Path) -> None:
    log = train(tiny(), TOKENS, CONFIG, tmp_path)
    assert json.loads((tmp_path / "training-log.json").read_text())["steps"] == log.steps
