"""Writing with a language model: one token after another, the likeliest or one drawn by lot."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from medarch.lm.decoder import Decoder

if TYPE_CHECKING:
    from medarch.lm.tokenizer import Tokenizer


def keep_top_k(logits: Float[Tensor, "batch vocab"], k: int) -> Float[Tensor, "batch vocab"]:
    """Rules out every token that scores below the k-th best (Fan et al. 2018, arXiv:1805.04833).

    Args:
        logits: scores of the next token.
        k: how many tokens to keep; more are kept where several share the k-th score.

    Returns:
        The scores, with minus infinity for a token that is ruled out.

    Raises:
        ValueError: If k is less than one.
    """
    if k < 1:
        raise ValueError(f"top_k={k} must be at least 1")
    smallest = logits.topk(min(k, logits.shape[-1])).values[:, -1:]
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits: Float[Tensor, "batch vocab"], p: float) -> Float[Tensor, "batch vocab"]:
    """Keeps the nucleus, the fewest tokens whose probabilities sum to at least p.

    This is nucleus sampling as Holtzman et al. 2020 (arXiv:1904.09751, section 3.1) define it.

    Args:
        logits: scores of the next token.
        p: the probability that the nucleus must reach. The likeliest token is always kept.

    Returns:
        The scores, with minus infinity for a token outside the nucleus.

    Raises:
        ValueError: If p is not above zero and at most one.
    """
    if not 0 < p <= 1:
        raise ValueError(f"top_p={p} must be above 0 and at most 1")
    ordered, order = logits.sort()
    # A token is outside where those likelier than it already reach p, so that it and all below hold at most
    # the rest. Summed from the small end, where rounding costs least.
    outside = ordered.softmax(-1).cumsum(-1) <= 1 - p
    outside[:, -1] = False
    return logits.masked_fill(torch.zeros_like(outside).scatter(-1, order, outside), -torch.inf)


def next_token(
    logits: Float[Tensor, "batch vocab"],
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " batch"]:
    """Chooses a token from the scores.

    Args:
        logits: scores of the next token.
        temperature: divides the scores before the softmax. Below one the likely becomes likelier; at zero
            the likeliest token is taken, and nothing is drawn.
        top_k: see :func:`keep_top_k`.
        top_p: see :func:`keep_top_p`; applied after ``top_k``.
        generator: source of randomness; torch's default generator where it is absent.

    Returns:
        One id for each row.

    Raises:
        ValueError: If an argument is out of its range, or a score is not a number.
    """
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be zero or more, and finite")
    if logits.isnan().any():
        raise ValueError("the model's scores contain NaN: look for NaN among its weights")
    logits = logits.float() if temperature == 0 else logits.float() / temperature
    if not logits.max() < torch.inf:
        raise ValueError(
            f"the model's scores over temperature={temperature} are not finite: take temperature=0, which means the "
            "likeliest token, or look for infinity among the model's weights"
        )
    if top_k is not None:
        logits = keep_top_k(logits, top_k)
    if top_p is not None:
        logits = keep_top_p(logits, top_p)
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


@torch.no_grad()
def generate(
    model: Decoder,
    input_ids: Int[Tensor, "batch time"],
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
    end_of_text: int | None = None,
    use_cache: bool = True,
) -> Int[Tensor, "batch longer"]:
    """Continues each prompt, token by token.

    The prompt is read in one pass, which fills the cache; from then on each pass reads one token. Without the
    cache every pass reads everything again, which gives the same tokens and takes longer.

    Args:
        model: the decoder; its training mode is restored afterwards.
        input_ids: prompts of equal length.
        max_new_tokens: at most so many tokens are added.
        temperature: see :func:`next_token`; zero takes the likeliest token every time.
        top_k: draw from the k likeliest tokens alone.
        top_p: draw from the nucleus alone.
        generator: source of randomness; torch's default generator where it is absent.
        end_of_text: the token with which a row is finished; what follows it in a row whose neighbours go on
            is filled with the same token. Without it, every row gets ``max_new_tokens`` tokens.
        use_cache: whether keys and values are kept.

    Returns:
        Prompts and continuations; shorter than ``time + max_new_tokens`` where all rows have finished.

    Raises:
        ValueError: If the prompt is empty or holds an id that the model does not know, prompt and continuation
            do not fit into the model's context, or an argument is out of its range.
    """
    _check_prompt(model, input_ids, max_new_tokens)
    batch, time = input_ids.shape
    cache = model.new_cache(batch, time + max_new_tokens) if use_cache else None
    finished = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)
    ids = unread = input_ids
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            logits = model(unread, cache=cache, logits_to_keep=1).logits[:, -1]
            chosen = next_token(logits, temperature, top_k, top_p, generator).to(ids.dtype)
            if end_of_text is not None:
                chosen = chosen.masked_fill(finished, end_of_text)
                finished = chosen == end_of_text
            ids = torch.cat([ids, chosen[:, None]], dim=1)
            unread = chosen[:, None] if use_cache else ids
            if finished.all():
                break
    finally:
        model.train(was_training)
    return ids


def complete(
    model: Decoder,
    tokenizer: Tokenizer,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> str:
    """Continues a text to the end of the document, or for ``max_new_tokens``.

    The prompt is taken as the beginning of a document: the end of text that separates documents in training
    stands before it, so that even an empty prompt gives the model something to read.

    Args:
        model: the decoder.
        tokenizer: the tokenizer that it was trained with.
        prompt: the beginning of the text.
        max_new_tokens: at most so many tokens are added.
        temperature: see :func:`generate`, and so for what follows.
        top_k: draw from the k likeliest tokens alone.
        top_p: draw from the nucleus alone.
        generator: source of randomness.

    Returns:
        The prompt and its continuation, without the end of text.

    Raises:
        ValueError: As :func:`generate` does.
    """
    end = tokenizer.end_of_text
    ids = torch.tensor([[end, *tokenizer.encode(prompt)]], device=next(model.parameters()).device)
    row = generate(model, ids, max_new_tokens, temperature, top_k, top_p, generator, end)[0, 1:].tolist()
    return tokenizer.decode(row[:-1] if row and row[-1] == end else row)


def _check_prompt(model: Decoder, input_ids: Tensor, max_new_tokens: int) -> None:
    """Refuses, at the door, a prompt that the model cannot continue."""
    if input_ids.dim() != 2 or input_ids.is_floating_point():
        raise ValueError(
            f"input_ids must be whole numbers of shape (batch, time), got {input_ids.dtype} of shape "
            f"{tuple(input_ids.shape)}"
        )
    batch, time = input_ids.shape
    context = model.config.max_position_embeddings
    if batch == 0 or time == 0:
        raise ValueError(
            f"the prompt is empty, shape {tuple(input_ids.shape)}: give at least one token, such as the end of text"
        )
    if not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens!r} must be a whole number of at least 1")
    if time > context:
        raise ValueError(
            f"the prompt has {time} tokens but the model's context is max_position_embeddings={context}: shorten it"
        )
    if time + max_new_tokens > context:
        fewer = f"ask for at most {context - time} new tokens or " if time < context else ""
        raise ValueError(
            f"a prompt of {time} tokens and max_new_tokens={max_new_tokens} exceed the model's context, "
            f"max_position_embeddings={context}: {fewer}shorten the prompt"
        )
