"""The classifier, how its routing is analysed, and the study that compares its kinds."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, f1_score, normalized_mutual_info_score

from medarch.data.hpo import Definition, Split
from medarch.data.vocabulary import UNKNOWN, Vocabulary
from medarch.moe import MoEConfig, study
from medarch.moe.classifier import (
    Examples,
    Task,
    TextClassifier,
    accuracy_and_f1,
    balancing_loss,
    default_config,
    evaluate,
    load_task,
    train_classifier,
)
from medarch.moe.router import Routing
from medarch.moe.specialisation import (
    Routed,
    expert_by_system,
    experts_by_definition,
    normalised_mutual_information,
    predictability,
    routed_words,
    specialisation_test,
)

SMALL = MoEConfig(hidden_size=13, intermediate_size=7, num_experts=5, num_experts_per_tok=2)
ORGANS = {"kidney": "cyst renal glomerular", "eye": "cornea retina lens", "skin": "rash nail hair"}


def invented(count, seed):
    """Definitions of words that tell the organ, among words that do not; for tests alone."""
    rng = np.random.default_rng(seed)
    made = []
    for number in range(count):
        organ = list(ORGANS)[number % 3]
        telling = rng.choice(ORGANS[organ].split(), 2)
        text = " ".join(rng.permutation([*telling, *rng.choice(["an", "of", "with", "the", "severe"], 5)]))
        made.append(Definition(f"X:{seed}-{number}", text, text, (organ,)))
    return made


@pytest.fixture(scope="module")
def task():
    parts = Split(invented(150, 1), invented(30, 2), invented(60, 3))
    vocabulary = Vocabulary.build(item.text for item in parts.train)
    empty = Examples(*(torch.empty(0),) * 3)
    bare = Task(list(ORGANS), vocabulary, parts, empty, empty, empty)
    return replace(bare, train=bare.encode(parts.train), validation=bare.encode(parts.validation),
                   test=bare.encode(parts.test))  # fmt: skip


def model_of(task, kind, seed=0):
    return TextClassifier(len(task.vocabulary), 3, SMALL, kind, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["none", "dense_active", "dense_total", "moe"])
def test_each_kind_learns_what_words_tell(task, kind):
    training = train_classifier(task, kind, epochs=6, config=SMALL, batch_size=16, learning_rate=0.03)
    assert training.losses[-1] < 0.5 < training.losses[0]
    assert training.seconds > 0
    assert evaluate(training.model, task.test).accuracy > 0.9


def test_dropped_words_are_not_seen(task):
    blind = train_classifier(task, epochs=2, config=SMALL, word_dropout=1.0)
    assert blind.losses == pytest.approx([math.log(3)] * 2)  # without words all three scores are zero
    kept, dropped = (train_classifier(task, epochs=1, config=SMALL, word_dropout=rate) for rate in (0.0, 0.5))
    assert kept.losses != dropped.losses


def test_training_depends_on_the_seed_alone(task):
    def weights(seed):
        torch.manual_seed(torch.seed() % 2**31)  # whatever the global generator holds must not matter
        training = train_classifier(task, seed=seed, epochs=1, config=SMALL)
        return torch.cat([weight.detach().flatten() for weight in training.model.parameters()])

    first = weights(3)
    assert torch.equal(weights(3), first)
    assert not torch.equal(weights(4), first)


def test_kinds_share_all_initial_weights_outside_the_feed_forward_layer(task):
    models = [model_of(task, kind) for kind in ("none", "dense_active", "dense_total", "moe")]
    for name in ("embedding", "context", "classify"):
        assert all(torch.equal(getattr(models[0], name), getattr(model, name)) for model in models)
    assert not torch.equal(models[0].embedding, model_of(task, "none", seed=1).embedding)


def test_dense_kinds_have_the_mixtures_active_and_total_size(task):
    """The router comes on top in the mixture: E x hidden weights."""
    sizes = {kind: study._parameters(model_of(task, kind)) for kind in study.KINDS}
    router = 5 * 13
    assert sizes["dense_total"]["feed_forward_total"] == 3 * 13 * 7 * 5
    assert sizes["moe"]["feed_forward_total"] == sizes["dense_total"]["feed_forward_total"] + router
    assert sizes["moe"]["feed_forward_active"] == sizes["dense_active"]["feed_forward_active"] + router
    assert sizes["none"]["feed_forward_total"] == 0
    around = 13 + 13 * 13 + 13 + 3 * 13  # a word's row, context, norm, classes
    assert sizes["none"]["active"] == around
    assert sizes["none"]["total"] == around + (len(task.vocabulary) - 1) * 13


@pytest.mark.parametrize("kind", ["none", "moe", "dense_total"])
def test_padding_and_neighbours_do_not_matter(task, kind):
    model = model_of(task, kind)
    tokens, mask = task.test.tokens[:4].clone(), task.test.mask[:4].clone()
    mask[2] = False  # a text without words
    scores, _ = model(tokens, mask)
    assert torch.isfinite(scores).all()
    assert not torch.allclose(scores[0], scores[1])
    padded = torch.nn.functional.pad(tokens, (3, 2), value=UNKNOWN)
    again, _ = model(padded, torch.nn.functional.pad(mask, (3, 2)))
    torch.testing.assert_close(again, scores)
    alone, _ = model(tokens[1:2], mask[1:2])
    torch.testing.assert_close(alone, scores[1:2])


def test_routing_depends_on_the_definition_and_lists_the_words_in_order(task):
    model = model_of(task, "moe")
    tokens = torch.tensor([[2, 3, 0], [2, 4, 5]])
    mask = tokens != 0
    _, routing = model(tokens, mask)
    assert routing.indices.shape == (5, 2)
    _, alone = model(tokens[1:], mask[1:])
    torch.testing.assert_close(routing.logits[2:], alone.logits)
    assert not torch.allclose(routing.logits[0], routing.logits[2])  # one word in two definitions
    routed = routed_words(routing, tokens, mask, torch.tensor([1, 2]))
    assert routed.word.tolist() == [2, 3, 2, 4, 5]
    assert routed.system.tolist() == [1, 1, 2, 2, 2]
    assert torch.equal(routed.expert, routing.indices[:, 0])


def routing_of(indices, probs):
    indices, probs = torch.tensor(indices), torch.tensor(probs, requires_grad=True)
    return Routing(probs, probs, indices, probs)


def test_balancing_loss_by_hand():
    even = routing_of([[0], [1]], [[0.5, 0.5], [0.5, 0.5]])
    assert float(balancing_loss(even).detach()) == pytest.approx(1)
    skewed = routing_of([[0], [0], [0], [1]], [[0.9, 0.1]] * 3 + [[0.4, 0.6]])
    loss = balancing_loss(skewed)
    assert float(loss.detach()) == pytest.approx(2 * (0.75 * 3.1 / 4 + 0.25 * 0.9 / 4))
    loss.backward()
    assert torch.allclose(skewed.probs.grad, torch.tensor([2 * 0.75 / 4, 2 * 0.25 / 4]).expand(4, 2))


def test_accuracy_and_f1_agree_with_scikit_learn():
    generator = torch.Generator().manual_seed(0)
    for high in (2, 5, 11):
        named, labels = torch.randint(0, high, (2, 37), generator=generator)
        accuracy, f1 = accuracy_and_f1(named, labels)
        assert accuracy == accuracy_score(labels, named)
        assert f1 == pytest.approx(f1_score(labels, named, average="macro"), abs=1e-12)
    absent = torch.tensor([3, 0, 1]), torch.tensor([0, 0, 1])  # class 3 is named but does not occur
    assert accuracy_and_f1(*absent)[1] == pytest.approx(f1_score(*absent[::-1], average="macro"), abs=1e-12)


def test_mutual_information_agrees_with_scikit_learn_and_its_limits():
    table = torch.tensor([[3, 0, 5], [1, 7, 2]])
    pairs = [(row, column) for row in range(2) for column in range(3) for _ in range(int(table[row, column]))]
    expected = normalized_mutual_info_score(*zip(*pairs, strict=True))
    assert normalised_mutual_information(table) == pytest.approx(expected, abs=1e-12)
    assert normalised_mutual_information(torch.outer(torch.arange(1, 5), torch.arange(2, 5))) < 1e-12
    assert normalised_mutual_information(torch.eye(4)) == pytest.approx(1)
    assert normalised_mutual_information(torch.tensor([[3, 0]])) == 0
    with pytest.raises(ValueError, match="without any count"):
        normalised_mutual_information(torch.zeros(2, 3))


def test_tables_by_hand():
    mask = torch.tensor([[True, True], [False, False], [True, False]])
    routing = routing_of([[0, 2], [2, 1], [2, 0]], [[0.2, 0.3, 0.5]] * 3)
    counts = experts_by_definition(routing, mask)
    assert counts.tolist() == [[1, 1, 2], [0, 0, 0], [1, 0, 1]]
    table = expert_by_system(counts, torch.tensor([1, 0, 1]), 3)
    assert table.tolist() == [[0, 2, 0], [0, 1, 0], [0, 3, 0]]
    with pytest.raises(ValueError, match="mask's 4 words"):
        experts_by_definition(routing, torch.ones(2, 2, dtype=torch.bool))


def clustered(generator, definitions=40, words=30):
    """Definitions that each send all their words to one expert, chosen without regard to any system."""
    expert = torch.randint(0, 4, (definitions,), generator=generator)
    return torch.nn.functional.one_hot(expert, 4) * words


def test_the_null_holds_where_words_of_a_definition_go_together():
    """Shuffling words rather than definitions would find specialisation in all of these."""
    generator = torch.Generator().manual_seed(0)
    p_values = []
    for seed in range(60):
        counts, labels = clustered(generator), torch.randint(0, 3, (40,), generator=generator)
        p_values.append(specialisation_test(counts, labels, permutations=60, seed=seed).p_value)
    assert sum(p <= 0.1 for p in p_values) <= 15
    assert sum(p > 0.5 for p in p_values) >= 15


def test_planted_specialisation_is_found():
    labels = torch.arange(40) % 4
    counts = torch.nn.functional.one_hot(labels, 4) * 5 + 1
    test = specialisation_test(counts, labels, permutations=99)
    assert test.observed > test.null_max >= test.null_quantile(0.95) >= test.null_mean
    assert test.p_value == pytest.approx(0.01)
    assert len(test.null) == 99
    assert torch.equal(specialisation_test(counts, labels, permutations=99).null, test.null)


def test_predictability_by_hand():
    word, expert = torch.tensor([5, 5, 5, 6, 6, 7]), torch.tensor([0, 0, 1, 1, 1, 1])
    train = Routed(word, expert, torch.tensor([0, 0, 0, 0, 1, 1]))
    asked = Routed(torch.tensor([5, 6, 9, 5]), torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 1, 2]))
    guessed = predictability(train, asked)
    assert guessed.nothing == 0.75  # expert 1
    assert guessed.word == 0.75  # 0, 1, overall 1, 0
    assert guessed.system == 1.0  # a tie for system 0 goes to expert 0; 1, 1; unseen system: overall
    assert guessed.words == 4
    with pytest.raises(ValueError, match="no held-out"):
        predictability(train, Routed(*(part[:0] for part in asked)))


def test_the_real_task():
    task = load_task()
    assert len(task.systems) == 19
    assert task.systems[0] == "Abnormality of the nervous system"
    assert [len(part.labels) for part in (task.train, task.validation, task.test)] == [8407, 1048, 1048]
    assert Vocabulary.build(item.text for item in task.definitions.train) == task.vocabulary
    number = 17
    definition = task.definitions.test[number]
    assert task.systems[task.test.labels[number]] == definition.systems[0]
    again, mask = task.vocabulary.encode([definition.text])
    assert torch.equal(task.test.tokens[number], again[0])
    assert torch.equal(task.test.mask[number], mask[0])
    cut = task.map(lambda part: part[:7])
    assert [len(part.labels) for part in (cut.train, cut.validation, cut.test)] == [7, 7, 7]


def test_the_study_runs_resumes_and_says_what_it_compared(task, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MEDARCH_ROOT", str(tmp_path))
    monkeypatch.setattr(study, "load_task", lambda: task)
    monkeypatch.setattr(study, "SELECTION_SEED", 77)
    trained = []
    real = train_classifier

    def counted(task, kind, *, seed, epochs):
        trained.append((kind, seed, epochs))
        if len(trained) == 13:
            raise KeyboardInterrupt
        return real(task, kind, seed=seed, epochs=epochs)

    monkeypatch.setattr(study, "train_classifier", counted)
    with pytest.raises(KeyboardInterrupt):
        study.classifier_study(quick=True)
    finished = trained[:-1]
    results = study.classifier_study(quick=True)
    assert len(trained) == len(finished) + 5  # the one that was cut off and the four after it
    assert not set(finished) & set(trained[13:])
    kinds = ("none", "dense_active", "dense_total", "moe")
    chosen = results["selection"]["epochs"]
    assert set(trained) == {(kind, 77, epochs) for kind in kinds for epochs in (1, 2)} | {
        (kind, seed, chosen) for kind in kinds for seed in (0, 1)
    }
    assert results["repeats"] == 2
    for kind in kinds:
        values = results["models"][kind]["accuracy"]["values"]
        again = [evaluate(real(task, kind, seed=seed, epochs=chosen).model, task.test).accuracy for seed in (0, 1)]
        assert values == again
    assert results["baselines"]["tfidf_logistic_regression"]["accuracy"] > 0.9
    assert results["baselines"]["majority"]["accuracy"] == pytest.approx(1 / 3)
    assert set(results["differences"]) == {f"moe_minus_{kind}" for kind in kinds[:3]}
    for state in ("trained", "untrained"):
        assert 0 <= results["specialisation"][state]["nmi"]["mean"] <= 1


def test_fewest_epochs_within_one_standard_error():
    curve = {"none": {"2": 0.80, "4": 0.88, "8": 0.90}, "moe": {"2": 0.80, "4": 0.90, "8": 0.90}}
    assert study.fewest_epochs(curve, examples=400) == 4  # mean 0.89, best 0.90, standard error 0.015
    assert study.fewest_epochs(curve, examples=4000) == 8  # standard error 0.0047
    assert study.fewest_epochs(curve, examples=4) == 2


def test_paired_difference_by_hand():
    result = study.paired_difference([0.9, 0.8, 0.7], [0.8, 0.8, 0.6])
    assert result["mean"] == pytest.approx(0.2 / 3)
    assert result["sd"] == pytest.approx(math.sqrt(1 / 300))
    half = 4.302653 * math.sqrt(1 / 300) / math.sqrt(3)  # Student's t, two degrees of freedom
    assert (result["low"], result["high"]) == pytest.approx((0.2 / 3 - half, 0.2 / 3 + half), rel=1e-6)
    assert study.summary([1.0, 3.0]) == {
        "mean": 2.0,
        "sd": math.sqrt(2),
        "min": 1.0,
        "max": 3.0,
        "values": [1, 3],
    }


def test_the_default_sizes_are_the_documented_ones():
    config = default_config()
    assert (config.hidden_size, config.num_experts, config.num_experts_per_tok) == (128, 8, 2)


@pytest.mark.usefixtures("annotations_off")
def test_bad_input_is_refused_by_name(task):
    labels = torch.arange(9)
    with pytest.raises(ValueError, match="'sparse' is none of"):
        model_of(task, "sparse")
    with pytest.raises(ValueError, match="0 predictions"):
        accuracy_and_f1(labels[:0], labels[:0])
    with pytest.raises(ValueError, match="8 predictions and 9"):
        accuracy_and_f1(labels[1:], labels)
    with pytest.raises(ValueError, match="8 labels"):
        specialisation_test(torch.eye(9, dtype=torch.long), labels[1:])
    with pytest.raises(ValueError, match="permutations=0"):
        specialisation_test(torch.eye(9, dtype=torch.long), labels, permutations=0)
