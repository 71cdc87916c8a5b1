"""Is a store whole, and is it what it says it is? Every check is a line with a verdict."""

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from embedder import engines
from embedder.checks.check import Check
from embedder.checks.conformance import MIN_COSINE, cosine
from embedder.columns import VIEW
from embedder.decode import decode_rgb
from embedder.errors import DecodeError, ReadError, RequestError, SourceError
from embedder.extraction import finished_vectors, load_head, make_plan
from embedder.machine import gpus, num_cores
from embedder.recipe import Recipe
from embedder.sources import list_images, read_bytes, sha256_of
from embedder.store import (
    EMBEDDINGS,
    FAILURES,
    Part,
    Store,
    last_division,
    part_numbers,
    scan,
    vectors_of,
)

_Embed = Callable[[NDArray[np.uint8]], dict[str, NDArray[Any]]]
_MAX_NAMES = 3  # ids shown for a check that failed
_MAX_PARTS = 20  # likewise, parts


def verify(
    store: Store,
    source: str | None = None,
    audit: int = 0,
    seed: int = 0,
    *,
    allow_private: bool = False,
) -> list[Check]:
    """Check a store, and with a source, that it holds what the source has.

    Args:
        store: The store.
        source: Where its images are; for `audit` alone, the last run's source is used if None.
        audit: Number of random images that are read and embedded again, one by one: each as it is,
            and where the store has several views, in one of them too.
        seed: Of the choice of images and views.
        allow_private: Whether servers may redirect to private addresses, as in `RunOptions`.

    Returns:
        All checks, passed or not.

    Raises:
        SourceError: The source is missing or empty, or none is known for an audit.
        RequestError: `audit` is negative.
    """
    if audit < 0:
        raise RequestError(f"`audit` must be 0 or more rows. Received: audit={audit}")
    checks = [_check_shards(store)]
    if not checks[0].passed:
        return checks  # nothing can be read beyond what is damaged
    checks += [_check_unique(store), _check_vectors(store)]
    if store.recipe.views > 1:
        checks.append(_check_views(store))
    if source is not None:
        refs = list_images(source).refs
        checks.append(_check_source(store, refs, allow_private))
        if division := last_division(store.runs()):
            checks.append(_check_parts(store, refs, list(division)))
    if audit:
        checks.append(_audit(store, source or _last_source(store), audit, seed, allow_private))
    return checks


def _check_shards(store: Store) -> Check:
    files = list(store.check_files())
    problems = [str(file.error) for file in files if file.error]
    num_without = sum(not file.has_digests for file in files)
    detail = f"{len(files):,} files read, checksums and digests right"
    if num_without:
        detail = (
            f"{len(files):,} files read, checksums right; {num_without:,} of an older version have "
            f"no digests"
        )
    if problems:
        detail = f"{len(problems):,} of {len(files):,} files: {'; '.join(problems[:_MAX_NAMES])}"
    return Check("every shard whole, of this recipe", not problems, detail)


def _check_unique(store: Store) -> Check:
    ids = pa.concat_arrays(
        [store.index(kind)["image_id"].combine_chunks() for kind in (EMBEDDINGS, FAILURES)]
    )
    num_repeated = len(ids) - pc.count_distinct(ids).as_py()
    return Check(
        "every image once, a row or a failure",
        num_repeated == 0,
        f"{len(ids):,} images, {num_repeated:,} repeated"
        + (": the next `embedder extract` drops them" if num_repeated else ""),
    )


def _check_views(store: Store) -> Check:
    num_views = store.recipe.views
    rows = store.table(["image_id", VIEW]).group_by("image_id")
    # So many rows, so many of them different, and the last of them: there is one of each.
    counts = rows.aggregate([(VIEW, "count"), (VIEW, "count_distinct"), (VIEW, "max")])
    is_whole = (
        (pc.field(f"{VIEW}_count") == num_views)
        & (pc.field(f"{VIEW}_count_distinct") == num_views)
        & (pc.field(f"{VIEW}_max") == num_views - 1)
    )
    wrong = counts.filter(~is_whole)["image_id"].to_pylist()
    detail = f"{counts.num_rows:,} images with {num_views} views, {len(wrong):,} not whole"
    detail += _named(wrong)
    return Check("every image with each of its views once", not wrong, detail)


def _check_vectors(store: Store) -> Check:
    num_rows, bad = 0, []
    for table in scan(store, ["image_id", *store.recipe.columns], view=None):
        is_finite = np.ones(table.num_rows, bool)
        for column in store.recipe.columns:
            vectors = vectors_of(table[column]).reshape(table.num_rows, -1)
            is_finite &= np.isfinite(vectors).all(axis=1)
        num_rows += table.num_rows
        bad += table["image_id"].filter(pa.array(~is_finite)).to_pylist()
    detail = f"{num_rows:,} vectors, {len(bad):,} not{_named(bad)}"
    return Check("every vector finite", not bad, detail)


def _named(ids: list[str]) -> str:
    return f": {', '.join(ids[:_MAX_NAMES])}" if ids else ""


def _check_source(store: Store, refs: pa.Table, allow_private: bool) -> Check:
    plan = make_plan(refs, store)
    # A new time of change alone is no fault: what counts is the content.
    stale = plan.stale.filter(pc.invert(plan.stale["same_file"]))
    stored = store.table(["image_id", "sha256"])
    hashes = stored["sha256"].take(
        pc.index_in(stale["image_id"], stored["image_id"].combine_chunks())
    )
    num_changed = num_unreadable = 0
    for path, sha256 in zip(stale["path"].to_pylist(), hashes.to_pylist(), strict=True):
        try:
            num_changed += sha256_of(path, allow_private=allow_private) != sha256
        except ReadError:
            num_unreadable += 1
    problems = {
        "not in the store": plan.missing.num_rows,
        "changed since": num_changed,
        "cannot be read now": num_unreadable,
        "no longer in the source": plan.num_deleted,
    }
    detail = ", ".join(f"{count:,} {problem}" for problem, count in problems.items())
    advice = "; run `embedder extract` again" if any(problems.values()) else ""
    return Check("the store holds what the source has", not any(problems.values()), detail + advice)


def _check_parts(store: Store, refs: pa.Table, parts: list[Part]) -> Check:
    """Which of the parts that the store was made in lack images, neither rows nor failures."""
    known = [store.index(kind)["image_id"] for kind in (EMBEDDINGS, FAILURES)]
    is_known = pc.or_(*(pc.is_in(refs["image_id"], ids.combine_chunks()) for ids in known))
    numbers = part_numbers(refs["image_id"], len(parts))
    num_images = np.bincount(numbers, minlength=len(parts) + 1)
    num_missing = np.bincount(numbers[~is_known.to_numpy()], minlength=len(parts) + 1)
    lacking = [
        f"{part} lacks {num_missing[part.number]:,} of {num_images[part.number]:,} images"
        for part in parts
        if num_missing[part.number]
    ]
    detail = f"{len(parts) - len(lacking):,} of {len(parts):,} parts whole"
    if lacking:
        more = [f"and {len(lacking) - _MAX_PARTS:,} more"] if len(lacking) > _MAX_PARTS else []
        detail += f": {'; '.join(lacking[:_MAX_PARTS] + more)}"
        detail += ". Run `embedder extract` again, with `--part` or for all"
    return Check("every part whole, of those that runs were made of", not lacking, detail)


def _last_source(store: Store) -> str:
    runs = store.runs()
    if not runs:
        raise SourceError(f"The store {store} does not say where its images are: give --source")
    return str(runs[-1]["source"])


def _audit(store: Store, source: str, num_images: int, seed: int, allow_private: bool) -> Check:
    refs = list_images(source).refs
    paths = dict(zip(refs["image_id"].to_pylist(), refs["path"].to_pylist(), strict=True))
    ids, random = store.ids(), np.random.default_rng(seed)
    name = f"vectors are those of their images (cosine >= {MIN_COSINE})"
    if not len(ids):
        return Check(name, True, "the store has no rows to embed again")
    chosen = ids[random.permutation(len(ids))[:num_images]]
    rows = _rows_of(store, chosen)
    recipe, head = store.recipe, load_head(store.recipe)
    runtime = engines.choose("auto", gpus(), is_here=True)
    engine = engines.load(recipe.of_features, runtime, 1, num_cores())

    def embed(pixels: NDArray[np.uint8]) -> dict[str, NDArray[Any]]:
        return finished_vectors(engine.embed(pixels[None]), recipe, head)

    cosines, wrong, unreadable, gone = [], [], [], []
    for image_id in map(str, chosen):
        stored = rows.filter(pc.equal(rows["image_id"], image_id))
        views = [0, *random.integers(1, recipe.views, 1)] if recipe.views > 1 else [0]
        if image_id not in paths:
            gone.append(image_id)
            continue
        try:
            encoded = read_bytes(paths[image_id], allow_private=allow_private)
        except ReadError as error:  # which says nothing of what is stored
            unreadable.append(f"{image_id} ({error})")
            continue
        found = _cosine_now(recipe, embed, encoded, stored, views)
        if found is not None:
            cosines.append(found)
        if found is None or found < MIN_COSINE:
            wrong.append(image_id)
    detail = f"{len(cosines):,} of {len(chosen):,} images embedded again"
    if cosines:
        detail += f", lowest cosine {min(cosines):.7f}"
    problems = {
        "wrong or changed": wrong,
        "cannot be read now": unreadable,
        "no longer in the source": gone,
    }
    for problem, images in problems.items():
        if images:
            detail += f"; {len(images):,} {problem}{_named(images)}"
    return Check(name, not any(problems.values()), detail)


def _rows_of(store: Store, ids: NDArray[np.object_]) -> pa.Table:
    """The rows of some images, with all their views; of the store, one shard is in memory."""
    wanted, views = pa.array(ids, pa.string()), [VIEW] if store.recipe.views > 1 else []
    tables = scan(store, ["image_id", "sha256", *views, *store.recipe.columns], view=None)
    return pa.concat_tables(table.filter(pc.is_in(table["image_id"], wanted)) for table in tables)


def _cosine_now(
    recipe: Recipe, embed: _Embed, encoded: bytes, stored: pa.Table, views: list[int]
) -> float | None:
    """Lowest cosine of an image's stored vectors to those it has now.

    Args:
        recipe: The store's.
        embed: Makes what the recipe stores of one image's pixels: by column, (1, dim).
        encoded: The image's file.
        stored: The image's rows.
        views: Numbers of the views to compare.

    Returns:
        None where the image's bytes are others, or are no image, or a view is not stored.
    """
    if hashlib.sha256(encoded).hexdigest() != stored["sha256"][0].as_py():
        return None
    try:
        image = decode_rgb(encoded, recipe)
    except DecodeError:
        return None
    pixels, cosines = (image.pixels, *image.augmented), []
    for view in views:
        row = stored.filter(pc.equal(stored[VIEW], int(view))) if recipe.views > 1 else stored
        if not row.num_rows:
            return None
        features = embed(pixels[view])
        cosines += [
            cosine(features[column][0], vectors_of(row[column])[0]) for column in recipe.columns
        ]
    return min(cosines)
