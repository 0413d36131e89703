"""A decoder grown into a mixture of experts says the same until it is trained."""

import pytest
import torch

from medarch.lm.config import DecoderConfig
from medarch.lm.decoder import Decoder
from medarch.lm.upcycling import upcycle_decoder
from medarch.moe.curriculum import expert_similarity

SIZES = {"vocab_size": 61, "hidden_size": 12, "intermediate_size": 17, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.mark.parametrize("tied", [True, False])
def test_the_logits_are_the_same_and_the_weights_are_its_own(tied):
    generator = torch.Generator().manual_seed(0)
    dense = Decoder(DecoderConfig(**SIZES, tie_word_embeddings=tied, initializer_range=0.3), generator).double()
    before = {name: weight.clone() for name, weight in dense.state_dict().items()}
    grown = upcycle_decoder(dense, num_experts=5, num_experts_per_tok=2, generator=generator)
    ids = torch.randint(61, (3, 13), generator=generator)
    torch.testing.assert_close(grown(ids).logits, dense(ids).logits, rtol=1e-6, atol=1e-6)
    assert grown.config.moe.intermediate_size == 17
    assert [expert_similarity(layer.feed_forward) for layer in grown.layers] == pytest.approx([1, 1, 1])
    with torch.no_grad():
        for weight in grown.parameters():
            weight.add_(1)
    assert all(torch.equal(weight, before[name]) for name, weight in dense.state_dict().items())


def test_a_mixture_is_refused():
    grown = upcycle_decoder(Decoder(DecoderConfig(**SIZES)))
    with pytest.raises(ValueError, match="has mixtures already"):
        upcycle_decoder(grown)
