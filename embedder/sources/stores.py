"""Stores of buckets: where they are, with what credentials, and how long they are waited for."""

import functools
import importlib.util
import os
import re
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

from obstore.store import AzureStore, GCSStore, ObjectStore, S3Store

from embedder.sources.attempts import AttemptError

_LIST_SECONDS = 30  # for one page of a listing
# Images are asked for again by `read_patiently`.
_NUM_LIST_RETRIES = 5
_AWS = "https://s3.amazonaws.com"
_OF_AWS = re.compile(r"\.amazonaws\.com(\.cn)?/?$")
_AZURE = "core.windows.net"
# Any of these says where buckets are, the first before the others; obstore reads them all.
_ENDPOINTS = {
    "s3": ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"),
    "gs": ("GOOGLE_BASE_URL",),
    "abfs": ("AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT"),
}
# Any of these says where credentials come from, or that there are none; obstore reads them all.
_CREDENTIALS = {
    "s3": (
        *("AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_SKIP_SIGNATURE"),
        *("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "AWS_CONTAINER_CREDENTIALS_FULL_URI"),
    ),
    "gs": (
        *("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_KEY", "GOOGLE_SERVICE_ACCOUNT_PATH"),
        *("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_BEARER_TOKEN", "GOOGLE_SKIP_SIGNATURE"),
    ),
    "abfs": (
        *("AZURE_STORAGE_ACCOUNT_KEY", "AZURE_STORAGE_ACCESS_KEY", "AZURE_STORAGE_SAS_TOKEN"),
        *("AZURE_STORAGE_SAS_KEY", "AZURE_STORAGE_TOKEN", "AZURE_STORAGE_MASTER_KEY"),
        *("AZURE_CLIENT_ID", "AZURE_STORAGE_CLIENT_ID", "AZURE_FEDERATED_TOKEN_FILE"),
        *("AZURE_IDENTITY_ENDPOINT", "AZURE_MSI_ENDPOINT", "AZURE_USE_AZURE_CLI"),
        *("AZURE_STORAGE_USE_EMULATOR", "AZURE_SKIP_SIGNATURE"),
    ),
}
WHAT_TO_SET = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE, with boto3 installed; or "
    "AWS_SKIP_SIGNATURE=false on a machine with a role)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS (or GOOGLE_SKIP_SIGNATURE=false on a machine with a "
    "service account)",
    "abfs": "AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN (or AZURE_SKIP_SIGNATURE=false "
    "on a machine with an identity)",
}
_lock = threading.Lock()


def open_store(
    kind: str, server: str, limits: tuple[float, float, float] | None = None
) -> ObjectStore:
    """The store of a bucket: one for all threads of a process that have the same limits.

    Args:
        kind: Of bucket, as `BUCKET_SCHEMES` has it.
        server: The bucket, or `container@account.host`.
        limits: Of one request for an image, in seconds: for a connection, without a byte, and
            altogether; None for listings, which the store itself asks for again.

    Raises:
        AttemptError: AWS does not say now where the bucket is.
        ImportError: A profile of AWS is asked for, which only boto3 can read.
        BaseError: Something that the store needs to know is not set.
        ValueError: The bucket is in a cloud that is not known.
    """
    region = _region_for(server) if kind == "s3" else None  # outside the lock: it may take long
    with _lock:
        return _new_store(os.getpid(), kind, server, limits, region)


@functools.cache
def _new_store(
    process: int,  # noqa: ARG001 - a fork shares no connections
    kind: str,
    server: str,
    limits: tuple[float, float, float] | None,
    region: str | None,
) -> ObjectStore:
    if limits is None:
        timeouts = {"timeout": timedelta(seconds=_LIST_SECONDS)}
    else:
        names = ("connect_timeout", "read_timeout", "timeout")
        timeouts = {
            name: timedelta(seconds=limit) for name, limit in zip(names, limits, strict=True)
        }
    client_options: dict[str, Any] = {**timeouts}
    if (_endpoint(kind) or "").lower().startswith("http://"):
        client_options["allow_http"] = True
    options: dict[str, Any] = {
        "client_options": client_options,
        "retry_config": {"max_retries": 0 if limits else _NUM_LIST_RETRIES},
    }
    if kind == "s3":
        return S3Store(server, **options, **_s3_access(region))
    if not has_credentials(kind):
        options["skip_signature"] = True
    if kind == "gs":
        return GCSStore(server, **options)
    container, has_account, host = server.partition("@")
    if has_account:
        if not host.endswith(_AZURE) and not _endpoint(kind):
            raise ValueError(
                f"the account's host must end in {_AZURE}, or AZURE_STORAGE_ENDPOINT be set. "
                f"Received: {host}"
            )
        options["account_name"] = host.partition(".")[0]
    return AzureStore(container, **options)


def _s3_access(region: str | None) -> dict[str, Any]:
    """Where, and with what credentials; what the environment says, obstore reads itself.

    Raises:
        ImportError: A profile is asked for, which only boto3 can read.
    """
    access: dict[str, Any] = {}
    if not _is_set("s3"):
        if session := _boto3_session():
            from obstore.auth.boto3 import Boto3CredentialProvider

            access["credential_provider"] = Boto3CredentialProvider(session)
            region = region or session.region_name
        else:
            access["skip_signature"] = True
    if not _environment_endpoint("s3") and (endpoint := _endpoint("s3")):
        access["endpoint"] = endpoint
    if region:
        access["region"] = region
    return access


def _endpoint(kind: str) -> str | None:
    """The server that the user names for all buckets of a kind."""
    endpoint = _environment_endpoint(kind)
    if endpoint is None and kind == "s3" and not _is_set(kind):
        return _profile_endpoint()
    return endpoint


def _environment_endpoint(kind: str) -> str | None:
    return next((url for name in _ENDPOINTS[kind] if (url := os.environ.get(name))), None)


def _region_for(bucket: str) -> str | None:
    """The region of a bucket that is AWS's, unless the environment says it.

    Raises:
        AttemptError: AWS does not say it now.
    """
    names = ("AWS_REGION", "AWS_DEFAULT_REGION")
    with _lock:  # a session of boto3 is for one thread at a time
        is_told = _endpoint("s3") or any(os.environ.get(name) for name in names)
    return None if is_told else _region_of(bucket)


@functools.cache
def _region_of(bucket: str) -> str | None:
    """Where AWS has a bucket, which it tells everybody; None of one that there is not."""
    import urllib3

    reason = "where AWS has the bucket could not be found out; set AWS_REGION"
    try:
        answer = urllib3.request(
            "HEAD", f"{_AWS}/{bucket}", redirect=False, retries=False, timeout=5
        )
    except urllib3.exceptions.HTTPError as error:
        raise AttemptError(reason) from error
    region = answer.headers.get("x-amz-bucket-region")
    if region is None and answer.status not in (400, 404):  # no name of a bucket, or no bucket
        raise AttemptError(reason)
    return region


def _is_set(kind: str) -> bool:
    """Whether the environment says where credentials come from."""
    return any(os.environ.get(name) for name in _CREDENTIALS[kind])


def has_credentials(kind: str) -> bool:
    """Whether there are credentials, as far as can be told without asking a server."""
    if _is_set(kind):
        return True
    if kind == "gs":
        return Path("~/.config/gcloud/application_default_credentials.json").expanduser().exists()
    return kind == "s3" and _boto3_session() is not None


@functools.cache
def _boto3_session() -> Any:
    """A session of boto3 that has credentials: profiles, single sign-on, roles; None without.

    Raises:
        ImportError: A profile is asked for, which only boto3 can read.
    """
    if importlib.util.find_spec("boto3") is None:
        if profile := os.environ.get("AWS_PROFILE"):
            raise ImportError(f"AWS_PROFILE={profile} is read by boto3, which is not installed")
        return None
    import boto3

    session = boto3.Session()
    return session if session.get_credentials() is not None else None


@functools.cache
def _profile_endpoint() -> str | None:
    """The server that a profile of boto3's names; None where it is AWS."""
    session = _boto3_session()
    if session is None:
        return None
    region = session.region_name or "us-east-1"
    endpoint: str = session.client("s3", region_name=region).meta.endpoint_url
    return None if _OF_AWS.search(endpoint) else endpoint
