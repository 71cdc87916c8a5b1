"""Tables of refs: what is said of a path is said of a whole table too."""

from embedder.sources.refs import are_urls, make_refs
from embedder.sources.urls import scheme_of

SCHEMES = {
    "/photos/a.jpg": None,
    "C:/photos/a.jpg": None,
    "photos://a.jpg": "photos",
    "s3://bucket/a://b.jpg": "s3",
    "file:///photos/a.jpg": "file",
    "/caf\udce9.jpg": None,  # as Python spells bytes that are not UTF-8
}


def test_a_path_and_a_table_of_them_are_told_apart_from_urls() -> None:
    paths = [place.encode("utf-8", "surrogateescape") for place in SCHEMES]
    assert [scheme_of(place) for place in SCHEMES] == list(SCHEMES.values())
    assert [scheme_of(path) for path in paths] == list(SCHEMES.values())
    refs = make_refs((path.hex(), path, None, None) for path in paths)
    assert are_urls(refs).to_pylist() == [scheme is not None for scheme in SCHEMES.values()]
