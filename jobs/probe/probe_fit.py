"""Probes, how good they are, and how sure that is.

Shapes: N texts, F features, K chosen features, S seeds, D data sets.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np
from scipy import stats

RIDGE = 1.0
"""Half the weight of the squared coefficients beside the summed log loss, features standardised (scikit-learn's C = 1).
"""
STEPS, ENOUGH = 50, 1e-8
COVERAGE = 0.95


def auc_of(z_NF: np.ndarray, positive_N: np.ndarray, train_N: np.ndarray, k: int | None) -> float:
    """Area under the ROC curve, on the texts not trained on, of a logistic probe on k features (None: all): those whose
    mean differs most between the labels, in standard deviations, among the texts trained on.
    """
    fit_NF = z_NF[train_N]
    mean_F, deviation_F = fit_NF.mean(axis=0), fit_NF.std(axis=0)
    z_NF = (z_NF - mean_F) / np.where(deviation_F > 0, deviation_F, 1)
    if k is not None and k < z_NF.shape[1]:
        fit_NF, up_N = z_NF[train_N], positive_N[train_N]
        apart_F = np.abs(fit_NF[up_N].mean(axis=0) - fit_NF[~up_N].mean(axis=0))
        z_NF = z_NF[:, np.sort(np.argsort(-apart_F, kind="stable")[:k])]
    weights = logistic(z_NF[train_N], positive_N[train_N])
    return auc(z_NF[~train_N] @ weights, positive_N[~train_N])


def logistic(z_NK: np.ndarray, positive_N: np.ndarray) -> np.ndarray:
    """Coefficients [K] of the ridge logistic regression with an intercept that is not penalised, by Newton's method.

    Steps are halved while the loss does not fall, so that separable labels do no harm.
    """
    x_NK = np.concatenate([z_NK, np.ones((len(z_NK), 1))], axis=1)
    ridge_K = np.full(x_NK.shape[1], RIDGE)
    ridge_K[-1] = 0
    sign_N = np.where(positive_N, 1.0, -1.0)

    def loss(weights: np.ndarray) -> float:
        return float(np.logaddexp(0, -sign_N * (x_NK @ weights)).sum() + (ridge_K * weights**2).sum() / 2)

    weights = np.zeros(x_NK.shape[1])
    now = loss(weights)
    for _ in range(STEPS):
        p_N = 0.5 * (1 + np.tanh(x_NK @ weights / 2))
        gradient_K = x_NK.T @ (p_N - positive_N) + ridge_K * weights
        curvature_KK = (x_NK * (p_N * (1 - p_N))[:, None]).T @ x_NK + np.diag(ridge_K + 1e-9)
        step_K = np.linalg.solve(curvature_KK, gradient_K)
        size = 1.0
        while (then := loss(weights - size * step_K)) > now and size > ENOUGH:
            size /= 2
        if then > now:
            break
        weights, gain, now = weights - size * step_K, now - then, then
        if gain < ENOUGH * max(now, 1):
            break
    return weights[:-1]


def auc(score_N: np.ndarray, positive_N: np.ndarray) -> float:
    """Probability that a positive text scores above another; ties count half."""
    ranks_N = stats.rankdata(score_N)
    n_up, n_down = int(positive_N.sum()), int((~positive_N).sum())
    return float((ranks_N[positive_N].sum() - n_up * (n_up + 1) / 2) / (n_up * n_down))


@dataclass(frozen=True)
class Mean:
    """A mean over seeds and data sets."""

    mean: float
    interval: tuple[float, float] | None
    """95 % interval for other seeds and other data sets; None with fewer than two of either"""
    seeds: int
    data_sets: int

    def verdict(self) -> str:
        """Of a difference: which side of 0 its interval is on."""
        if self.interval is None:
            return "not known: one seed or one data set"
        low, high = self.interval
        return "more" if low > 0 else "less" if high < 0 else "no difference shown"

    def to_dict(self) -> dict:
        return asdict(self)


def mean_over(values_SD: np.ndarray, least: float = -np.inf, most: float = np.inf) -> Mean:
    """Both seeds and data sets are drawn from more. The variance of the mean is that between seeds over S plus that
    between data sets over D (each taken between means, which hold a share of the rest: rather too wide than too
    narrow), and the t distribution has Satterthwaite's degrees of freedom. least, most: what a
    value can be.
    """
    n_seeds, n_sets = values_SD.shape
    mean = float(values_SD.mean())
    if min(n_seeds, n_sets) < 2:
        return Mean(mean, None, n_seeds, n_sets)
    seeds = values_SD.mean(axis=1).var(ddof=1) / n_seeds
    sets = values_SD.mean(axis=0).var(ddof=1) / n_sets
    variance = seeds + sets
    if variance == 0:
        return Mean(mean, (mean, mean), n_seeds, n_sets)
    freedom = variance**2 / (seeds**2 / (n_seeds - 1) + sets**2 / (n_sets - 1))
    half = float(stats.t.ppf((1 + COVERAGE) / 2, freedom) * np.sqrt(variance))
    return Mean(mean, (max(mean - half, least), min(mean + half, most)), n_seeds, n_sets)
