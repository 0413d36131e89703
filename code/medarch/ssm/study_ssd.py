"""How fast the chunked form of Mamba-2's scan is: against other implementations, other forms, and Mamba's own scan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from medarch.bench import benchmark, compare
from medarch.bench.memory import peak_memory
from medarch.ssm.scan import selective_scan
from medarch.ssm.ssd import CHUNK_SIZE, ssd

Inputs = dict[str, Tensor]
BATCH, HEADS, HEAD_DIM, STATES, LENGTH = 2, 4, 64, 16, 2048
STATE_SIZES = (16, 32, 64, 128)
MODES = ("forward", "forward_backward")


class Variant(NamedTuple):
    """One way to compute the same thing.

    Attributes:
        run: From its inputs to the output, of (batch, time, heads, head).
        prepare: Brings the inputs into the form that ``run`` takes; this is not timed.
    """

    run: Callable[..., Tensor]
    prepare: Callable[[Inputs], Inputs] = dict


@benchmark("ssm/ssd-speed", modules=["medarch.ssm.study_ssd"])
def ssd_speed(device: str = "cpu", quick: bool = False) -> dict[str, Any]:
    """Time of the chunked form of Mamba-2's scan and of what one would use instead, one thread.

    Two sequences of 2,048 steps, 4 heads of 64 channels that share B and C, and 16 states. Mamba's own scan works on
    the same 256 channels.

    Args:
        device: Where to run, ``"cpu"`` or ``"cuda"``.
        quick: Whether to run small sizes, to see that everything works.

    Returns:
        ``variants``: for each mode, the times over ours and the peak memory in bytes. ``states``: for each number of
        states, our time over that of Mamba's scan. ``lengths``: for each length, the times of the three forms.
        ``growth``: our time by length. ``chunks``: our time by chunk size.

    Raises:
        ValueError: If two variants disagree (what is wrong is not timed), or transformers is missing.
    """
    rounds, length, head_dim = (3, 48, 5) if quick else (9, LENGTH, HEAD_DIM)
    variants = build_variants()
    check_agreement(variants, make_inputs(2 * CHUNK_SIZE + 13, head_dim=5, device=device))
    results: dict[str, Any] = {
        "sizes": {"batch": BATCH, "heads": HEADS, "head_dim": head_dim, "states": STATES, "length": length},
        "repeats": rounds,
        "variants": {},
        "states": {},
        "lengths": {},
        "growth": {},
        "chunks": {},
    }

    def timed(chosen: dict[str, Callable[[], Any]], baseline: str) -> dict[str, Any]:
        return compare(chosen, baseline=baseline, rounds=rounds, threads=1, device=device).to_dict()

    inputs = make_inputs(length, head_dim=head_dim, device=device)
    chunks = {str(size): Variant(chunked_by(size)) for size in (8, 16, 32, 64, 128, 256)}
    for mode in MODES:
        chosen = calls(variants, inputs, mode)
        memory = {name: peak_memory(call, device=device) for name, call in chosen.items()}
        results["variants"][mode] = timed(chosen, "ssd") | {"peak_bytes": memory}
        results["chunks"][mode] = timed(calls(chunks, inputs, mode), str(CHUNK_SIZE))

    pair = {name: variants[name] for name in ("ssd", "selective_scan")}
    for states in STATE_SIZES:
        inputs = make_inputs(length, states=states, head_dim=head_dim, device=device)
        results["states"][str(states)] = {mode: timed(calls(pair, inputs, mode), "selective_scan") for mode in MODES}

    for mode in MODES:
        growing = {
            str(each): calls({"ssd": variants["ssd"]}, make_inputs(each, head_dim=head_dim, device=device), mode)["ssd"]
            for each in (length // 2, length, 2 * length, 4 * length)
        }
        results["growth"][mode] = timed(growing, str(length))

    forms = {name: variants[name] for name in ("recurrent", "quadratic", "ssd")}
    for power in range(-5, 3):
        each = int(length * 2.0**power)
        # Beyond this the matrix takes gigabytes, and one round of the loop a second.
        taking_part = forms if power < 1 else {"ssd": variants["ssd"]}
        inputs = make_inputs(each, head_dim=head_dim, device=device)
        results["lengths"][str(each)] = timed(calls(taking_part, inputs, "forward"), "ssd")
    return results


def make_inputs(
    length: int, states: int = STATES, head_dim: int = HEAD_DIM, device: str = "cpu", seed: int = 0
) -> Inputs:
    """Inputs of usual sizes: step sizes from thousandths to tenths, rates of decay from 1 to 16."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    made = {
        "x": normal(BATCH, length, HEADS, head_dim),
        "dt": F.softplus(normal(BATCH, length, HEADS) - 4),
        "A": -torch.linspace(1, 16, HEADS),
        "B": normal(BATCH, length, 1, states),
        "C": normal(BATCH, length, 1, states),
    }
    return {name: tensor.to(device) for name, tensor in made.items()}


def build_variants() -> dict[str, Variant]:
    """Each competitor; ``recurrent`` is the specification.

    Raises:
        ValueError: If transformers is not installed.
    """
    try:
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
    except ImportError as missing:
        raise ValueError(
            "ssm/ssd-speed compares with transformers, which is not installed: run `make test` once"
        ) from missing

    def transformers(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return mamba2_chunk_scan(x, dt, A, B, C, chunk_size=256)

    return {
        "ssd": Variant(ssd),
        "ssd_64": Variant(chunked_by(64)),
        "listing_64": Variant(listing),
        "listing_32": Variant(lambda **inputs: listing(**inputs, chunk_size=CHUNK_SIZE)),
        "transformers_256": Variant(transformers),
        "quadratic": Variant(lambda **inputs: ssd(**inputs, method="quadratic")),
        "recurrent": Variant(lambda **inputs: ssd(**inputs, method="recurrent")),
        "selective_scan": Variant(mamba_scan, for_mamba),
    }


def chunked_by(size: int) -> Callable[..., Tensor]:
    """Our chunked form with chunks of another size."""
    return lambda **inputs: ssd(**inputs, chunk_size=size)


def listing(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int = 64) -> Tensor:
    """The algorithm of the paper's listing (Dao & Gu 2024, arXiv:2405.21060, listing 1): one einsum for each step.

    As there, B and C are given to each head, the state passes between chunks by a product with the matrix of all
    pairs of chunks, and the backward pass is autograd's.
    """
    time, heads = x.shape[1:3]
    missing = -time % chunk_size
    log_decay, x = dt * A, x * dt[..., None]
    if missing:
        x, log_decay, B, C = (F.pad(each, (0, 0) * (each.dim() - 2) + (0, missing)) for each in (x, log_decay, B, C))
    B, C = (each.expand(-1, -1, heads, -1) for each in (B, C))
    x, log_decay, B, C = (each.unflatten(1, (-1, chunk_size)) for each in (x, log_decay, B, C))
    log_decay = log_decay.permute(0, 3, 1, 2)
    sums = log_decay.cumsum(-1)
    within = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, masked_sum(log_decay).exp(), x)
    added = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, (sums[..., -1:] - sums).exp(), x)
    added = torch.cat([torch.zeros_like(added[:, :1]), added], dim=1)
    passed = masked_sum(F.pad(sums[..., -1], (1, 0))).exp()
    before = torch.einsum("bhzc,bchpn->bzhpn", passed, added)[:, :-1]
    between = torch.einsum("bclhn,bchpn,bhcl->bclhp", C, before, sums.exp())
    return (within + between).flatten(1, 2)[:, :time]


def masked_sum(values: Tensor) -> Tensor:
    """The segment sum as the paper takes it: a running sum of what has been masked, and no difference."""
    size = values.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=values.device)
    repeated = values[..., None].expand(*values.shape, size).masked_fill(~ones.tril(-1), 0)
    return repeated.cumsum(-2).masked_fill(~ones.tril(), -torch.inf)


def for_mamba(inputs: Inputs) -> Inputs:
    """The same inputs as Mamba's scan takes them: a step size for each channel, rates for each state."""
    x, dt, A, B, C = (inputs[name] for name in ("x", "dt", "A", "B", "C"))
    head, states = x.shape[3], B.shape[3]
    # Channels lie together in memory, as in the mixer.
    return {
        "u": x.flatten(2).transpose(1, 2),
        "delta": dt.repeat_interleave(head, dim=2).transpose(1, 2),
        "A": A.repeat_interleave(head)[:, None].repeat(1, states),
        "B": B.squeeze(2).transpose(1, 2),
        "C": C.squeeze(2).transpose(1, 2),
    }


def mamba_scan(**inputs: Any) -> Tensor:
    """Mamba's scan, its channels told apart by head."""
    return selective_scan(**inputs).transpose(1, 2).unflatten(2, (HEADS, -1))


def calls(variants: dict[str, Variant], inputs: Inputs, mode: str) -> dict[str, Callable[[], Any]]:
    """What is timed of each variant: one inference, or one forward and backward pass to the gradient of every input."""
    cotangent = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(1)).to(inputs["x"].device)

    def call(variant: Variant) -> Callable[[], Any]:
        prepared = {name: tensor.detach() for name, tensor in variant.prepare(inputs).items()}
        if mode == "forward":
            return torch.no_grad()(lambda: variant.run(**prepared))
        given = {name: tensor.clone().requires_grad_() for name, tensor in prepared.items()}
        return lambda: torch.autograd.grad(variant.run(**given), list(given.values()), cotangent)

    return {name: call(variant) for name, variant in variants.items()}


def check_agreement(variants: dict[str, Variant], inputs: Inputs) -> None:
    """Holds every variant to the recurrence: its output and all its gradients.

    Raises:
        ValueError: Naming the variant and the quantity that differ.
    """
    cotangent = torch.randn(inputs["x"].shape, generator=torch.Generator().manual_seed(1)).to(inputs["x"].device)

    def outcome(variant: Variant) -> list[Tensor]:
        given = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        y = variant.run(**variant.prepare(given))
        return [y.detach(), *torch.autograd.grad(y, list(given.values()), cotangent)]

    expected = outcome(variants["recurrent"])
    for name, variant in variants.items():
        for quantity, value, other in zip(("y", *inputs), expected, outcome(variant), strict=True):
            try:
                torch.testing.assert_close(other, value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))
            except AssertionError as difference:
                raise ValueError(f"{name} disagrees with the recurrence in {quantity}: {difference}") from difference
