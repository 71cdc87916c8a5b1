"""Calibration: probabilities mean what they say."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import f1_score, log_loss as sklearns_log_loss

from embedder.heads.calibration import fit_temperature, fit_thresholds, log_loss, probabilities_of


@pytest.mark.parametrize("sharpness", [0.2, 1.0, 7.0])
def test_a_temperature_undoes_how_much_too_sure_logits_are(sharpness: float) -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(4000, 4)) * 2
    codes = np.array([random.choice(4, p=p) for p in softmax(logits, axis=1)])
    assert fit_temperature(logits * sharpness, codes) == pytest.approx(sharpness, rel=0.08)


def test_no_temperature_near_the_one_found_has_a_lower_loss() -> None:
    random = np.random.default_rng(1)
    logits, codes = random.normal(size=(200, 3)), random.integers(0, 3, 200)
    codes = np.where(random.random(200) < 0.6, logits.argmax(axis=1), codes)
    best = fit_temperature(logits, codes)
    for other in (best * 0.9, best * 1.1):
        assert log_loss(logits / other, codes) > log_loss(logits / best, codes)


def test_rows_that_are_all_right_do_not_make_it_certain() -> None:
    logits = np.eye(3)[np.arange(48) % 3] * 0.1
    temperature = fit_temperature(logits, np.arange(48) % 3)
    assert probabilities_of(logits, temperature, False).max() == pytest.approx(49 / 50, abs=1e-3)


def test_labels_that_are_all_right_do_not_make_it_certain_either() -> None:
    codes = np.eye(3, dtype=np.uint8)[np.arange(48) % 3]
    logits = np.where(codes, 0.1, -0.1)
    probabilities = probabilities_of(logits, fit_temperature(logits, codes), True)
    np.testing.assert_allclose(probabilities, np.where(codes, 49 / 50, 1 / 50), atol=1e-3)


def test_the_loss_is_scikit_learns() -> None:
    random = np.random.default_rng(2)
    logits, codes = random.normal(size=(50, 3)), random.integers(0, 3, 50)
    probabilities = probabilities_of(logits, 1.0, is_multilabel=False)
    assert log_loss(logits, codes) == pytest.approx(sklearns_log_loss(codes, probabilities))
    indicators = (random.random((50, 3)) > 0.5).astype(np.uint8)
    each = probabilities_of(logits, 1.0, is_multilabel=True)
    losses = [sklearns_log_loss(indicators[:, n], each[:, n]) for n in range(3)]
    assert log_loss(logits, indicators) == pytest.approx(np.mean(losses))


def test_a_threshold_is_the_one_of_highest_f1() -> None:
    random = np.random.default_rng(3)
    codes = (random.random((300, 2)) < [0.1, 0.6]).astype(np.uint8)
    probabilities = np.clip(0.3 * codes + 0.7 * random.random((300, 2)), 0, 1)
    thresholds = fit_thresholds(probabilities, codes)
    for label in range(2):
        found = f1_score(codes[:, label], probabilities[:, label] > thresholds[label])
        every = [f1_score(codes[:, label], probabilities[:, label] > t) for t in np.arange(99) / 99]
        assert found >= max(every)
    assert thresholds[0] > thresholds[1]  # a rare label wants more proof


def test_a_label_that_no_row_has_is_given_above_a_half() -> None:
    thresholds = fit_thresholds(np.array([[0.9, 0.2], [0.8, 0.3]]), np.array([[0, 1], [0, 0]]))
    assert thresholds[0] == 0.5
    assert thresholds[1] < 0.2  # the row of 0.2 has it; that of 0.3 is the price
