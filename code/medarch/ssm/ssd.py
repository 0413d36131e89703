"""State space duality: the scan of Mamba-2, which is a recurrence and a matrix at once.

Shapes, throughout: ``batch`` sequences of ``time`` steps, ``heads`` of ``head`` channels each, ``states`` numbers for
each channel, and ``groups`` of heads that share B and C. With x the input and h the state, for each head by itself

    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T,      y_t = h_t C_t + D x_t

where h is a matrix of (head, states), and A one negative number a head: all that a head remembers fades at one rate.
This is what sets Mamba-2 apart from Mamba, and what makes y = M x with a matrix M that looks like masked attention
(Dao & Gu 2024, arXiv:2405.21060, definition 3.3 and section 5).

Three forms compute it. ``ssd_recurrent`` is the specification, ``ssd_quadratic`` writes the whole matrix down, and
``ssd_chunked`` takes the matrix within short chunks and the recurrence between them; it is the one to use.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from medarch.ssm.ssd_chunks import ChunkedSSD

Method = Literal["recurrent", "quadratic", "chunked"]
CHUNK_SIZE = 32
"""Steps of one chunk; at usual sizes neither the matrices within chunks nor the states between them dominate."""


def ssd(
    x: Float[Tensor, "batch time heads head"],
    dt: Float[Tensor, "batch time heads"],
    A: Float[Tensor, "heads"],
    B: Float[Tensor, "batch time groups states"],
    C: Float[Tensor, "batch time groups states"],
    chunk_size: int = CHUNK_SIZE,
    D: Float[Tensor, "heads"] | None = None,
    z: Float[Tensor, "batch time heads head"] | None = None,
    dt_bias: Float[Tensor, "heads"] | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    initial_states: Float[Tensor, "batch heads head states"] | None = None,
    return_final_states: bool = False,
    method: Method = "chunked",
) -> Any:
    """Runs the recurrence over a sequence; the arguments are those of mamba_ssm's ``mamba_chunk_scan_combined``.

    Half-precision inputs are computed with in float32. All inputs have gradients, ``initial_states`` and the final
    states too.

    Args:
        x: Input.
        dt: Step sizes, in the unit of time in which A is a rate.
        A: Rate of decay of each head, negative.
        B: What the input adds to the state, for each group of heads.
        C: What is read from the state.
        chunk_size: Steps that the chunked form takes at a time; the result does not depend on it.
        D: What passes by the state; nothing does where it is absent.
        z: Gate: the output is multiplied by silu(z).
        dt_bias: Added to ``dt`` first.
        dt_softplus: Whether log(1 + exp(.)) is taken of the step sizes then.
        dt_limit: Least and largest step size, to which they are clamped last.
        initial_states: State before the first step; zeros where it is absent.
        return_final_states: Whether the state after the last step is returned too.
        method: ``"recurrent"``, ``"quadratic"`` or ``"chunked"``.

    Returns:
        The output, of the shape and type of ``x``; with ``return_final_states`` the output and the state.

    Raises:
        ValueError: If a shape, type or device clashes, the sequence is empty, or a value is out of range (A is looked
            at on a CPU alone); the message names both sides.
    """
    check_ssd(x, dt, A, B, C, D, z, dt_bias, initial_states)
    if not (isinstance(chunk_size, int) and chunk_size >= 1):
        raise ValueError(f"chunk_size must be a whole number of at least 1, got {chunk_size!r}")
    if method not in get_args(Method):
        raise ValueError(f"method={method!r} is not one of {get_args(Method)}")
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        dt = step_sizes(dt.to(wide), dt_bias, dt_softplus, dt_limit)
        inputs, A, B, C = x.to(wide), A.to(wide), B.to(wide), C.to(wide)
        shape = (x.shape[0], *x.shape[2:], B.shape[3])
        states = inputs.new_zeros(shape) if initial_states is None else initial_states.to(wide)
        if method == "chunked" and x.shape[1] > 1:
            y, states = ssd_chunked(inputs, dt, A, B, C, states, chunk_size)
        else:
            # A single step is a step of the recurrence, whatever the form.
            form = ssd_quadratic if method == "quadratic" else ssd_recurrent
            y, states = form(inputs, dt, A, B, C, states)
        if D is not None:
            y = torch.addcmul(y, D.to(wide)[:, None], inputs)
        if z is not None:
            y = y * F.silu(z.to(wide))
    return (y.to(x.dtype), states) if return_final_states else y.to(x.dtype)


def step_sizes(
    dt: Float[Tensor, "batch time heads"],
    dt_bias: Float[Tensor, "heads"] | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> Float[Tensor, "batch time heads"]:
    """The step sizes that the recurrence takes: shifted, made positive, and clamped.

    Raises:
        ValueError: If the limits are out of order, or allow a negative step, which would let the state grow.
    """
    low, high = dt_limit
    if not 0 <= low <= high:
        raise ValueError(f"dt_limit must be two numbers in order, the first not negative, got {tuple(dt_limit)}")
    dt = dt if dt_bias is None else dt + dt_bias.to(dt.dtype)
    dt = F.softplus(dt) if dt_softplus else dt
    # The result of softplus lies within the default limits, and clamping costs a pass over memory.
    return dt if dt_softplus and (low, high) == (0, math.inf) else dt.clamp(low, high)


Scanned = tuple[Float[Tensor, "batch time heads head"], Float[Tensor, "batch heads head states"]]


def ssd_recurrent(
    x: Float[Tensor, "batch time heads head"],
    dt: Float[Tensor, "batch time heads"],
    A: Float[Tensor, "heads"],
    B: Float[Tensor, "batch time groups states"],
    C: Float[Tensor, "batch time groups states"],
    states: Float[Tensor, "batch heads head states"],
) -> Scanned:
    """The recurrence as it is written, one step after the other: the specification of the other forms.

    Returns:
        h_t C_t for every step, and the last state.
    """
    B, C = each_head(B, x.shape[2]), each_head(C, x.shape[2])
    outputs = []
    # Taken apart once: indexing one step at a time would make the backward pass quadratic in the length.
    for x_t, dt_t, B_t, C_t in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        decay = torch.exp(dt_t * A)
        states = decay[..., None, None] * states + (dt_t[..., None] * x_t)[..., None] * B_t[:, :, None, :]
        outputs.append((states * C_t[:, :, None, :]).sum(-1))
    return torch.stack(outputs, dim=1), states


def segment_sum(log_decay: Float[Tensor, "*batch time"]) -> Float[Tensor, "*batch time time"]:
    """Entry (t, s) is the sum of the values after s up to t; above the diagonal stands minus infinity.

    It is a difference of two running sums, taken in float64: where a strong decay has made both large, a weak one after
    it would be lost in their rounding. What lies above the diagonal would be positive; it is struck out before anybody
    takes its exponential.
    """
    sums = log_decay.double().cumsum(-1)
    later = torch.ones(sums.shape[-1:] * 2, dtype=torch.bool, device=sums.device).triu(1)
    return (sums[..., :, None] - sums[..., None, :]).to(log_decay.dtype).masked_fill(later, -math.inf)


def ssd_matrix(
    dt: Float[Tensor, "batch time heads"],
    A: Float[Tensor, "heads"],
    B: Float[Tensor, "batch time groups states"],
    C: Float[Tensor, "batch time groups states"],
) -> Float[Tensor, "batch heads time time"]:
    """The matrix M that a head multiplies its input with: M_ts = (C_t . B_s) exp(sum of dt A after s up to t) dt_s.

    C is in the place of the queries and B in that of the keys; the exponential, zero above the diagonal, in that of
    the causal mask.
    """
    scores = torch.einsum("bthn,bshn->bhts", each_head(C, len(A)), each_head(B, len(A)))
    decay = segment_sum((dt * A).transpose(1, 2)).exp()
    return scores * decay * dt.transpose(1, 2)[:, :, None, :]


def ssd_quadratic(
    x: Float[Tensor, "batch time heads head"],
    dt: Float[Tensor, "batch time heads"],
    A: Float[Tensor, "heads"],
    B: Float[Tensor, "batch time groups states"],
    C: Float[Tensor, "batch time groups states"],
    states: Float[Tensor, "batch heads head states"],
) -> Scanned:
    """One product with the whole matrix: time and memory quadratic in the length, as in attention.

    Returns:
        As ``ssd_recurrent``.
    """
    B_heads, C_heads = each_head(B, len(A)), each_head(C, len(A))
    y = torch.einsum("bhts,bshp->bthp", ssd_matrix(dt, A, B, C), x)
    so_far = (dt * A).cumsum(1)
    y = y + so_far.exp()[..., None] * torch.einsum("bthn,bhpn->bthp", C_heads, states)
    remaining = segment_sum((dt * A).transpose(1, 2))[:, :, -1].exp()
    added = torch.einsum("bhs,bsh,bshp,bshn->bhpn", remaining, dt, x, B_heads)
    return y, so_far[:, -1].exp()[..., None, None] * states + added


def ssd_chunked(
    x: Float[Tensor, "batch time heads head"],
    dt: Float[Tensor, "batch time heads"],
    A: Float[Tensor, "heads"],
    B: Float[Tensor, "batch time groups states"],
    C: Float[Tensor, "batch time groups states"],
    states: Float[Tensor, "batch heads head states"],
    chunk_size: int = CHUNK_SIZE,
) -> Scanned:
    """Matrix products within chunks, the recurrence between them: time linear in the length.

    Returns:
        As ``ssd_recurrent``.
    """
    time = x.shape[1]
    chunk_size = min(chunk_size, time)
    missing = -time % chunk_size
    if missing:
        # A step of size zero adds nothing to the state and lets none of it fade.
        x, dt, B, C = (F.pad(each, (0, 0) * (each.dim() - 2) + (0, missing)) for each in (x, dt, B, C))
    y, states = ChunkedSSD.apply(x, dt, A, B, C, states, chunk_size)
    return y[:, :time], states


def each_head(
    grouped: Float[Tensor, "batch time groups states"], heads: int
) -> Float[Tensor, "batch time heads states"]:
    """What each head sees of B or C: that of its group."""
    return grouped.repeat_interleave(heads // grouped.shape[2], dim=2)


def check_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
) -> None:
    """Refuses, at the door, what could only fail obscurely within.

    Raises:
        ValueError: Naming the two things that clash.
    """
    if x.dim() != 4 or not x.shape[1]:
        raise ValueError(f"x must be (batch, time, heads, head) with at least one step, got {tuple(x.shape)}")
    if B.dim() != 4 or not B.shape[2] or x.shape[2] % B.shape[2]:
        raise ValueError(
            f"B must be (batch, time, groups, states) with groups that divide the {x.shape[2]} heads of x, "
            f"got {tuple(B.shape)}"
        )
    batch, time, heads, head = x.shape
    groups, states = B.shape[2:]
    shapes: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "dt": (dt, (batch, time, heads)),
        "A": (A, (heads,)),
        "B": (B, (batch, time, groups, states)),
        "C": (C, (batch, time, groups, states)),
        "D": (D, (heads,)),
        "z": (z, (batch, time, heads, head)),
        "dt_bias": (dt_bias, (heads,)),
        "initial_states": (initial_states, (batch, heads, head, states)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)} but must be {shape}, since x is {tuple(x.shape)} and B has "
                f"{groups} groups of {states} states"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} but x is on {x.device}: move one of them with .to(...)")
        # What is small or decides about the decay may be kept in a wider type than what passes through.
        free = name in ("dt", "A", "D", "dt_bias", "initial_states") and tensor.is_floating_point()
        same = tensor.dtype == x.dtype or free
        if not (x.is_floating_point() and same):
            raise ValueError(f"{name} is {tensor.dtype} but x is {x.dtype}: convert one of them with .to(...)")
    # On a GPU the look would wait for all work before it.
    if A.device.type == "cpu" and not (A < 0).all():
        raise ValueError(f"A must be negative, or the state would not fade; its largest value is {float(A.max())}")
