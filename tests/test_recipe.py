"""The recipe: what decides a feature, checked, frozen, and told apart by its fingerprint."""

import hashlib
import json
import os
import subprocess
import sys
from typing import Any, Literal

import pytest
from pydantic import ValidationError

from embedder.errors import RecipeError
from embedder.recipe import MAX_SIDE, MIN_SIDE, Recipe

NEEDED = {"backbone": "lite", "weights": "0123456789abcdef" * 4, "image_size": (48, 64)}

# For every attribute a value that is neither its default nor in `NEEDED`.
OTHER = {
    "backbone": "lite2",
    "weights": "f" * 64,
    "layers": ("conv1", "conv2"),
    "pooling": "max",
    "image_size": (64, 48),
    "crop": "pad",
    "crop_fraction": 0.875,
    "interpolation": "nearest",
    "decode": "draft",
    "precision": "bfloat16",
    "store_dtype": "float16",
    "l2_normalise": True,
    "views": 8,
    "head": "e" * 64,
    "version": 2,
}

assert set(OTHER) == set(Recipe.model_fields) - {"weights_source", "head_source"}

# The fingerprint is written in every store: if this text changes, no store opens any more.
CANONICAL = (
    '{"backbone":"lite","crop":"center","crop_fraction":1.0,"decode":"scaled",'
    '"image_size":[48,64],"interpolation":"bicubic","l2_normalise":false,"pooling":"avg",'
    '"precision":"float32","store_dtype":"float32","version":1,'
    '"weights":"0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"}'
)
FINGERPRINT = "1d6255d93e1c5a53"


class FutureRecipe(Recipe):
    """A recipe whose attributes of one allowed value have a second."""

    decode: Literal["scaled", "draft"] = "scaled"
    precision: Literal["float32", "bfloat16"] = "float32"
    version: Literal[1, 2] = 1


def test_the_defaults_are_as_documented() -> None:
    assert Recipe(**NEEDED).model_dump() == NEEDED | {
        "layers": (),
        "pooling": "avg",
        "crop": "center",
        "crop_fraction": 1.0,
        "interpolation": "bicubic",
        "decode": "scaled",
        "precision": "float32",
        "store_dtype": "float32",
        "l2_normalise": False,
        "views": 1,
        "head": None,
        "version": 1,
    }


@pytest.mark.parametrize("name", NEEDED)
def test_backbone_weights_and_size_have_no_default(name: str) -> None:
    with pytest.raises(RecipeError, match=rf"`{name}` must be given. Received: nothing$"):
        Recipe(**{key: value for key, value in NEEDED.items() if key != name})


def test_a_recipe_cannot_be_changed() -> None:
    recipe = Recipe(**NEEDED)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.pooling = "max"
    assert recipe.pooling == "avg"


# Fingerprint -----------------------------------------------------------------------------------


def test_the_fingerprint_of_a_known_recipe_stays() -> None:
    assert Recipe(**NEEDED).fingerprint == FINGERPRINT
    assert hashlib.sha256(CANONICAL.encode()).hexdigest()[:16] == FINGERPRINT


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_the_fingerprint_is_the_same_in_every_process(hash_seed: str) -> None:
    code = f"from embedder.recipe import Recipe; print(Recipe(**{NEEDED!r}).fingerprint)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == Recipe(**NEEDED).fingerprint


@pytest.mark.parametrize("name", OTHER)
def test_every_attribute_changes_the_fingerprint(name: str) -> None:
    before, after = FutureRecipe(**NEEDED), FutureRecipe(**(NEEDED | {name: OTHER[name]}))
    assert before.fingerprint == FINGERPRINT
    assert after.fingerprint != before.fingerprint


def test_where_the_weights_are_makes_no_other_recipe() -> None:
    here, there = (Recipe(**NEEDED, weights_source=path) for path in ("/a.h5", "/b.h5"))
    assert here.fingerprint == there.fingerprint == FINGERPRINT
    assert here.differences(there) == []


def test_the_spelling_of_a_value_does_not_change_the_fingerprint() -> None:
    backwards = dict(reversed(NEEDED.items())) | {"crop_fraction": 1, "image_size": [48, 64]}
    assert Recipe(**backwards).fingerprint == FINGERPRINT


def test_a_recipe_comes_back_from_json_as_it_was() -> None:
    allowed = {name: OTHER[name] for name in OTHER.keys() - {"decode", "precision", "version"}}
    recipe = Recipe(**allowed)
    again = Recipe(**json.loads(recipe.model_dump_json()))
    assert again == recipe
    assert again.fingerprint == recipe.fingerprint


# Bad values ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "rule"),
    [
        ({"backbone": ""}, r"`backbone`: .*at least 1 character.* Received: backbone=''"),
        ({"weights": "abc"}, r"`weights`: .*\[0-9a-f\]\{64\}.* Received: weights='abc'"),
        ({"weights": "F" * 64}, r"`weights`: .*\[0-9a-f\]\{64\}.* Received: weights='FFFF"),
        ({"weights": "0" * 65}, r"`weights`: .*\[0-9a-f\]\{64\}.* Received: weights='0000"),
        ({"pooling": "sum"}, r"`pooling` must be .*avg, max, .* or none. Received: pooling='sum'"),
        ({"crop": "zoom"}, r"`crop` must be .*center, squash or pad. Received: crop='zoom'"),
        ({"crop_fraction": 0.0}, r"`crop_fraction` must be .*above 0. Received: crop_fraction=0.0"),
        ({"crop_fraction": 1.5}, r"`crop_fraction` must be .*at most 1. .*fraction=1.5"),
        (
            {"crop_fraction": float("nan")},
            r"`crop_fraction` must .*fraction=nan",
        ),
        ({"interpolation": "area"}, r"`interpolation` must be .*nearest, .*Received: .*='area'"),
        ({"decode": "draft"}, r"`decode` must be .*exact or scaled. Received: decode='draft'"),
        (
            {"precision": "int8"},
            r"`precision` must be .*float32, bfloat16 or float16. Received: precision='int8'",
        ),
        ({"store_dtype": "int8"}, r"`store_dtype` must be .*float32 or float16. .*dtype='int8'"),
        ({"l2_normalise": "perhaps"}, r"`l2_normalise`: .*boolean.*l2_normalise='perhaps'"),
        ({"version": 2}, r"`version` must be .*1. Received: version=2"),
        ({"image_size": 64}, r"`image_size`: .*tuple. Received: image_size=64"),
        (
            {"image_size": (48, 64, 3)},
            r"`image_size`: .*2 items.* .*\(48, 64, 3\)",
        ),
        ({"image_size": (48, "wide")}, r"`image_size`: .*integer.*Received: .*='wide'"),
        (
            {"colour": "red"},
            r"Unknown option: colour. There are: backbone, .*, head_source.",
        ),
    ],
)
def test_a_bad_value_is_refused_with_the_rule_and_the_value(bad: dict[str, Any], rule: str) -> None:
    with pytest.raises(RecipeError, match="^" + rule):
        Recipe(**(NEEDED | bad))


@pytest.mark.parametrize(
    "size",
    [(MIN_SIDE - 1, 64), (64, MIN_SIDE - 1), (MAX_SIDE + 1, 64), (64, MAX_SIDE + 1), (-64, 64)],
)
def test_a_size_out_of_range_is_refused_with_the_range_and_the_order(size: tuple[int, int]) -> None:
    height, width = size
    rule = rf"32 to 4096 pixels, as \(height, width\)\. Received: image_size=\({height}, {width}\)"
    with pytest.raises(RecipeError, match=rule):
        Recipe(**(NEEDED | {"image_size": size}))


@pytest.mark.parametrize("size", [(MIN_SIDE, MAX_SIDE), (MAX_SIDE, MIN_SIDE)])
def test_the_ends_of_the_range_of_sizes_are_allowed(size: tuple[int, int]) -> None:
    assert Recipe(**(NEEDED | {"image_size": size})).image_size == size


def test_the_whole_image_may_be_the_crop() -> None:
    assert Recipe(**(NEEDED | {"crop_fraction": 1.0})).crop_fraction == 1.0


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(**(NEEDED | {"pooling": "sum", "crop": "zoom"}))
    assert "pooling='sum'" in str(caught.value)
    assert "crop='zoom'" in str(caught.value)


# Differences -----------------------------------------------------------------------------------


def test_a_recipe_does_not_differ_from_its_like() -> None:
    assert Recipe(**NEEDED).differences(Recipe(**NEEDED)) == []


def test_differences_name_the_attribute_then_mine_then_theirs() -> None:
    mine = Recipe(**NEEDED)
    theirs = Recipe(**(NEEDED | {"image_size": (64, 48), "pooling": "max"}))
    assert mine.differences(theirs) == [
        "pooling: avg, not max",
        "image_size: (48, 64), not (64, 48)",
    ]


@pytest.mark.parametrize("name", OTHER)
def test_every_attribute_shows_in_the_differences(name: str) -> None:
    mine, theirs = FutureRecipe(**NEEDED), FutureRecipe(**(NEEDED | {name: OTHER[name]}))
    (line,) = mine.differences(theirs)
    assert line == f"{name}: {getattr(mine, name)}, not {OTHER[name]}"
