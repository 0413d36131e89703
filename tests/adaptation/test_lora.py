"""LoRA: it changes nothing at first, the correction alone learns, and merging changes no answer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medarch.adaptation import lora
from medarch.adaptation.lora import LoRAConfig, LowRank, adapters, add_lora, count_trainable, lora_parameters
from medarch.adaptation.lora_checks import check_gradients

IDS = torch.randint(13, (3, 17), generator=torch.Generator().manual_seed(5))
CONFIG = LoRAConfig(rank=3, alpha=5.0, targets=("in_proj", "out_proj"))


def fill(model: nn.Module, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in lora_parameters(model).values():
            part.copy_(0.3 * torch.randn(part.shape, generator=generator, dtype=part.dtype))


def loss_of(model: nn.Module) -> Callable[[], Tensor]:
    return lambda: F.cross_entropy(model(IDS[:, :-1]).flatten(0, 1), IDS[:, 1:].flatten())


def test_nothing_changes_until_it_is_trained(network: Any) -> None:
    before, weights = network(IDS), {name: w.clone() for name, w in lora.base_weights(network).items()}
    added = add_lora(network, CONFIG, torch.Generator().manual_seed(0))
    assert list(added) == [f"layers.{layer}.{name}" for layer in (0, 1) for name in ("in_proj", "out_proj")]
    assert torch.equal(network(IDS), before)
    assert all(
        part.shape == (3, columns)
        for part, columns in ((added["layers.0.in_proj"].A, 7), (added["layers.1.out_proj"].A, 11))
    )
    assert not added["layers.0.in_proj"].B.any()
    # A projection keeps a vector's size: its rows have about the length one.
    assert added["layers.0.out_proj"].A.norm(dim=1).mean().item() == pytest.approx(1.0, abs=0.5)
    assert all(torch.equal(weight, weights[name]) for name, weight in lora.base_weights(network).items())


def test_the_sum_is_that_of_the_paper(network: Any) -> None:
    """h = W x + (alpha / r) B A x (eq. 3), on a bare parameter and on a Linear with a bias."""
    w, v = network.layers[0].in_proj.detach().clone(), network.layers[0].out_proj.weight.detach().clone()
    added = add_lora(network, CONFIG)
    fill(network)
    x = torch.randn(4, 11, generator=torch.Generator().manual_seed(2))
    first, second = added["layers.0.in_proj"], added["layers.0.out_proj"]
    expected = F.linear(x, v, network.layers[0].out_proj.bias) + 5 / 3 * x @ second.A.T @ second.B.T
    torch.testing.assert_close(network.layers[0].out_proj(x), expected)
    torch.testing.assert_close(network.layers[0].in_proj, w + 5 / 3 * first.B @ first.A)


def test_the_generator_decides_what_is_drawn(network: Any) -> None:
    drawn = []
    for seed in (1, 1, 2):
        model = copy.deepcopy(network)
        added = add_lora(model, CONFIG, torch.Generator().manual_seed(seed))
        drawn.append(torch.cat([adapter.A.flatten() for adapter in added.values()]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.isclose(drawn[0], drawn[2]).any()


def test_training_moves_the_corrections_alone(network: Any) -> None:
    base = lora.base_weights(network)
    before = {name: weight.clone() for name, weight in base.items()}
    add_lora(network, CONFIG, torch.Generator().manual_seed(0))
    start = {name: part.detach().clone() for name, part in lora_parameters(network).items()}
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)
    loss, losses = loss_of(network), []
    for _ in range(30):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < 0.9 * losses[0]
    assert not [name for name, part in lora_parameters(network).items() if torch.equal(part, start[name])]
    assert all(torch.equal(weight, before[name]) for name, weight in lora.base_weights(network).items())
    with lora.without_lora(network):
        assert loss().item() == losses[0]
    assert loss().item() < losses[0]


def test_what_is_trained_is_counted(network: Any) -> None:
    everything = sum(p.numel() for p in network.parameters())
    assert count_trainable(network) == (everything, everything)
    add_lora(network, CONFIG)
    added = 2 * (3 * (7 + 11) + 3 * (11 + 7))
    assert count_trainable(network) == (added, everything + added)
    assert len(lora_parameters(network)) == 8


def test_merging_changes_no_answer_and_can_be_undone(network: Any) -> None:
    plain, own, names = network(IDS), {id(p) for p in network.parameters()}, sorted(network.state_dict())
    add_lora(network, CONFIG)
    fill(network)
    before = network(IDS)
    merged = lora.merge_lora_(network)
    assert adapters(network) == {}
    assert {id(p) for p in network.parameters()} == own
    assert sorted(network.state_dict()) == names
    assert torch.equal(network(IDS), before)
    assert not torch.allclose(before, plain)
    lora.unmerge_lora_(network, merged)
    assert torch.equal(network(IDS), before)
    lora.take_off_lora_(network)
    assert torch.equal(network(IDS), plain)


def test_a_copy_is_merged_and_the_original_is_not(network: Any) -> None:
    add_lora(network, CONFIG)
    fill(network)
    before, twin = network(IDS), copy.deepcopy(network)
    lora.merge_lora_(twin)
    assert torch.equal(twin(IDS), before)
    assert torch.equal(network(IDS), before)
    lora.take_off_lora_(network)
    assert torch.equal(twin(IDS), before)
    assert not torch.equal(network(IDS), before)


def test_what_is_not_the_merged_model_is_not_unmerged(network: Any) -> None:
    add_lora(network, CONFIG)
    fill(network)
    merged = lora.merge_lora_(network)
    with torch.no_grad():
        network.layers[1].in_proj[0, 0] += 1
    with pytest.raises(ValueError, match=r"layers\.1\.in_proj is not what merging made of it"):
        lora.unmerge_lora_(network, merged)
    add_lora(network, CONFIG)
    with pytest.raises(ValueError, match="it is not merged"):
        lora.unmerge_lora_(network, merged)


def test_a_merge_that_would_break_the_model_leaves_it(network: Any) -> None:
    add_lora(network, CONFIG)
    with torch.no_grad():
        adapters(network)["layers.1.out_proj"].B[2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.out_proj would not be finite"):
        lora.merge_lora_(network)
    assert len(adapters(network)) == 4
    lora.take_off_lora_(network)
    for undo in (lora.merge_lora_, lora.take_off_lora_):
        with pytest.raises(ValueError, match="Network has no LoRA"):
            undo(network)


@pytest.mark.parametrize(
    ("target", "why"),
    [
        ("conv", "is a convolution's kernel"),
        ("norm", r"has shape \(7,\)"),
        ("embed", "is an embedding"),
        ("lm_head", r"is tied to embed\.weight"),
        ("A_log", "is not known to be a matrix that is multiplied by"),
        ("conv1d", "is not known to be a matrix that is multiplied by"),
        ("conv1d_weight", "is not known to be a matrix that is multiplied by"),
        ("D", r"has shape \(11,\)"),
        ("experts_proj", r"has shape \(3, 7, 7\)"),
        ("norm.bias", r"has shape \(7,\)"),
    ],
)
def test_what_cannot_take_it_is_named_with_what_can(network: Any, target: str, why: str) -> None:
    name, able = target.removesuffix("_weight"), "in_proj, idle_proj, out_proj, lm_head"
    with pytest.raises(ValueError, match=rf"{name}.* cannot take LoRA: it {why}.*; the model can take it on: {able}"):
        add_lora(network, LoRAConfig(5, 2, ("in_proj", target)))
    assert not adapters(network)
    assert all(p.requires_grad for p in network.parameters())


def test_names_that_match_nothing_and_ranks_that_do_not_fit(network: Any) -> None:
    with pytest.raises(ValueError, match="'q_proj', which the model does not have; it can take LoRA on: in_proj"):
        add_lora(network, LoRAConfig(2, 2, ("q_proj",)))
    with pytest.raises(ValueError, match="'proj', which the model does not have"):  # a part of a name is no name
        add_lora(network, LoRAConfig(2, 2, ("proj",)))
    with pytest.raises(ValueError, match=r"idle_proj cannot take LoRA: it has shape \(5, 7\).*rank 6"):
        add_lora(network, LoRAConfig(6, 2, ("idle_proj",)))
    assert list(add_lora(network, LoRAConfig(2, 2, ("layers.1.in_proj", "out_proj.weight")))) == [
        "layers.0.out_proj",
        "layers.1.in_proj",
        "layers.1.out_proj",
    ]
    with pytest.raises(ValueError, match=r"has LoRA already, on layers\.0\.out_proj and 2 more"):
        add_lora(network, CONFIG)


def test_a_weight_with_another_parametrisation_is_left_alone(network: Any) -> None:
    nn.utils.parametrizations.weight_norm(network.layers[0].out_proj)
    with pytest.raises(ValueError, match=r"layers\.0\.out_proj cannot take LoRA: it is parametrised already"):
        add_lora(network, CONFIG)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank must be a whole number"),
        ({"rank": True}, "rank must be a whole number"),
        ({"alpha": 0.0}, "alpha must be positive"),
        ({"alpha": float("nan")}, "alpha must be positive"),
        ({"targets": "in_proj"}, r"write \('in_proj',\)"),
        ({"targets": ()}, "at least one matrix"),
        ({"dropout": 1.0}, "dropout must be"),
    ],
)
def test_a_configuration_out_of_range(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**{"rank": 2, "alpha": 1.0, "targets": ("in_proj",), **fields})


def test_dropout_hides_inputs_in_training_alone(network: Any) -> None:
    added = add_lora(network, LoRAConfig(3, 3, ("in_proj",), dropout=0.5))
    fill(network)
    adapter = added["layers.0.in_proj"]
    assert adapter.training
    torch.manual_seed(0)
    adapter.eval()
    whole = network.layers[0].in_proj - lora.base_weights(network)["layers.0.in_proj"]
    adapter.train()
    hidden = 0
    for _ in range(50):
        part = network.layers[0].in_proj - lora.base_weights(network)["layers.0.in_proj"]
        for column in range(7):
            gone = bool((part[:, column].abs() < 1e-6).all())
            hidden += gone
            if not gone:  # what is left is scaled up, so that the mean stays
                torch.testing.assert_close(part[:, column], 2 * whole[:, column], rtol=1e-3, atol=1e-5)
    assert 120 < hidden < 230  # 350 columns at one half
    answer = network.eval()(IDS)
    lora.merge_lora_(network.train())
    assert torch.equal(network(IDS), answer)


def test_half_precision_keeps_its_corrections_in_full() -> None:
    model = nn.Linear(5, 7, dtype=torch.bfloat16)
    adapter = add_lora(model, LoRAConfig(2, 2, ("weight",)))["weight"]
    assert adapter.A.dtype == adapter.B.dtype == torch.float32
    fill(model)
    out = model(torch.ones(1, 5, dtype=torch.bfloat16))
    assert out.dtype == torch.bfloat16
    lora.merge_lora_(model)
    assert torch.equal(model(torch.ones(1, 5, dtype=torch.bfloat16)), out)


def test_gradients_by_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(5, 7, dtype=torch.float64, generator=generator)
    adapter = LowRank(weight, LoRAConfig(3, 2.0, ("x",)), generator)
    x = torch.randn(2, 7, dtype=torch.float64, generator=generator)
    B = torch.randn(5, 3, dtype=torch.float64, generator=generator, requires_grad=True)

    def answer(A: Tensor, B: Tensor) -> Tensor:
        return F.linear(x, torch.func.functional_call(adapter, {"A": A, "B": B}, (weight,))).tanh()

    assert torch.autograd.gradcheck(answer, (adapter.A.detach().requires_grad_(), B))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_a_correction_has_at_most_its_rank(rows: int, columns: int, data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, min(rows, columns)))
    model = nn.Linear(columns, rows, dtype=torch.float64)
    base = model.weight.detach().clone()
    add_lora(model, LoRAConfig(rank, 7.0, ("weight",)), torch.Generator().manual_seed(0))
    fill(model)
    x = torch.randn(3, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before = model(x)
    merged = lora.merge_lora_(model)
    assert torch.equal(model(x), before)
    assert torch.linalg.matrix_rank(model.weight - base, rtol=1e-9) <= rank
    lora.unmerge_lora_(model, merged)
    assert torch.equal(lora.base_weights(model)["weight"], base)


def test_every_adapter_is_asked_for_its_gradient(network: Any) -> None:
    add_lora(network, CONFIG)
    before = {name: part.detach().clone() for name, part in lora_parameters(network).items()}
    torch.manual_seed(4)
    state = torch.random.get_rng_state()
    norms = check_gradients(network, loss_of(network))
    assert norms.keys() == adapters(network).keys()
    assert all(norm.A > 0 and norm.B > 0 for norm in norms.values())
    assert all(torch.equal(part, before[name]) and part.grad is None for name, part in lora_parameters(network).items())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_adapter_that_would_learn_nothing_is_named(network: Any) -> None:
    with pytest.raises(ValueError, match="Network has no LoRA"):
        check_gradients(network, loss_of(network))
    add_lora(network, LoRAConfig(2, 2, ("in_proj", "idle_proj")))
    with pytest.raises(ValueError, match=r"LoRA on layers\.0\.idle_proj, layers\.1\.idle_proj:"):
        check_gradients(network, loss_of(network))
    assert not adapters(network)["layers.0.in_proj"].B.any()
    with pytest.raises(ValueError, match=r"LoRA on layers\.0\.in_proj, layers\.0\.idle_proj"):
        check_gradients(network, lambda: torch.tensor(1.0))

    def fails() -> Tensor:
        raise RuntimeError("no data")

    with pytest.raises(RuntimeError, match="no data"):
        check_gradients(network, fails)
    assert not adapters(network)["layers.0.in_proj"].B.any()
    with pytest.raises(ValueError, match="LoRA on"):
        check_gradients(network, lambda: loss_of(network)() * torch.nan)


# Against peft, on models of transformers -----------------------------------------------------------------------------


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=61, num_attention_heads=3, num_key_value_heads=1, **sizes))


def mamba() -> Any:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "state_size": 5, "num_hidden_layers": 2, "conv_kernel": 3, "time_step_rank": 3}
    return MambaForCausalLM(MambaConfig(vocab_size=61, **sizes))


TOKENS = torch.randint(61, (2, 13), generator=torch.Generator().manual_seed(6))


def with_peft(model: Any, *targets: str) -> Any:
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(model, LoraConfig(r=3, lora_alpha=5, target_modules=list(targets), task_type="CAUSAL_LM"))


@pytest.mark.parametrize(
    ("build", "targets"), [(llama, ("q_proj", "v_proj", "down_proj")), (mamba, ("in_proj", "x_proj"))]
)
def test_the_same_numbers_as_peft(build: Callable[[], Any], targets: tuple[str, ...]) -> None:
    ours, theirs = build(), with_peft(build(), *targets)
    added = add_lora(ours, LoRAConfig(3, 5.0, targets))
    fill(ours)
    parts = dict(theirs.named_parameters())
    path = "base_model.model.{}.lora_{}.default.weight"
    with torch.no_grad():
        for name, adapter in added.items():
            for part in ("A", "B"):
                parts[path.format(name, part)].copy_(getattr(adapter, part))
    assert sum(".lora_" in name for name in parts) == len(lora_parameters(ours))
    losses = [model(input_ids=TOKENS, labels=TOKENS) for model in (ours, theirs)]
    torch.testing.assert_close(losses[0].logits, losses[1].logits, rtol=1e-4, atol=1e-6)
    for answer in losses:
        answer.loss.backward()
    for name, adapter in added.items():
        for part in ("A", "B"):
            expected = parts[path.format(name, part)].grad
            torch.testing.assert_close(getattr(adapter, part).grad, expected, rtol=1e-3, atol=1e-7)
    assert count_trainable(ours)[0] == theirs.get_nb_trainable_parameters()[0]
    lora.merge_lora_(ours)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(ours(TOKENS).logits, merged(TOKENS).logits, rtol=1e-4, atol=1e-6)


def test_what_peft_lets_pass_or_refuses_on_mamba_learns_here() -> None:
    """The adapter of dt_proj sits beside a call that is never made; a correction of the weight is read with it."""
    theirs = with_peft(mamba(), "in_proj", "dt_proj")
    theirs(input_ids=TOKENS, labels=TOKENS).loss.backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.requires_grad}
    assert all((gradient is None) == ("dt_proj" in name) for name, gradient in gradients.items())
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        with_peft(mamba(), "out_proj")
    ours = mamba()
    add_lora(ours, LoRAConfig(3, 5.0, ("in_proj", "x_proj", "dt_proj", "out_proj")))
    norms = check_gradients(ours, lambda: ours(input_ids=TOKENS, labels=TOKENS).loss)
    assert len(norms) == 8
    for target in ("conv1d", "A_log", "norm", "lm_head", "embeddings"):
        with pytest.raises(ValueError, match=r"cannot take LoRA.*in_proj, x_proj, dt_proj, out_proj"):
            add_lora(mamba(), LoRAConfig(3, 5.0, (target,)))
