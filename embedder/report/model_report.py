"""What the report of a trained head says."""

from pathlib import Path
from typing import Any

import numpy as np

from embedder.analysis import map_coordinates
from embedder.heads import REPORT_FILE
from embedder.report.page import MapPoint, Mistake, Report, write_report
from embedder.report.thumbnails import thumbnails_of
from embedder.sources import Listing
from embedder.training import TrainedHead

_NUM_MISTAKES = 24
_NUM_MAP_POINTS = 1500  # t-SNE of more takes longer than the head


def write_head_report(
    head: TrainedHead, metrics: dict[str, Any], folder: Path, source: str | Listing | None
) -> Path:
    """Write `report.html` of a head into its model's folder.

    Args:
        head: Trained.
        metrics: Its own.
        folder: Of the model.
        source: Where the images are, for thumbnails; as the store's last run had it, if None.
    """
    path = folder / REPORT_FILE
    thumbnails = thumbnails_of(source or head.model.recorded().provenance.source)
    write_report(path, report_of(head, metrics), thumbnails)
    return path


def report_of(head: TrainedHead, metrics: dict[str, Any]) -> Report:
    """Everything the report shows, but the pictures."""
    test = head.test
    scores = dict(test.scores)
    if head.coarse_of is not None:
        scores |= test.hierarchical(head.coarse_of)
    return Report(
        title=_title(head),
        metrics=scores,
        notes=notes_of(head, metrics),
        classes=head.images.classes.tolist(),
        per_class=test.per_class(),
        confusion=np.zeros((0, 0), int) if test.is_multilabel else test.confusion(),
        reliability=test.reliability(),
        learning_curve=metrics["learning_curve"],
        mistakes=_mistakes(head),
        map_points=_map(head),
        tables=_tables(head),
        provenance=_provenance(head),
    )


def _title(head: TrainedHead) -> str:
    backbone = head.model.recipe.backbone
    if head.tuning is None:
        return f"{head.model.head} on {backbone}"
    return f"{backbone}, fine-tuned: {head.tuning['strategy']}"


def notes_of(head: TrainedHead, metrics: dict[str, Any]) -> list[str]:
    """What a reader must know to believe the figures, a sentence each."""
    split, leak, test = head.images.split, metrics["near_duplicates"], head.test
    num_unlabelled = head.model.recorded().provenance.num_unlabelled
    notes = [_split_note(head)]
    if head.tuning is not None:
        tuning = head.tuning
        notes.append(
            f"Fine-tuned by {tuning['strategy']} from {tuning['model']}: accuracy "
            f"{tuning['accuracy_before']:.3f} to {test.scores['accuracy']['value']:.3f} on the "
            f"same images, {tuning['num_tuned']:,} weights trained. In words: {tuning['verdict']}."
        )
    if num_unlabelled:
        notes.append(f"{num_unlabelled:,} rows of the store have no label.")
    if head.options.duplicates is None:
        notes.append("Near-duplicates were not looked for.")
    else:
        notes.append(
            f"{leak['num_groups']:,} groups of near-duplicates (cosine of at least "
            f"{head.options.duplicates}) hold {leak['num_images']:,} of the "
            f"{len(head.images.ids):,} images, the largest {leak['largest']:,}."
        )
    if head.is_out_of_core:
        notes.append(
            "Features were read in parts: no settings were tried, and there is no learning curve."
        )
    if "naive" in leak:
        notes.append(
            f"No group stands on both sides of the split. On a split that takes no such care the "
            f"accuracy would read {leak['naive']['value']:.3f} in place of "
            f"{test.scores['accuracy']['value']:.3f}."
        )
    if split.is_official and "num_straddling" in leak:
        text = f"{leak['num_straddling']:,} test images have a near-duplicate in training"
        if "without_them" in leak:
            text += f"; without them the accuracy is {leak['without_them']['value']:.3f}"
        notes.append(f"{text}.")
    before, after = test.scores_before_calibration, test.scores
    notes.append(
        f"Calibration divides logits by {head.model.temperature:.3g}: log-loss "
        f"{before['log_loss']['value']:.3f} to {after['log_loss']['value']:.3f}, calibration error "
        f"{before['ece']['value']:.3f} to {after['ece']['value']:.3f}."
    )
    if "unlabelled" in metrics:
        found = metrics["unlabelled"]
        notes.append(
            f"Of {found['num_images']:,} unlabelled images {found['num_pseudo_labels']:,} got a "
            f"pseudo-label ({found['method']}): {found['verdict']}. Test accuracy "
            f"{found['accuracy_without']['value']:.3f} without, "
            f"{found['accuracy_with']['value']:.3f} with: {found['gain']['value']:+.3f} "
            f"({found['gain']['low']:+.3f} to {found['gain']['high']:+.3f})."
        )
    unseen = len(head.images.classes) - len(head.model.classes)
    if unseen:
        notes.append(f"{unseen} classes have no training image, and are never predicted.")
    return notes


def _split_note(head: TrainedHead) -> str:
    folds = head.images.split.folds
    if len(folds) > 1:
        return (
            f"Tested by {len(folds)}-fold cross-validation on all {len(head.images.ids):,} "
            f"labelled images; the model is trained on all of them."
        )
    train, test = folds[0]
    held = len(head.images.split.validation)
    chosen = (
        f"{held:,} of them to choose settings and to calibrate"
        if held
        else "settings chosen and calibrated by cross-validation among them"
    )
    kind = "the official split" if head.images.split.is_official else "a random split"
    return (
        f"Trained on {len(train):,} images ({chosen}), tested on {len(test):,}, by {kind} "
        f"({head.images.split.name})."
    )


def _mistakes(head: TrainedHead) -> list[Mistake]:
    test = head.test
    if test.is_multilabel:
        return []
    confidence = np.where(test.is_right, -1.0, test.calibrated.max(axis=1))
    worst = np.argsort(-confidence, kind="stable")[: min(_NUM_MISTAKES, (confidence > 0).sum())]
    ids = head.images.ids[head.images.split.tested_on]
    return [
        Mistake(
            image_id=ids[i],
            label=str(test.classes[test.codes[i]]),
            predicted=str(test.classes[test.predicted[i]]),
            probability=float(confidence[i]),
        )
        for i in worst
    ]


def _map(head: TrainedHead) -> list[MapPoint]:
    tested_on = head.images.split.tested_on
    num_points = min(_NUM_MAP_POINTS, len(tested_on))
    random = np.random.default_rng(head.options.seed)
    indices = np.sort(random.choice(len(tested_on), num_points, replace=False))
    rows = tested_on[indices]
    coordinates = map_coordinates(head.features_of(rows), head.options.seed)
    labels = head.images.texts()[rows]
    predicted = head.test.predicted_texts[indices]
    return [
        MapPoint(head.images.ids[row], str(label), str(guess), float(x), float(y))
        for row, label, guess, (x, y) in zip(rows, labels, predicted, coordinates, strict=True)
    ]


def _tables(head: TrainedHead) -> dict[str, list[dict[str, str]]]:
    trials = [
        {
            "settings": ", ".join(_setting_texts(trial["settings"])),
            "held-out log-loss": f"{trial['log_loss']:.3f}",
            "held-out accuracy": f"{trial['accuracy']:.3f}",
            "chosen": "yes" if trial["settings"] == head.model.settings else "",
        }
        for trial in head.fitted.trials
    ]
    tables = {"How settings were chosen": trials} if len(trials) > 1 else {}
    if head.tuning is not None:
        tables["How it was fine-tuned"] = [
            {
                "epoch": str(epoch["number"]),
                "loss": _number(epoch["loss"]),
                "validation log-loss": _number(epoch["validation_loss"]),
                "validation accuracy": _number(epoch["validation_accuracy"]),
                "seconds": f"{epoch['seconds']:.1f}",
            }
            for epoch in head.tuning["epochs"]
        ]
    if head.semi_supervised is not None:
        training = head.semi_supervised.training
        tables["What unlabelled images did"] = [
            {
                "round": str(number),
                "pseudo-labels": f"{judged.num_pseudo_labels:,}",
                "new, other, dropped": f"{judged.num_added:,}, {judged.num_revised:,}, "
                f"{judged.num_dropped:,}",
                "guard's accuracy": f"{judged.accuracy:.3f}",
                "guard's log-loss": f"{judged.log_loss:.3f}",
                "change (95 %)": f"{judged.log_loss_change['value']:+.3f} "
                f"({judged.log_loss_change['low']:+.3f} to {judged.log_loss_change['high']:+.3f})",
                "kept": "yes" if number == training.kept_round else "",
            }
            for number, judged in enumerate(training.rounds)
        ]
    return tables


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _setting_texts(settings: dict[str, Any]) -> list[str]:
    return [f"{name} {value}" for name, value in settings.items()]


def _provenance(head: TrainedHead) -> dict[str, str]:
    record = head.model.recorded()
    made = record.provenance
    return {
        "store": made.store,
        "source": str(made.source),
        "recipe": head.model.recipe.fingerprint,
        "backbone": head.model.recipe.backbone,
        "weights": head.model.recipe.weights,
        "labels": record.labels,
        "head": ", ".join([head.model.head, *_setting_texts(head.model.settings)]),
        "seed": str(head.options.seed),
        "when": made.when,
        "versions": ", ".join(f"{k} {v}" for k, v in made.versions.items()),
    }
