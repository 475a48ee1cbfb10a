"""What one gets without tuning: one setting of a method for several streams."""

from collections.abc import Sequence

import numpy as np
import stored_runs as runs
from study import BOUNDARY, BOUNDARY_FREE, FORMS


def with_free_trials(among: Sequence[str]) -> list[str]:
    """Methods that have the same candidate settings on some streams."""
    return [m for m in (*FORMS, *BOUNDARY_FREE, *BOUNDARY) if common(m, among)]


def common(method: str, among: Sequence[str] | None = None) -> list[dict[str, float]]:
    """The candidates that a method was given on some streams; empty if none were.

    By default on :func:`stored_runs.alike`.
    """
    among = runs.alike() if among is None else among
    if not among or any(method not in runs.methods(stream) for stream in among):
        return []
    found = [runs.methods(stream)[method]["candidates"] for stream in among]
    shortest = min(map(len, found))
    same = all(candidates[:shortest] == found[0][:shortest] for candidates in found)
    return found[0][:shortest] if same else []


def trial_scores(method: str, among: Sequence[str]) -> np.ndarray:
    """Of the candidates that these streams have in common, in %, a row per stream."""
    count = len(common(method, among))
    return 100 * np.array([runs.methods(s)[method]["scores"][:count] for s in among])


def _best(method: str, among: Sequence[str]) -> np.ndarray:
    """The best of all trials that a method had on each stream, in %, a row per stream.

    Some streams had more trials than these have in common.
    """
    return 100 * np.array([[max(runs.methods(s)[method]["scores"])] for s in among])


def untuned(
    method: str, among: Sequence[str] | None = None
) -> dict[str, tuple[dict[str, float], float, float]]:
    """For each stream, the setting chosen on the others, its score, and what it loses.

    The setting is the one whose scores on the other streams lie least below the best
    of this method there, in the mean. All scores are on validation data.
    """
    among = runs.alike() if among is None else list(among)
    candidates, scores = common(method, among), trial_scores(method, among)
    lost = _best(method, among) - scores
    found = {}
    for k, stream in enumerate(among):
        chosen = int(np.argmin(np.delete(lost, k, axis=0).mean(axis=0)))
        score = float(scores[k, chosen])
        found[stream] = candidates[chosen], score, float(lost[k, chosen])
    return found


def shared_setting(
    method: str, among: Sequence[str]
) -> tuple[dict[str, float], np.ndarray]:
    """The one setting that loses least over all of these streams, and its scores."""
    scores = trial_scores(method, among)
    chosen = int(np.argmin((_best(method, among) - scores).mean(axis=0)))
    return common(method, among)[chosen], scores[:, chosen]


def one_setting(among: Sequence[str]) -> str:
    """The table without tuning, by the mean of the accuracies."""
    rows = {m: untuned(m, among) for m in with_free_trials(among)}

    def total(method: str) -> float:
        return _means(rows[method])

    order = sorted(rows, key=total, reverse=True)
    header = [
        "Method",
        "mean, %",
        "mean lost",
        *(f"`{s}`" for s in among),
        "one setting for all, mean, %",
        "mean lost",
    ]
    body = []
    for method in order:
        lost = np.mean([lost for _, _, lost in rows[method].values()])
        cells = [
            f"{score:.1f} (-{lost:.1f})" for _, score, lost in rows[method].values()
        ]
        _, scores = shared_setting(method, among)
        least = np.mean(_best(method, among)[:, 0] - scores)
        name = f"**`{method}`**" if method in FORMS else f"`{method}`"
        body.append(
            [
                name,
                f"{total(method):.1f}",
                f"{lost:.1f}",
                *cells,
                f"{scores.mean():.1f}",
                f"{least:.1f}",
            ]
        )
    return runs.table(header, body)


def everywhere(method: str, among: Sequence[str]) -> str:
    """The setting of a method that loses least over all streams, in words."""
    chosen, scores = shared_setting(method, among)
    varied = {k: v for k, v in chosen.items() if k not in ("power", "threshold")}
    setting = ", ".join(
        f"{key.replace('_', ' ')} {value:g}" for key, value in varied.items()
    )
    return f"{setting}: {', '.join(f'{score:.1f}' for score in scores)} %"


def best_untuned_form() -> str:
    """The form of CLASSP that does best with settings chosen on other streams."""
    return max(FORMS, key=lambda form: _means(untuned(form)))


def form_and_setting_without() -> tuple[list[str], float]:
    """The forms that are best on the other streams, and the mean on those left out.

    For each stream both form and setting are chosen on the other ones alone.
    """
    among = runs.alike()
    chosen, scores = [], []
    for k in range(len(among)):
        found = {}
        for form in FORMS:
            own = trial_scores(form, among)
            others = np.delete(own, k, axis=0).mean(axis=0)
            setting = int(np.argmax(others))
            found[form] = others[setting], own[k, setting]
        best = max(found, key=lambda form: found[form][0])
        chosen.append(best)
        scores.append(found[best][1])
    return list(dict.fromkeys(chosen)), float(np.mean(scores))


def best_shared_form() -> str:
    """The form of CLASSP whose one setting for all streams does best."""
    return max(FORMS, key=lambda form: shared_setting(form, runs.alike())[1].mean())


def _means(found: dict[str, tuple[dict[str, float], float, float]]) -> float:
    return float(np.mean([score for _, score, _ in found.values()]))


def lost(method: str) -> str:
    """The points that a method loses without tuning, the mean over streams."""
    found = untuned(method)
    return f"{np.mean([points for _, _, points in found.values()]):.0f}"


def score_without(method: str) -> str:
    """The accuracy of a method without tuning, the mean over streams."""
    return f"{_means(untuned(method)):.1f}"
