"""The schedule, the optimiser and the loop, against torch's own parts and by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn

from medarch.lm.batches import sample_batch
from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.lm.training import TrainingConfig, learning_rate, parameter_groups, step_seed, train
from medarch.moe.config import MoEConfig

SIZES = {"vocab_size": 23, "hidden_size": 12, "intermediate_size": 14, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = torch.randint(23, (211,), generator=torch.Generator().manual_seed(3)).cumsum(0) % 23


def tiny(seed: int = 5, moe: bool = False) -> Decoder:
    extra = {"feed_forwards": ("moe",), "moe": MoEConfig(12, 7, 3, 2), "router_aux_loss_coef": 0.1} if moe else {}
    return Decoder(DecoderConfig(**SIZES, **extra), torch.Generator().manual_seed(seed))


def short(**changes: object) -> TrainingConfig:
    return TrainingConfig(**{"steps": 5, "batch_size": 6, "length": 11, "learning_rate": 0.01, **changes})


def test_the_rate_rises_straight_and_falls_along_a_cosine() -> None:
    config = TrainingConfig(steps=12, learning_rate=2.0, warmup_steps=4, min_lr_ratio=0.1)
    rates = [learning_rate(config, step) for step in range(12)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[7] == pytest.approx(2 * (0.1 + 0.9 * 0.5))  # half of the way down
    assert rates[11] == pytest.approx(0.2)
    assert rates[3:] == sorted(set(rates[3:]), reverse=True)


def test_without_warm_up_a_single_step_has_a_rate() -> None:
    assert learning_rate(TrainingConfig(steps=1, learning_rate=1.0, min_lr_ratio=0.25), 0) == 0.25


def test_only_matrices_decay_and_frozen_weights_are_left_out() -> None:
    model = tiny(moe=True)
    model.layers[0].feed_forward.experts.requires_grad_(False)
    matrices, vectors = parameter_groups(model, 0.3)
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.3, 0.0)
    assert {parameter.dim() for parameter in vectors["params"]} == {1}
    assert len(vectors["params"]) == 5  # two norms a layer and the last one
    frozen = {id(parameter) for parameter in model.layers[0].feed_forward.experts.parameters()}
    given = {id(parameter) for group in (matrices, vectors) for parameter in group["params"]}
    assert given == {id(parameter) for parameter in model.parameters()} - frozen


def test_a_model_without_anything_to_train_is_refused() -> None:
    with pytest.raises(ValueError, match="frozen"):
        train(tiny().requires_grad_(False), TOKENS, short())


def test_the_loop_is_torchs_adamw_with_clipping() -> None:
    """The same steps written out, in float64, with the same batches."""
    config = short(warmup_steps=2, weight_decay=0.4, clip=0.5, seed=9)
    model, other = tiny().double(), tiny().double()
    log = train(model, TOKENS, config)
    decayed = [parameter for parameter in other.parameters() if parameter.dim() > 1]
    plain = [parameter for parameter in other.parameters() if parameter.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.4}, {"params": plain, "weight_decay": 0}],
                                  betas=(0.9, 0.95), fused=False)  # fmt: skip
    for step in range(config.steps):
        generator = torch.Generator().manual_seed(step_seed(9, step))
        inputs, targets = sample_batch(TOKENS, 6, 11, generator)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(other(inputs).logits.flatten(0, 1), targets.flatten())
        loss.backward()
        norm = nn.utils.clip_grad_norm_(other.parameters(), 0.5)
        assert norm > 0.5, "nothing was clipped, so nothing was tested"
        optimizer.step()
        assert log.steps[step]["loss"] == pytest.approx(loss.item(), rel=1e-6)
        assert log.steps[step]["gradient_norm"] == pytest.approx(float(norm), rel=1e-5)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        # The logits are computed in float32, and AdamW divides small gradients by their own size.
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_accumulated_micro_batches_are_the_large_batch() -> None:
    whole, parts = tiny(), tiny()
    first = train(whole, TOKENS, short())
    second = train(parts, TOKENS, short(accumulation=3))
    assert second.column("loss") == pytest.approx(first.column("loss"), rel=1e-5)
    for mine, theirs in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_training_learns() -> None:
    """Each token is the one before it plus three, which a model of any size can find out."""
    tokens = torch.arange(0, 600, 3) % 23
    log = train(tiny(moe=True), tokens, short(steps=60, learning_rate=0.02, warmup_steps=5))
    assert log.column("cross_entropy")[0] > 2.9  # log 23 is 3.1
    assert log.column("cross_entropy")[-1] < 0.5
    assert log.tokens == 60 * 6 * 11


def test_the_routers_losses_are_logged_and_count() -> None:
    entry = train(tiny(moe=True), TOKENS, short(steps=1)).steps[0]
    assert entry["loss"] == pytest.approx(entry["cross_entropy"] + 0.1 * entry["load_balancing"])
    assert entry["load_balancing"] > 0


def test_the_same_seed_gives_the_same_run_and_another_does_not() -> None:
    runs = [train(tiny(), TOKENS, short(seed=seed)).column("loss") for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_the_default_generator_is_reproducible_inside_and_untouched_outside() -> None:
    class Noisy(Decoder):
        def forward(self, input_ids: torch.Tensor, *rest: object, **more: object):
            output = super().forward(input_ids)
            return output._replace(logits=nn.functional.dropout(output.logits, 0.5, self.training))

    def run() -> list[float]:
        return train(Noisy(DecoderConfig(**SIZES), torch.Generator().manual_seed(1)), TOKENS, short()).column("loss")

    torch.manual_seed(1)
    first = run()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    assert run() == first
    assert torch.equal(torch.get_rng_state(), before)


def test_evaluations_come_when_asked_for_and_at_the_end() -> None:
    model, modes = tiny(), []

    def evaluate(given: nn.Module) -> dict[str, float]:
        assert given is model
        modes.append((given.training, torch.is_grad_enabled()))
        return {"value": float(len(modes))}

    log = train(model.eval(), TOKENS, short(steps=7, eval_every=3), evaluate=evaluate)
    assert log.evaluations == [{"step": 3, "value": 1.0}, {"step": 6, "value": 2.0}, {"step": 7, "value": 3.0}]
    assert modes == [(False, False)] * 3
    assert not model.training  # as it was given


def test_hooks_see_every_step() -> None:
    seen: list[object] = []
    train(tiny(moe=True), TOKENS, short(steps=2, accumulation=2), before_step=seen.append,
          after_step=lambda step, output: seen.append((step, len(output.routings))))  # fmt: skip
    assert seen == [0, (0, 2), 1, (1, 2)]


def test_progress_names_what_one_wants_to_know() -> None:
    lines: list[str] = []
    log = train(tiny(), TOKENS, short(steps=2), report=lines.append, evaluate=lambda model: {"bits_per_byte": 1.25})
    assert len(lines) == 2
    for word in ("step 2/2", f"loss {log.steps[1]['loss']:.4f}", "tokens/s", "learning rate 1.00e-03", "0:00 left"):
        assert word in lines[1]
    assert lines[1].endswith("bits_per_byte 1.2500")
    assert "bits_per_byte" not in lines[0]


@pytest.mark.parametrize("moe", [False, True])
def test_a_loss_that_is_no_number_stops_the_run(moe: bool, tmp_path: Path) -> None:
    model, config = tiny(moe=moe), short(steps=9, checkpoint_every=2)

    def poison(step: int) -> None:
        if step == 5:
            with torch.no_grad():
                model.norm.weight[0] = math.nan

    with pytest.raises(FloatingPointError, match=r"loss is nan at step 6 .*checkpoint of step 4 .* is kept"):
        train(model, TOKENS, config, tmp_path, before_step=poison)
    assert train(tiny(moe=moe), TOKENS, config, tmp_path).steps[-1]["step"] == 9  # from the good checkpoint


def test_a_gradient_that_is_no_number_never_reaches_the_weights() -> None:
    class Cliff(Decoder):
        def loss(self, output, targets, ignore_index=-100):
            total, parts = super().loss(output, targets)
            return total + (output.logits[0, 0, 0] * 0).sqrt(), parts  # its value is 0, its gradient is not finite

    model = Cliff(DecoderConfig(**SIZES), torch.Generator().manual_seed(1))
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(FloatingPointError, match="gradient's norm is"):
        train(model, TOKENS, short())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps must be a whole number of at least 1"),
        ({"steps": True}, "steps"),
        ({"warmup_steps": 6}, "warmup_steps=6 exceeds steps=5"),
        ({"accumulation": 4}, "batch_size=6 is not divisible by accumulation=4"),
        ({"learning_rate": math.inf}, "learning_rate"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"clip": 0.0}, "clip"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"seed": -1}, "seed"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        short(**changes)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        train(tiny(), TOKENS[:11], short())
