"""Adapters on disk: they come back in a fresh process, on their own base alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from medarch.adaptation.lora import LoRAConfig, adapters, add_lora, lora_parameters, take_off_lora_
from medarch.adaptation.lora_files import base_digest, load_adapters, save_adapters

IDS = torch.randint(13, (3, 17), generator=torch.Generator().manual_seed(5))
CONFIG = LoRAConfig(rank=3, alpha=5.0, targets=("in_proj", "out_proj"))


def fill(model: torch.nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in lora_parameters(model).values():
            part.copy_(0.3 * torch.randn(part.shape, generator=generator))


@pytest.fixture
def saved(network: Any, tmp_path: Path) -> Path:
    add_lora(network, CONFIG)
    fill(network)
    return save_adapters(network, tmp_path / "new" / "lora.safetensors")


def rewrite(path: Path, change: Any) -> None:
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["lora"])
    tensors = load_file(path)
    change(header, tensors)
    save_file(tensors, path, {"lora": json.dumps(header)})


MODEL = """
torch.set_num_threads(1)
torch.manual_seed(3)
model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
"""


def test_they_load_in_a_fresh_process(tmp_path: Path) -> None:
    here: dict[str, Any] = {"torch": torch}
    exec(MODEL, here)
    config = LoRAConfig(2, 4.0, ("0", "2"))
    add_lora(here["model"], config)
    fill(here["model"])
    path = save_adapters(here["model"], tmp_path / "new" / "lora.safetensors")
    assert path.stat().st_size < 2000
    assert [file.name for file in path.parent.iterdir()] == ["lora.safetensors"]
    script = f"""
import torch
from medarch.adaptation.lora_files import load_adapters
{MODEL}
print(load_adapters(model, {str(path)!r}))
torch.save(model(torch.ones(1, 5)), {str(tmp_path / "answer.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(config)
    assert torch.equal(torch.load(tmp_path / "answer.pt"), here["model"](torch.ones(1, 5)))


def test_they_load_over_others_of_the_same_kind(network: Any, saved: Path, fresh: Any) -> None:
    model = fresh()
    add_lora(model, CONFIG)
    fill(model, seed=9)
    assert load_adapters(model, saved) == CONFIG
    assert torch.equal(model(IDS), network(IDS))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoRAConfig(2, 5.0, CONFIG.targets), "rank=3, the model's LoRA has 2"),
        (LoRAConfig(3, 4.0, CONFIG.targets), "alpha=5.0, the model's LoRA has 4.0"),
        (LoRAConfig(3, 5.0, ("in_proj",)), r"targets=\('in_proj', 'out_proj'\), the model's LoRA has \('in_proj',\)"),
    ],
)
def test_another_kind_is_refused(saved: Path, fresh: Any, config: LoRAConfig, message: str) -> None:
    model = fresh()
    add_lora(model, config)
    before = {name: part.detach().clone() for name, part in lora_parameters(model).items()}
    with pytest.raises(ValueError, match=message):
        load_adapters(model, saved)
    assert all(torch.equal(part, before[name]) for name, part in lora_parameters(model).items())


def test_another_base_is_refused_by_name(saved: Path, fresh: Any) -> None:
    model = fresh()
    with torch.no_grad():
        model.layers[1].A_log[0, 0] += 1e-6
    with pytest.raises(ValueError, match=r"another base: layers\.1\.A_log differs \(1 of 21 parameters"):
        load_adapters(model, saved)
    with pytest.raises(ValueError, match=r"differs \(21 of 21"):
        load_adapters(fresh().double(), saved)
    with pytest.raises(ValueError, match="another base: experts_proj is missing here"):
        load_adapters(torch.nn.Linear(3, 3), saved)
    assert not adapters(model)


def test_the_digest_knows_type_shape_and_bytes_and_no_correction(network: Any, fresh: Any) -> None:
    before = base_digest(network)
    add_lora(network, CONFIG)
    fill(network)
    assert base_digest(network) == before == base_digest(fresh())
    take_off_lora_(network)
    assert base_digest(network) == before
    plain = torch.nn.Linear(4, 6, bias=False)
    turned = torch.nn.Linear(6, 4, bias=False)
    with torch.no_grad():
        turned.weight.copy_(plain.weight.reshape(4, 6))
    assert base_digest(plain) != base_digest(turned)


def test_damaged_files_are_refused_and_leave_the_base(saved: Path, fresh: Any, tmp_path: Path) -> None:
    def refused(change: Any, message: str) -> None:
        content = saved.read_bytes()
        rewrite(saved, change)
        model = fresh()
        with pytest.raises(ValueError, match=message):
            load_adapters(model, saved)
        assert not adapters(model)
        saved.write_bytes(content)

    name = "layers.0.in_proj.A"
    refused(lambda header, tensors: tensors.pop(name), rf"{name} is missing")
    refused(lambda header, tensors: tensors.update(more=torch.zeros(1)), "more belongs to nothing")
    refused(lambda header, tensors: tensors.update({name: torch.zeros(2, 7)}), r"has shape \(2, 7\), not \(3, 7\)")
    refused(lambda header, tensors: header.update(format="other"), "holds no LoRA of this package")
    refused(lambda header, tensors: header.pop("config"), "its header has no 'config'")
    refused(lambda header, tensors: header.pop("base"), "its header has no 'base'")
    refused(lambda header, tensors: header["config"].update(width=3), "its configuration: .*'width'")
    refused(lambda header, tensors: tensors[name].fill_(float("nan")), rf"{name} holds what is no finite number")
    refused(lambda header, tensors: tensors.update({name: torch.ones(3, 7).long()}), "holds what is no finite number")
    saved.write_bytes(saved.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        load_adapters(fresh(), saved)
    with pytest.raises(FileNotFoundError, match="no adapters were saved there"):
        load_adapters(fresh(), tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="Network has no LoRA to save"):
        save_adapters(fresh(), saved)
