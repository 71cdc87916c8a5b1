"""Names of columns: what a manifest cannot bring."""

import pyarrow as pa

from embedder.columns import RESERVED_COLUMNS
from embedder.recipe import Recipe
from embedder.sources.refs import REF_SCHEMA
from embedder.store.schema import row_schema


def test_the_columns_of_refs_and_of_rows_are_reserved() -> None:
    recipe = Recipe(backbone="mobilenet", weights="random:0", image_size=(64, 96))
    rows = row_schema(recipe, {"embedding": pa.list_(pa.float32(), 4)})
    assert {*REF_SCHEMA.names, *rows.names} <= RESERVED_COLUMNS
