"""Training: AdamW under a warm-up and a cosine, clipped gradients, and runs that survive being killed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from medarch.lm.batches import sample_batch
from medarch.lm.checkpoint import (
    TrainingState,
    data_hash,
    load_state,
    module_generators,
    refuse_other_run,
    save_state,
)
from medarch.lm.distributed import Workers

UNBOUND = ("checkpoint_every",)  # what may differ when a run is resumed, since it changes no number


@dataclass(frozen=True)
class TrainingConfig:
    """How a model is trained.

    Attributes:
        steps: Updates of the weights.
        batch_size: Sequences behind one update, over all micro-batches and processes together.
        length: Tokens in a sequence.
        learning_rate: Its greatest value, reached at the end of the warm-up.
        warmup_steps: Updates over which the rate rises from zero.
        min_lr_ratio: Where the cosine ends, as a share of ``learning_rate``.
        weight_decay: Pull of AdamW on the weight matrices towards zero; vectors are left alone.
        betas: Memories of AdamW's running means of the gradient and of its square.
        clip: Greatest norm of the gradient over all parameters; longer ones are shortened to it.
        accumulation: Micro-batches that one update is gathered from, to hold less in memory at once.
        seed: Of the order of the data, and of whatever chance the model uses while it trains.
        eval_every: Updates between evaluations; 0 for none but the last.
        checkpoint_every: Updates between checkpoints, where there is a folder; 0 for none but the last.

    Raises:
        ValueError: If a value is out of range or two contradict each other.
    """

    steps: int
    batch_size: int = 8
    length: int = 256
    learning_rate: float = 3e-3
    warmup_steps: int = 0
    min_lr_ratio: float = 0.1
    weight_decay: float = 0.1
    betas: tuple[float, float] = (0.9, 0.95)
    clip: float = 1.0
    accumulation: int = 1
    seed: int = 0
    eval_every: int = 0
    checkpoint_every: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name in ("steps", "batch_size", "length", "accumulation"):
            _whole(name, getattr(self, name), 1)
        for name in ("warmup_steps", "eval_every", "checkpoint_every", "seed"):
            _whole(name, getattr(self, name), 0)
        if self.warmup_steps > self.steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} exceeds steps={self.steps}: the rate would never peak")
        if self.batch_size % self.accumulation:
            raise ValueError(
                f"batch_size={self.batch_size} is not divisible by accumulation={self.accumulation}: "
                "each micro-batch needs as many sequences as the others"
            )
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be positive and finite, got {value!r}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio must lie between 0 and 1, got {self.min_lr_ratio!r}")
        if not (math.isfinite(self.weight_decay) and self.weight_decay >= 0):
            raise ValueError(f"weight_decay must be finite and not negative, got {self.weight_decay!r}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be two numbers from 0 to below 1, got {self.betas!r}")


def _whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of at least {least}, got {value!r}")


@dataclass
class TrainingLog:
    """What a run measured.

    Attributes:
        steps: One entry an update: ``step`` (from 1), ``loss`` with its parts as ``Decoder.loss`` names them,
            ``learning_rate``, ``gradient_norm`` before clipping.
        evaluations: One entry an evaluation: ``step`` and what the evaluation returned.
        tokens: Tokens trained on.
        seconds: Time spent on updates, on the wall clock, over all parts of an interrupted run.
    """

    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def column(self, name: str) -> list[float]:
        """One quantity of every update, such as ``"cross_entropy"``."""
        return [entry[name] for entry in self.steps]


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The rate of one update: a straight rise over the warm-up, then half a cosine down to ``min_lr_ratio``.

    Args:
        config: The run.
        step: Number of the update, from 0.

    Returns:
        The rate; the last update of the warm-up has the full one, the last of the run the least.
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    rest = config.steps - config.warmup_steps
    progress = (step + 1 - config.warmup_steps) / rest
    share = config.min_lr_ratio + (1 - config.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * share


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups for AdamW: matrices, which decay, and vectors (the scales of norms, biases), which do not.

    A vector has no direction to be kept short in; pulling a norm's scale towards zero only fights the loss.
    Parameters that ask for no gradient are left out.

    Raises:
        ValueError: If every parameter is frozen.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ValueError("every parameter is frozen (requires_grad=False): there is nothing to train")
    matrices = [parameter for parameter in trained if parameter.dim() >= 2]
    vectors = [parameter for parameter in trained if parameter.dim() < 2]
    return [
        group
        for group in (
            {"params": matrices, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        )
        if group["params"]
    ]


def step_seed(seed: int, step: int, *more: int) -> int:
    """A seed that belongs to one update of one run, so that no update depends on what was drawn before it."""
    text = "/".join(str(number) for number in (seed, step, *more))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def train(
    model: nn.Module,
    tokens: Int[Tensor, "tokens"],
    config: TrainingConfig,
    folder: Path | str | None = None,
    *,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    before_step: Callable[[int], None] | None = None,
    after_step: Callable[[int, Any], None] | None = None,
    report: Callable[[str], None] | None = None,
    workers: Workers | None = None,
) -> TrainingLog:
    """Trains a model in place.

    The order of the data follows from the seed and the number of the update alone. A run with a folder writes
    its complete state there every ``checkpoint_every`` updates and at the end, and the same call made again goes on
    from the last checkpoint, to the same numbers bit for bit on the same machine.

    With several processes each takes its share of every batch and the gradients are averaged, so the cross
    entropy is that of one process up to rounding. A router's balancing loss, however, is computed from
    the statistics of each process's share (and of each micro-batch), which is not the loss of the whole batch.

    Args:
        model: A ``Decoder``, or whatever has its ``forward(input_ids)`` and ``loss(output, targets)``; where its
            parameters lie, there it is trained.
        tokens: The training text as one stream.
        config: How to train.
        folder: Where checkpoints go; none are written without it.
        evaluate: Called with the model every ``eval_every`` updates and at the end; what it returns is logged.
        before_step: Called with the number of each update, from 0, before it; for curricula.
        after_step: Called with the number of each update and the output of its last micro-batch, after it.
        report: Called with a line of progress after each update; quiet without it.
        workers: This process among several (``medarch.lm.distributed.workers``).

    Returns:
        What was measured, from the first update on, also for a resumed run.

    Raises:
        ValueError: If the text is too short, nothing is to be trained, the batch does not divide among the
            processes, or the folder holds a run of other data or settings.
        FloatingPointError: If the loss or the gradient is no longer finite; the last checkpoint is kept.
        OSError: If a checkpoint cannot be written; the one before it is kept.
    """
    return _Run(model, tokens, config, folder, workers or Workers()).train(evaluate, before_step, after_step, report)


class _Run:
    def __init__(
        self, model: nn.Module, tokens: Tensor, config: TrainingConfig, folder: Path | str | None, workers: Workers
    ) -> None:
        self.model: Any = model  # beyond a module's own, it has a loss and perhaps a config
        self.tokens, self.config, self.workers = tokens, config, workers
        self.folder = None if folder is None else Path(folder)
        parts = config.accumulation * workers.size
        if config.batch_size % parts:
            raise ValueError(
                f"batch_size={config.batch_size} does not divide into accumulation={config.accumulation} micro-batches "
                f"for each of {workers.size} processes: make it a multiple of {parts}"
            )
        self.device = next(model.parameters()).device
        self.names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, config.weight_decay),
            lr=config.learning_rate,
            betas=config.betas,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.log = TrainingLog()
        self.step = 0
        self.saved: int | None = None
        self.identity = {} if self.folder is None else self._identity()
        if self.folder is not None:
            self._resume()
        self.wrapped = workers.wrap(model)

    def train(
        self,
        evaluate: Callable[[nn.Module], dict[str, float]] | None,
        before_step: Callable[[int], None] | None,
        after_step: Callable[[int, Any], None] | None,
        report: Callable[[str], None] | None,
    ) -> TrainingLog:
        config, resumed, started = self.config, self.step, time.perf_counter()
        was_training = self.model.training
        devices = [self.device] if self.device.type == "cuda" else []
        # The default generator serves dropout and noise within the run; outside it is left as it was.
        with torch.random.fork_rng(devices=devices):
            self.model.train()
            while self.step < config.steps:
                if before_step is not None:
                    before_step(self.step)
                begun = time.perf_counter()
                output = self._update()
                self.log.seconds += time.perf_counter() - begun
                if after_step is not None:
                    after_step(self.step, output)
                self.step += 1
                last = self.step == config.steps
                if evaluate is not None and (last or (config.eval_every and self.step % config.eval_every == 0)):
                    self._evaluate(evaluate)
                if last or (config.checkpoint_every and self.step % config.checkpoint_every == 0):
                    self._save()
                if report is not None and self.workers.first:
                    report(self._progress(resumed, time.perf_counter() - started))
        self.model.train(was_training)
        return self.log

    def _update(self) -> Any:
        """One update of the weights, from every micro-batch of this process's share."""
        config, workers = self.config, self.workers
        generator = torch.Generator().manual_seed(step_seed(config.seed, self.step))
        torch.manual_seed(step_seed(config.seed, self.step, workers.rank))
        inputs, targets = sample_batch(self.tokens, config.batch_size, config.length, generator)
        size = config.batch_size // (config.accumulation * workers.size)
        rate = learning_rate(config, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        output = None
        for part in range(config.accumulation):
            # Rank by rank within a micro-batch, so that a micro-batch of all processes is one stretch of the batch.
            first = (part * workers.size + workers.rank) * size
            mine = slice(first, first + size)
            with workers.gather_later(self.wrapped, last=part == config.accumulation - 1):
                output = self.wrapped(inputs[mine].to(self.device))
                loss, parts = self.model.loss(output, targets[mine].to(self.device))
                (loss / config.accumulation).backward()
            for name, value in {"loss": float(loss.detach()), **parts}.items():
                sums[name] = sums.get(name, 0.0) + value / config.accumulation
        means = workers.mean(torch.tensor(list(sums.values()), dtype=torch.float64, device=self.device)).tolist()
        entry = {"step": self.step + 1, **dict(zip(sums, means, strict=True)), "learning_rate": rate}
        norm = float(nn.utils.clip_grad_norm_(list(self.names), config.clip))
        for name, value in (("the loss", entry["loss"]), ("the gradient's norm", norm)):
            if not math.isfinite(value):
                raise FloatingPointError(self._diverged(name, value, rate))
        self.optimizer.step()
        self.log.steps.append(entry | {"gradient_norm": norm})
        self.log.tokens += config.batch_size * config.length
        return output

    def _diverged(self, name: str, value: float, rate: float) -> str:
        if self.folder is None:
            kept = "the weights are those before it"
        elif self.saved is None:
            kept = f"no checkpoint had been written to {self.folder} yet"
        else:
            kept = f"the checkpoint of step {self.saved} in {self.folder} is kept"
        return (
            f"{name} is {value} at step {self.step + 1} (learning rate {rate:.3g}); {kept}. "
            "Lower learning_rate, lengthen warmup_steps, or look for NaN in the weights that training began with"
        )

    def _evaluate(self, evaluate: Callable[[nn.Module], dict[str, float]]) -> None:
        if self.workers.first:
            self.model.eval()
            with torch.no_grad():
                self.log.evaluations.append({"step": self.step, **evaluate(self.model)})
            self.model.train()

    def _progress(self, resumed: int, elapsed: float) -> str:
        entry, left = self.log.steps[-1], self.config.steps - self.step
        done = self.step - resumed
        speed = done * self.config.batch_size * self.config.length / elapsed
        minutes, seconds = divmod(round(left * elapsed / done), 60)
        evaluated = ""
        if self.log.evaluations and self.log.evaluations[-1]["step"] == self.step:
            shown = {name: value for name, value in self.log.evaluations[-1].items() if name != "step"}
            evaluated = "".join(f"  {name} {value:.4f}" for name, value in shown.items())
        return (
            f"step {self.step}/{self.config.steps}  loss {entry['loss']:.4f}  {speed:,.0f} tokens/s  "
            f"learning rate {entry['learning_rate']:.2e}  {minutes}:{seconds:02d} left{evaluated}"
        )

    def _identity(self) -> dict[str, Any]:
        bound = dataclasses.asdict(self.config)
        for name in UNBOUND:
            bound.pop(name)
        model = self.model.config.to_dict() if hasattr(self.model, "config") else {}
        # What JSON gives back, so that a tuple equals the list that it is read as.
        return json.loads(json.dumps({"data": data_hash(self.tokens), "model": model, "training": bound}))

    def _save(self) -> None:
        if self.folder is None or not self.workers.first:
            return
        state = TrainingState(
            step=self.step,
            weights=self.model.state_dict(),
            optimizer={self.names[parameter]: dict(kept) for parameter, kept in self.optimizer.state.items()},
            generators={name: owned.get_state() for name, owned in module_generators(self.model).items()},
            identity=self.identity,
            log=dataclasses.asdict(self.log),
        )
        save_state(self.folder, state)
        self.saved = self.step

    def _resume(self) -> None:
        assert self.folder is not None
        state = load_state(self.folder, self.device)
        if state is None:
            return
        refuse_other_run(self.folder, state.identity, self.identity)
        self.model.load_state_dict(state.weights)
        parameters = {name: parameter for parameter, name in self.names.items()}
        for name, kept in state.optimizer.items():
            self.optimizer.state[parameters[name]] = kept
        for name, owned in module_generators(self.model).items():
            owned.set_state(state.generators[name])
        self.log = TrainingLog(**state.log)
        self.step = self.saved = state.step
