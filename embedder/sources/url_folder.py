"""Folders of images behind URLs."""

import os
from collections import Counter

import pyarrow as pa

from embedder.sources.refs import RefRow, is_image, make_refs, readable
from embedder.sources.urls import BUCKET_SCHEMES, Found, scheme_of, with_plain_scheme


def list_url(url: str) -> tuple[pa.Table, Counter[str]]:
    """List the images below a URL.

    Returns:
        Table of refs, and the number of other files by extension.

    Raises:
        SourceError: It cannot be listed.
    """
    rows: list[RefRow] = []
    skipped: Counter[str] = Counter()
    for found in _find(with_plain_scheme(url)):
        if is_image(found.relative, skipped):
            moment = found.modified
            microseconds = None if moment is None else int(moment.timestamp() * 1e6)
            image_id = readable(found.relative)
            rows.append((image_id, os.fsencode(found.url), found.num_bytes, microseconds))
    return make_refs(rows), skipped


def _find(url: str) -> list[Found]:
    if scheme_of(url) in BUCKET_SCHEMES:
        from embedder.sources.buckets import list_bucket

        return list_bucket(url)
    from embedder.sources.remote import list_folder

    return list_folder(url)
