"""What unlabelled photographs add to a head, on the official split of Grocery Store.

Of the train list a few labels of each fine class are kept, and the rest of the list is unlabelled;
the val list, or cross-validation of the few labels, is the guard, and the test list gives the
accuracy. Then cases made to hurt: the unlabelled photographs are of classes that have no label, or
of something else altogether, and the threshold is 0. A classifier is a logistic regression (C = 30)
on features of length 1.

    python benchmarks/self_training.py path/to/store path/to/grocery --other path/to/other/store

The gain's interval is the paired 95 % bootstrap interval over test photographs, of the mean over
seeds, which is of the draw of the labels; the range over seeds stands beside it.
"""

import argparse
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import normalize

import embedder
from embedder.evaluation import paired_difference
from embedder.training.options import SelfTrainOptions
from embedder.training.self_training import self_train

# With one label a class scikit-learn asks whether this is a regression.
warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)

HEADER = (
    "| labels a class | unlabelled | method | guard | without | with | gain (95 %) | over seeds "
    "| last round | kept rounds | right pseudo-labels | s |\n" + "|---" * 12 + "|"
)


class Logistic:
    """Logistic regression on features of length 1."""

    def __init__(self, features: Any, labels: Any, weights: Any) -> None:
        self.model = LogisticRegression(C=30, max_iter=300, tol=1e-3)
        self.model.fit(features, labels, sample_weight=weights)
        self.classes_ = self.model.classes_

    def probabilities(self, features: Any) -> NDArray[np.floating]:
        return np.asarray(self.model.predict_proba(features))


@dataclass
class Part:
    """Features and fine classes of one list; or several photographs without classes."""

    features: NDArray[np.float32]
    labels: NDArray[np.str_] = field(default_factory=lambda: np.zeros(0, str))

    def take(self, rows: Any) -> "Part":
        return Part(self.features[rows], self.labels[rows])


def read_part(store: embedder.Store, file: Path) -> Part:
    rows = [line.split(",") for line in file.read_text().splitlines() if line.strip()]
    indices = {image_id: index for index, image_id in enumerate(store.ids())}
    features = store.vectors()[[indices[row[0].strip()] for row in rows]]
    return Part(normalize(features), np.array([row[1].strip() for row in rows]))


def draw(labels: NDArray[np.str_], num_labels: int, seed: int) -> NDArray[np.bool_]:
    """Which rows keep their label: so many of each class."""
    order = np.random.default_rng(seed).permutation(len(labels))
    kept = [order[labels[order] == name][:num_labels] for name in np.unique(labels)]
    return np.isin(np.arange(len(labels)), np.concatenate(kept))


@dataclass
class Case:
    """One row of the table."""

    num_labels: int
    method: str
    guard: str
    pool: str = "same classes"
    threshold: float | None = None


def run(case: Case, parts: dict[str, Part], judged: str, seed: int) -> dict[str, Any]:
    """Whether each judged photograph is right, before, after, and without a guard."""
    train = parts["train"]
    is_labelled = draw(train.labels, case.num_labels, seed)
    pool = train.take(~is_labelled)
    few = train.take(is_labelled)
    if case.pool == "other store":
        pool = parts["other"]
    if case.pool == "other classes":
        names = np.unique(train.labels)[::2]
        few, pool = few.take(np.isin(few.labels, names)), pool.take(~np.isin(pool.labels, names))
    known = {
        name: p.take(np.isin(p.labels, few.labels)) for name, p in parts.items() if name != "other"
    }
    fits: list[Logistic] = []

    def fit(*arrays: Any) -> Logistic:
        fits.append(Logistic(*arrays))
        return fits[-1]

    guard = known["val"]
    guards = (guard.features, guard.labels) if case.guard == "val" else (None, None)
    options = SelfTrainOptions(method=case.method, threshold=case.threshold)  # type: ignore[arg-type]
    start = time.perf_counter()
    result = self_train(fit, few.features, few.labels, pool.features, *guards, options)
    seconds = time.perf_counter() - start
    base = Logistic(few.features, few.labels, None)
    pseudo, test = result.pseudo_labels, known[judged]
    right = {
        name: head.classes_[head.probabilities(test.features).argmax(axis=1)] == test.labels
        # Without folds the last fit is that of the last round.
        for name, head in (("before", base), ("after", result.classifier), ("last", fits[-1]))
    }
    share = np.nan
    if len(pool.labels) and len(pseudo.rows):
        share = float((pool.labels[pseudo.rows] == pseudo.labels).mean())
    return right | {
        "kept": result.kept_round,
        "share": share,
        "seconds": seconds,
        "text": str(result),
    }


def row_of(case: Case, runs: list[dict[str, Any]]) -> str:
    before, after, last = (
        np.mean([run[name] for run in runs], axis=0) for name in ("before", "after", "last")
    )
    gain = paired_difference(after, before)
    each = [100 * float(run["after"].mean() - run["before"].mean()) for run in runs]
    shares = [run["share"] for run in runs if not np.isnan(run["share"])]
    threshold = "" if case.threshold is None else f", threshold {case.threshold:g}"
    cells = [
        case.num_labels,
        case.pool,
        case.method + threshold,
        case.guard,
        f"{before.mean():.3f}",
        f"{after.mean():.3f}",
        f"{100 * gain['value']:+.1f} ({100 * gain['low']:+.1f} to {100 * gain['high']:+.1f})",
        f"{min(each):+.1f} to {max(each):+.1f}",
        f"{last.mean():.3f}" if case.guard == "val" else "",
        " ".join(str(run["kept"]) for run in runs),
        f"{np.mean(shares):.2f}" if shares else "",
        f"{np.median([run['seconds'] for run in runs]):.0f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("store", type=Path, help="features of the Grocery photographs")
    parser.add_argument("grocery", type=Path, help="folder with train.txt, val.txt and test.txt")
    parser.add_argument("--other", type=Path, help="features of other photographs, same network")
    parser.add_argument("--labels", type=int, nargs="+", default=[1, 5, 10], help="of each class")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12])
    parser.add_argument("--judged", choices=["val", "test"], default="test", help="val to tune")
    options = parser.parse_args()
    store = embedder.Store(options.store)
    parts = {
        name: read_part(store, options.grocery / f"{name}.txt") for name in ("train", "val", "test")
    }
    methods = "self-training", "label-spreading"
    cases = [
        Case(num_labels, method, guard)
        for num_labels in options.labels
        for method in methods
        for guard in (("val", "folds") if num_labels > 1 else ("val",))
    ]
    most = max(options.labels)
    harmful = [Case(most, method, "val", "other classes", 0) for method in methods]
    if options.other:
        parts["other"] = Part(normalize(embedder.Store(options.other).vectors()))
        harmful += [Case(most, method, "val", "other store", 0) for method in methods]
    whole = Logistic(parts["train"].features, parts["train"].labels, None)
    judged = parts[options.judged]
    print(
        f"all of train labelled: accuracy {whole.model.score(judged.features, judged.labels):.3f}"
    )
    print(HEADER)
    for case in cases + harmful:
        runs = [run(case, parts, options.judged, seed) for seed in options.seeds]
        print(row_of(case, runs), flush=True)
        if case in harmful:
            print(f"  seed {options.seeds[0]}: {runs[0]['text']}", flush=True)


if __name__ == "__main__":
    main()
