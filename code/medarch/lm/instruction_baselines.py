"""What a tuned language model should beat: answers without a language model, from the words of the definitions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from medarch.data.instructions import Instruction


def most_frequent(train: Sequence[Instruction], questions: Sequence[Instruction]) -> list[str]:
    """The answer that is right most often in training, whatever is asked.

    Raises:
        ValueError: If there is nothing to learn from.
    """
    _refuse_nothing(train)
    answer, _ = Counter(each.answer for each in train).most_common(1)[0]
    return [answer] * len(questions)


def logistic_regression(train: Sequence[Instruction], questions: Sequence[Instruction]) -> list[str]:
    """Answers as classes, from the weighted counts of the definition's words (TF-IDF).

    Raises:
        ValueError: If there is nothing to learn from.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    _refuse_nothing(train)
    model = make_pipeline(TfidfVectorizer(sublinear_tf=True), LogisticRegression(C=30, max_iter=200, tol=1e-3))
    model.fit([each.definition for each in train], [each.answer for each in train])
    return [str(answer) for answer in model.predict([each.definition for each in questions])]


def nearest_definition(train: Sequence[Instruction], questions: Sequence[Instruction]) -> list[str]:
    """The answer of the training definition whose TF-IDF vector has the least angle to the one that is asked about.

    Raises:
        ValueError: If there is nothing to learn from.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    _refuse_nothing(train)
    vectoriser = TfidfVectorizer(sublinear_tf=True)
    known = vectoriser.fit_transform([each.definition for each in train])
    asked = vectoriser.transform([each.definition for each in questions])
    # Rows have the length one, so that the product is the cosine.
    nearest = (asked @ known.T).argmax(axis=1)
    return [train[int(index)].answer for index in nearest.ravel().tolist()[0]]


def _refuse_nothing(train: Sequence[Instruction]) -> None:
    if not train:
        raise ValueError("no instructions to learn from")
