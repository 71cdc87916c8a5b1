"""Reading a store a shard at a time, however large it is: some columns, of some of its rows."""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from embedder.columns import VIEW
from embedder.errors import RequestError
from embedder.store.shard_file import vectors_of

if TYPE_CHECKING:
    from embedder.store.store import Store

_SHARDS_AT_ONCE = 4


def scan(
    store: "Store",
    columns: list[str],
    *,
    view: int | None = 0,
    images: NDArray[np.integer] | None = None,
    shards: Iterable[str] | None = None,
) -> Iterator[pa.Table]:
    """Read a store's rows, a shard at a time; nothing is read but what is asked for.

    Args:
        store: What to read.
        columns: Names of columns.
        view: Number of the view, of which each image has one row; None for all of them, of which
            an image has as many rows, one after the other.
        images: (m,), indices in `store.ids()`, rising, each once; None for all images. Shards
            with none of them are not read.
        shards: Names of shards, in any order: `images` are then indices among theirs. None for
            all, in the order of `store.ids()`.

    Yields:
        Tables of these columns, without rows where a shard has none that are asked for.

    Raises:
        RequestError: The store has no such view.
        StoreError: A shard cannot be read, or has no such column.
    """
    num_views, start = store.recipe.views, 0
    if view is not None and not 0 <= view < num_views:
        raise RequestError(
            f"`view` must be one of the store's views, 0 to {num_views - 1}, or None for all. "
            f"Received: view={view}"
        )
    is_one_of_several = view is not None and num_views > 1
    for name in store.shard_names() if shards is None else shards:
        if images is not None:
            stop = start + store.num_rows_of(name) // num_views
            first, last = np.searchsorted(images, [start, stop])
            here, start = images[first:last] - start, stop
            if not len(here):
                continue
        table = store.read_shard(name, columns=[*columns, *[VIEW] * is_one_of_several])
        if is_one_of_several:
            table = table.filter(pc.equal(table[VIEW], view))
        if images is not None:
            rows_of_image = 1 if view is not None else num_views
            is_wanted = np.zeros(table.num_rows // rows_of_image, bool)
            is_wanted[here] = True
            table = table.filter(pa.array(np.repeat(is_wanted, rows_of_image)))
        yield table.select(columns)


def shard_groups(store: "Store", min_rows: int) -> Iterator[tuple[list[str], slice]]:
    """Divide a store into groups of neighbouring shards.

    Yields:
        Names of shards, which but for the last group have together at least `min_rows` rows, views
        too; and which of all the store's rows these are.
    """
    names: list[str] = []
    start = stop = 0
    for name in store.shard_names():
        names.append(name)
        stop += store.num_rows_of(name)
        if stop - start >= min_rows:
            yield names, slice(start, stop)
            names, start = [], stop
    if names:
        yield names, slice(start, stop)


def shuffled_batches(
    store: "Store",
    labels_by_id: Mapping[str, Any],
    batch_size: int,
    random: np.random.Generator,
    column: str | None = None,
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Read the labelled images of a store once, in random order.

    Shards come in random order, a few at a time, and their images are mixed: an archive's order is
    often that of its classes.

    Args:
        store: Features. Of several views of an image one is drawn.
        labels_by_id: Labels, or rows of an indicator matrix; images without one are left out.
        batch_size: Images of a batch; the last of each few shards can be smaller.
        random: Decides the order and the views.
        column: Name of the feature, where the store has several.

    Yields:
        Features (n, dim) and labels of n images.

    Raises:
        RequestError: The store has no such feature, or several of which none is named.
        StoreError: A shard cannot be read.
    """
    column = store.recipe.column(column)
    num_views = store.recipe.views
    names = random.permutation(store.shard_names())
    for start in range(0, len(names), _SHARDS_AT_ONCE):
        some = names[start : start + _SHARDS_AT_ONCE]
        tables = [*scan(store, ["image_id", column], view=None, shards=some)]
        ids = np.concatenate([table["image_id"].to_numpy() for table in tables])
        vectors = np.concatenate([vectors_of(c) for t in tables for c in t[column].chunks])
        is_labelled = [image in labels_by_id for image in ids[::num_views]]
        rows = random.permutation(num_views * np.flatnonzero(is_labelled))
        rows += random.integers(num_views, size=len(rows))
        for first in range(0, len(rows), batch_size):
            chosen = rows[first : first + batch_size]
            yield vectors[chosen], np.array([labels_by_id[image] for image in ids[chosen]])
