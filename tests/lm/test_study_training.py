"""The study of advice on training: each variant is what it says, and its arithmetic is right."""

import pytest
import torch
from torch import nn

from medarch.bench.records import load, record_path
from medarch.data.corpus import Corpus, Document, load_corpus
from medarch.lm import study_training as study
from medarch.lm.batches import pack
from medarch.lm.tokenizer import Tokenizer
from medarch.moe.precision import BFloat16Router

TEXTS = ["Seizure: an abnormality of the nervous system", "Renal cyst: a fluid filled sac", "Cough: air expelled"]
DOCUMENTS = tuple(Document(f"HP:{number}", text[:5], text, None) for number, text in enumerate(TEXTS))


@pytest.fixture(scope="module")
def setting():
    tokenizer = Tokenizer.train(TEXTS, 300)
    tokens = pack(tokenizer, DOCUMENTS)
    return study.Setting(Corpus(DOCUMENTS, DOCUMENTS, (), ()), tokenizer, tokens, DOCUMENTS, 4, 8, 3, "cpu")


def weights(variant, part):
    return dict(study.build(study.VARIANTS[variant], 0).named_parameters())[part].detach()


def test_variants_change_what_they_say_and_nothing_else():
    router, experts = "layers.1.feed_forward.router.weight", "layers.0.feed_forward.experts.down_proj"
    plain, small = weights("plain", router), weights("router_small", router)
    torch.testing.assert_close(small, plain / 10)
    assert torch.equal(weights("router_small", experts), weights("plain", experts))
    torch.testing.assert_close(weights("weights_small", experts).var(), weights("plain", experts).var() / 10)
    assert torch.equal(weights("weights_small", "embed_tokens.weight"), weights("plain", "embed_tokens.weight"))
    for name in ("router_bfloat16", "router_before_norm", "router_slow"):
        other = dict(study.build(study.VARIANTS[name], 0).named_parameters())
        found = [weight for key, weight in other.items() if "layers.1" in key and "router" in key]
        assert len(found) == 1
        torch.testing.assert_close(found[0] * (0.1 if name == "router_slow" else 1), plain)
    rounded = study.build(study.VARIANTS["router_bfloat16"], 0)
    assert all(isinstance(layer.feed_forward.router, BFloat16Router) for layer in rounded.layers)
    # 1 over the width, the scale 1 of Fedus et al.
    assert float(plain.var()) * study.HIDDEN == pytest.approx(1, abs=0.2)


def test_the_mixture_costs_what_the_dense_model_costs():
    dense, plain = (study.build(study.VARIANTS[name], 0) for name in ("dense", "plain"))
    assert dense.layers[0].feed_forward.config.intermediate_size == study.USED * study.EXPERT
    assert plain.config.moe.intermediate_size == study.EXPERT
    assert plain.config.moe.num_experts_per_tok == study.USED


def test_a_router_before_the_norm_sees_the_stream_and_its_experts_do_not():
    plain, other = (study.build(study.VARIANTS[name], 0) for name in ("plain", "router_before_norm"))
    stream = 7 * torch.randn(2, 3, study.HIDDEN, generator=torch.Generator().manual_seed(0))
    _, before = other.layers[0].feed_forward(stream)
    torch.testing.assert_close(before.logits, plain.layers[0].feed_forward.router(stream).logits)
    normed = plain.layers[0].feed_forward_norm(stream)
    answer, _ = other.layers[0].feed_forward(stream)
    expected = plain.layers[0].feed_forward.experts(normed, before.indices, before.weights)
    torch.testing.assert_close(answer, expected)
    assert isinstance(other.layers[0].feed_forward_norm, nn.Identity)


@pytest.mark.parametrize("name", ["plain", "dense", "one_expert_first", "dense_to_sparse", "router_slow"])
def test_a_run_gives_its_numbers(setting, name):
    run = study._run(setting, study.VARIANTS[name], 0)
    assert 1 < run["bits_per_byte"] < 12
    assert len(run["curve"]) == (4 if name in ("plain", "dense") else 1)
    assert run["bits_per_byte"] == run["curve"][-1]
    assert ("largest_logit" in run) == (name != "dense")


def test_a_run_that_diverges_is_counted_and_not_compared(setting):
    run = study._run(setting, study.Variant(learning_rate=1e30, clip=1e9), 0)
    assert run["bits_per_byte"] is None
    assert run["diverged"]
    fine = {"bits_per_byte": 2.0}
    described = study._variants({"plain": [fine, {"bits_per_byte": 3.0}, fine], "other": [run, fine, fine]})["other"]
    assert described["diverged"] == 1
    assert described["minus_plain"]["values"] == [-1.0, 0.0]


def test_growing_begins_where_the_dense_model_was(setting):
    found = study._grow(setting, 0)
    assert found["upcycled_at_once"] == pytest.approx(found["dense_half_way"], abs=1e-4)
    assert found["upcycled"] != found["dense_continued"]


def test_fine_tuning_documents_share_no_category():
    corpus = load_corpus()
    seen, unseen = study.icd_documents(corpus)
    categories = [{document.id.split()[1][:3] for document in part} for part in (seen, unseen)]
    assert not categories[0] & categories[1]
    assert len(seen) > 4_500
    assert len(unseen) > 200
    held_out = {document.id for document in corpus.out_of_domain}
    assert {document.id for document in unseen} <= held_out
    assert not {document.id for document in seen} & held_out


def test_a_target_is_reached_between_two_points():
    assert study.first_reach([5.0, 4.0, 3.0, 2.0], 3.5, 40) == pytest.approx(4 * 2.5)
    assert study.first_reach([5.0, 4.0], 5.5, 40) == 4
    # The last point stands at the end of the run, whatever the distance of the others.
    assert study.first_reach([5.0, 1.0], 1.0, 47) == 47
    with pytest.raises(ValueError, match="never reaches 1"):
        study.first_reach([5.0, 4.0], 1, 40)


def test_differences_by_hand():
    found = study.paired([2.0, 3.0, 5.0], [1.0, 1.0, 2.0])
    # Differences 1, 2, 3: mean 2, deviation 1, and 4.303 over the root of three to both sides.
    assert (found["mean"], found["sd"]) == (2, 1)
    assert found["high"] - 2 == pytest.approx(4.3027 / 3**0.5, rel=1e-4)
    assert not found["told"]
    assert study.paired([2.0, 3.1, 5.0], [1.0, 2.0, 4.0])["told"]
    assert study.spread([1.0, 3.0]) == {"mean": 2, "sd": pytest.approx(2**0.5), "min": 1, "max": 3, "values": [1, 3]}


@pytest.fixture(scope="module")
def record():
    return load(record_path(study.NAME))


def test_the_record_says_of_the_variants_what_the_page_says(record):
    usual, stressed = (record.results["variants"][group] for group in ("usual", "stressed"))
    assert set(usual) == set(study.VARIANTS)
    assert set(stressed) == set(study.STRESSED)
    assert record.repeats == len(study.SEEDS) == len(usual["plain"]["bits_per_byte"]["values"]) == 4
    assert not any(found["diverged"] for group in (usual, stressed) for found in group.values())
    told = {
        (name, label): found["minus_plain"]["mean"]
        for label, group in (("usual", usual), ("stressed", stressed))
        for name, found in group.items()
        if found["minus_plain"]["told"]
    }
    better = {key for key, mean in told.items() if mean < 0}
    assert better == {
        ("weights_small", "usual"),
        ("dense_to_sparse", "usual"),
        ("no_warmup", "usual"),
        ("z_loss", "stressed"),
    }
    assert set(told) - better == {("no_clipping", "usual"), ("weights_small", "stressed")}
    assert 4 * min(told[key] for key in better - {("weights_small", "usual")}) > told["weights_small", "usual"]
    logit = {name: found["largest_logit"]["mean"] for name, found in usual.items() if name != "dense"}
    assert logit["router_before_norm"] > 3 * logit["plain"]
    assert stressed["plain"]["largest_logit"]["mean"] > 1.5 * logit["plain"]
    assert stressed["z_loss"]["largest_logit"]["mean"] < stressed["plain"]["largest_logit"]["mean"]
    assert all(value < 0 for value in usual["dense_to_sparse"]["minus_plain"]["values"])


def test_the_record_says_of_growing_and_tuning_what_the_page_says(record):
    grown, tuned = record.results["upcycling"], record.results["fine_tuning"]
    at_once, half_way = (grown[name]["left"]["values"] for name in ("upcycled_at_once", "dense_half_way"))
    assert at_once == pytest.approx(half_way, abs=1e-4)
    assert set(tuned) == set(study.FINE_TUNED)
    new = {part: found["new"] for part, found in tuned.items()}
    assert new["all but experts"]["max"] < new["experts"]["min"] < new["routers"]["min"] < new["nothing"]["min"]
    gain = new["nothing"]["mean"] - new["all"]["mean"]
    assert 0 < new["all but experts"]["mean"] - new["all"]["mean"] < gain / 10
    assert new["nothing"]["mean"] - new["experts"]["mean"] < gain / 3
    old = {part: found["old"]["mean"] for part, found in tuned.items()}
    assert old["nothing"] < old["all but experts"] < old["all"]
    assert tuned["experts"]["weights"] * 2 == pytest.approx(tuned["all"]["weights"], rel=0.05)
    ends = [grown[name]["left"]["values"] for name in ("upcycled", "mixture_from_scratch")]
    assert all(ours < theirs for ours, theirs in zip(*ends, strict=True))
    assert -0.01 < grown["upcycled"]["mean"] < 0


def test_the_record_says_of_time_what_the_page_says(record):
    target = record.results["to_target"]
    step = target["time_of_a_step"]["median"]
    assert target["time"]["mean"] == pytest.approx(target["steps"]["mean"] * step)
    assert target["time"]["min"] > 1
    assert target["time"]["mean"] > 1.4
    assert target["time"]["max"] - target["time"]["min"] > 0.3
