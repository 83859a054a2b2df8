"""Linear probes: the information about a label in a feature vector, in bits.

Note [Probes]
1. For any probabilities q(label | x), the mean of log2 q(label | x) - log2 p(label) over new examples is at most the
   mutual information of label and x. Here q is a multinomial logistic regression, fitted on one half of the examples,
   and the mean is taken over the other half.
2. The penalty is chosen within the fitting half, so that the probe has seen none of the test examples.
3. The bound can be loose: it misses information that is not linearly decodable, or not from so few examples. It is
   negative if the probe does not generalise.
"""

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from relaylab.errors import InputError
from relaylab.evaluate.error_rates import Interval, interval

PENALTIES = (0.003, 0.03, 0.3, 3.0)  # scikit-learn's C: the larger, the weaker
Features = NDArray[np.float32]  # (n, features)
Labels = NDArray[np.int64]  # (n,)


def entropy_bits(labels: Labels) -> float:
    """Return the entropy of the labels, the upper bound on the information."""
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(shares * np.log2(shares)).sum())


def readable_bits(fit_on: tuple[Features, Labels], test_on: tuple[Features, Labels]) -> Interval:
    """Return the information in bits that a linear probe extracts, with an interval over test examples.

    See Note [Probes].

    Args:
        fit_on: features (n, features) and labels (n,) to fit the probe on.
        test_on: features and labels to test it on.

    Raises:
        InputError: a test label is missing from the labels to fit on, or features are not finite.
    """
    (x, y), (new, truth) = _standardised(fit_on, test_on)
    unseen = np.setdiff1d(truth, y)
    if len(unseen):
        raise InputError(f"class {unseen[0]} has too few images: use more with --images")
    inner = np.arange(len(y)) % 4 == 0
    scores = [_log_shares(x[~inner], y[~inner], c, x[inner], y[inner]).mean() for c in PENALTIES]
    best = PENALTIES[int(np.argmax(scores))]
    _, index, counts = np.unique(truth, return_inverse=True, return_counts=True)
    return interval(_log_shares(x, y, best, new, truth) - np.log2(counts / len(truth))[index])


def _standardised(*parts: tuple[Features, Labels]) -> Sequence[tuple[Features, Labels]]:
    """Standardise features by the mean and deviation of the first part."""
    x = parts[0][0]
    if not all(np.isfinite(features).all() for features, _ in parts):
        raise InputError("activations or gradients are not finite: training has diverged")
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale == 0] = 1
    return [((features - mean) / scale, labels) for features, labels in parts]


def _log_shares(x: Features, y: Labels, penalty: float, new: Features, truth: Labels) -> NDArray[np.float64]:
    """Return log2 of the probability of each true label, from a probe fitted on x and y."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the bound holds for any probe
        probe = LogisticRegression(C=penalty, max_iter=100, tol=1e-3).fit(x, y)
    with np.errstate(divide="ignore"):  # zero probabilities are clipped below
        logs = np.asarray(probe.predict_log_proba(new)) / np.log(2)
    column = {label: index for index, label in enumerate(probe.classes_.tolist())}
    floor = np.log2(1 / (10 * len(y)))
    values = [logs[row, column[label]] if label in column else floor for row, label in enumerate(truth.tolist())]
    return np.maximum(np.array(values, dtype=np.float64), floor)
