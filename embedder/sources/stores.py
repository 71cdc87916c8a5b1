"""Stores of buckets: where they are, with what credentials, and how long they are waited for."""

import functools
import importlib.util
import os
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

from obstore.store import AzureStore, GCSStore, ObjectStore, S3Store

_LIST_SECONDS = 30  # for one page of a listing
# Images are asked for again by `read_patiently`.
_NUM_LIST_RETRIES = 5
_AWS = "https://s3.amazonaws.com"
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
    """The store of a bucket, made once for all threads of a process.

    Args:
        kind: Of bucket, as `BUCKET_SCHEMES` has it.
        server: The bucket, or `container@account.host`.
        limits: Of one request for an image, in seconds: for a connection, without a byte, and
            altogether; None for listings, which the store itself asks for again.

    Raises:
        ImportError: A profile of AWS is asked for, which only boto3 can read.
        BaseError: Something that the store needs to know is not set.
    """
    with _lock:
        return _new_store(os.getpid(), kind, server, limits)  # a fork shares no connections


@functools.cache
def _new_store(
    process: int,  # noqa: ARG001
    kind: str,
    server: str,
    limits: tuple[float, float, float] | None,
) -> ObjectStore:
    if limits is None:
        timeouts = {"timeout": timedelta(seconds=_LIST_SECONDS)}
    else:
        names = ("connect_timeout", "read_timeout", "timeout")
        timeouts = {
            name: timedelta(seconds=limit) for name, limit in zip(names, limits, strict=True)
        }
    options: dict[str, Any] = {
        # Only an endpoint that the user sets is without TLS.
        "client_options": {"allow_http": True, **timeouts},
        "retry_config": {"max_retries": 0 if limits else _NUM_LIST_RETRIES},
    }
    if kind == "s3":
        return S3Store(server, **options, **_s3_access(server))
    if not has_credentials(kind):
        options["skip_signature"] = True
    if kind == "gs":
        return GCSStore(server, **options)
    container, has_account, host = server.partition("@")
    if has_account:
        options["account_name"] = host.partition(".")[0]
    return AzureStore(container, **options)


def _s3_access(bucket: str) -> dict[str, Any]:
    """With what credentials, and in what region; what the environment says, obstore reads itself.

    Raises:
        ImportError: A profile is asked for, which only boto3 can read.
    """
    access: dict[str, Any] = {}
    if not _is_set("s3"):
        if session := _boto3_session():
            from obstore.auth.boto3 import Boto3CredentialProvider

            access["credential_provider"] = Boto3CredentialProvider(session)
            if session.region_name:
                access["region"] = session.region_name
        else:
            access["skip_signature"] = True
    has_endpoint = any(os.environ.get(f"AWS_ENDPOINT{end}") for end in ("", "_URL", "_URL_S3"))
    has_region = any(os.environ.get(name) for name in ("AWS_REGION", "AWS_DEFAULT_REGION"))
    if not has_endpoint and not has_region and (region := _region_of(bucket)):
        access["region"] = region
    return access


@functools.cache
def _region_of(bucket: str) -> str | None:
    """Where AWS has a bucket, which it tells everybody; None if it does not answer."""
    import urllib3

    try:
        answer = urllib3.request(
            "HEAD", f"{_AWS}/{bucket}", redirect=False, retries=False, timeout=5
        )
    except urllib3.exceptions.HTTPError:
        return None
    return answer.headers.get("x-amz-bucket-region")


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
