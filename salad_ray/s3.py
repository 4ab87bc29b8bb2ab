"""S3 and what speaks its protocol: s3fs, with patience, and with errors that say what to do.

Endpoint, region, profile and keys are those of the AWS variables and files (`AWS_ENDPOINT_URL_S3`, `AWS_REGION`,
`AWS_PROFILE`, …) or of the machine's role.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from hashlib import md5
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, ParamValidationError
from botocore.exceptions import ConnectionError as NoConnection
from fsspec.asyn import sync_wrapper
from fsspec.callbacks import DEFAULT_CALLBACK
from s3fs import S3FileSystem
from s3fs.core import S3_RETRYABLE_ERRORS, _error_wrapper, set_custom_error_handler

from salad_ray.store import StoreError

ATTEMPTS = 14
"""Of every request: s3fs waits 0.1 · 1.7^i s after the i-th, at most 15 s, so a minute and a half in all.

That is all where a store answers errors. Where nothing answers, an attempt itself takes `CONNECT_TIMEOUT_SECS`, and all
of them two and a half minutes; where it takes requests and is silent, `READ_TIMEOUT_SECS`, and eight and a half.
"""
PART_BYTES = 16 * 2**20
"""Of a multipart upload, which may have 10,000 parts: objects of up to 160 GB. What is smaller is one request."""
CONNECT_TIMEOUT_SECS = 5
READ_TIMEOUT_SECS = 30
"""Of silence, not of a whole answer; it counts only when a request was sent, so a slow link may take its time."""
MAX_CONNECTIONS = 64
"""Of a process to a store: what reads many shards has 32 threads."""
PASSING_CODES = ("RequestTimeout", "InternalError", "ServiceUnavailable", "OperationAborted", "SlowDown")
NO_ANSWER = (NoConnection, HTTPClientError, *S3_RETRYABLE_ERRORS)
"""Errors of a request without an answer, or of an answer that breaks off. Most are no `OSError`."""


class S3(S3FileSystem):
    """s3fs, every request of which ends in its answer, in a missing file or in a `StoreError`."""

    retries = ATTEMPTS
    default_block_size = PART_BYTES

    async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
        place = "/".join(filter(None, (kwargs.get("Bucket"), kwargs.get("Key") or kwargs.get("Prefix"))))
        with _explaining(place, method):
            try:
                return await super()._call_s3(method, *args, **kwargs)
            except FileNotFoundError as error:
                if method != "complete_multipart_upload":
                    raise
                return await self._completed_before(error, **kwargs)

    call_s3 = sync_wrapper(_call_s3)  # the inherited one would call the inherited other

    async def _completed_before(self, error: Exception, Bucket: str, Key: str, **kwargs: Any) -> Any:
        """An upload that is gone when it is to be completed may have been, and only the answer was lost."""
        etags = [part["ETag"].strip('"') for part in kwargs["MultipartUpload"]["Parts"]]
        expected = f"{md5(b''.join(map(bytes.fromhex, etags)), usedforsecurity=False).hexdigest()}-{len(etags)}"
        found = await self._call_s3("head_object", Bucket=Bucket, Key=Key)
        if found["ETag"].strip('"') != expected:
            raise error
        return found

    async def _cat_file(self, path: str, *args: Any, **kwargs: Any) -> bytes:
        with _explaining(path, "get_object"):
            return bytes(await super()._cat_file(path, *args, **kwargs))

    async def _get_file(self, rpath: str, *args: Any, **kwargs: Any) -> None:
        with _explaining(rpath, "get_object"):
            await super()._get_file(rpath, *args, **kwargs)

    def _open(self, path: str, *args: Any, **kwargs: Any) -> Any:
        """Its reads are explained, too: they pass by `_cat_file`."""
        file = super()._open(path, *args, **kwargs)
        if file.readable():
            file.cache.fetcher = _explaining(path, "get_object")(file.cache.fetcher)
        return file

    async def _cat_file_concurrent(
        self,
        bucket: str,
        key: str,
        content_length: int,
        chunksize: int,
        max_concurrency: int | None = None,
        version_id: str | None = None,
    ) -> bytes:
        parts = self._parts(f"{bucket}/{key}", content_length, chunksize, max_concurrency, version_id)
        return b"".join([part async for part in parts])

    async def _download_file_part_concurrent(
        self,
        bucket: str,
        key: str,
        lpath: str,
        content_length: int,
        chunksize: int,
        callback: Any = DEFAULT_CALLBACK,
        max_concurrency: int | None = None,
        version_id: str | None = None,
    ) -> None:
        with open(lpath, "wb") as file:
            async for part in self._parts(f"{bucket}/{key}", content_length, chunksize, max_concurrency, version_id):
                file.write(part)
                callback.relative_update(len(part))

    async def _parts(
        self, path: str, length: int, size: int, concurrency: int | None, version_id: str | None
    ) -> AsyncIterator[bytes]:
        """An object in order, some parts at a time; each anew where it breaks off: the inherited ones try once."""
        starts, step = range(0, length, size), concurrency or self.max_concurrency
        for first in range(0, len(starts), step):
            wanted = [
                self._cat_file(path, version_id=version_id, start=start, end=min(start + size, length))
                for start in starts[first : first + step]
            ]
            for part in await asyncio.gather(*wanted):
                yield part

    async def _expand_path(
        self,
        path: str | list[str],
        recursive: bool = False,
        maxdepth: int | None = None,
        assume_literal: bool = True,
    ) -> list[str]:
        """Names are names: `?`, `*` and `[` in one that is removed or fetched make no pattern of it."""
        paths = [path] if isinstance(path, str) else path
        return list(await super()._expand_path(paths, recursive, maxdepth, assume_literal=True))

    async def _bulk_delete(self, pathlist: list[str], **kwargs: Any) -> list[str]:
        """Remove up to a thousand objects; anew those that an answer says are still there, which s3fs passes over."""
        bucket = self.split_path(pathlist[0])[0]
        left = [self.split_path(path)[1] for path in pathlist]

        async def remove() -> None:
            request = {"Objects": [{"Key": key} for key in left], "Quiet": True}
            answer = await self._call_s3("delete_objects", kwargs, Bucket=bucket, Delete=request)
            errors = [error for error in answer.get("Errors", ()) if error.get("Code") != "NoSuchKey"]
            left[:] = [error["Key"] for error in errors]
            if errors:
                raise ClientError({"Error": errors[0]}, "DeleteObjects")

        try:
            await _error_wrapper(remove, retries=self.retries)
        except OSError:
            with _explaining(f"{bucket}/{left[0]}", "delete_objects"):
                raise
        return pathlist

    async def _mkdir(self, path: str, *args: Any, **kwargs: Any) -> None:
        """Nothing: a store has no folders, and a bucket is not ours to make."""

    mkdir = sync_wrapper(_mkdir)


def open_s3() -> S3:
    """The file system; a process has one.

    botocore's own retries are off: its standard mode gives up, whatever the number of attempts, after a hundred retries
    of all threads together without a success between them.
    """
    region = os.environ.get("AWS_REGION")  # botocore itself reads AWS_DEFAULT_REGION alone
    return S3(
        use_listings_cache=False,
        fixed_upload_size=True,  # Cloudflare's R2 wants it, nobody minds
        config_kwargs={
            "retries": {"mode": "standard", "total_max_attempts": 1},
            "connect_timeout": CONNECT_TIMEOUT_SECS,
            "read_timeout": READ_TIMEOUT_SECS,
            "max_pool_connections": MAX_CONNECTIONS,
        },
        client_kwargs={"region_name": region} if region else {},
    )


@contextmanager
def _explaining(place: str, method: str) -> Iterator[None]:
    """What a user can do something about becomes a `StoreError`; the rest stays what it is."""
    try:
        yield
    except StoreError:
        raise
    except (OSError, BotoCoreError, ValueError, *NO_ANSWER) as error:
        explained = _explained(error, method)
        if explained is None:
            raise
        raise StoreError(f"s3://{place}: {explained}") from error


def _response(error: BaseException) -> tuple[int, str]:
    """HTTP status and error code of a store's answer."""
    response = getattr(error, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status), str(response.get("Error", {}).get("Code", ""))


def _passes(error: BaseException) -> bool:
    """Whether an answer, or that there is none, may be another in a moment."""
    if isinstance(error, NO_ANSWER):
        return True
    status, code = _response(error)
    return (status >= 500 and status != 501) or status == 429 or code in PASSING_CODES


for name in ("botocore", "aiobotocore"):
    logging.getLogger(name).setLevel(logging.WARNING)  # every training worker would tell where it found its settings
set_custom_error_handler(_passes)  # s3fs asks it after every error of a request


def _explained(error: Exception, method: str) -> str | None:
    """What a user can do about an error; None for one that says something of the object, as that it is missing."""
    cause = error.__cause__ if isinstance(error.__cause__, ClientError) else error
    status, code = _response(cause)
    told = " ".join(str(error).split())
    if _passes(cause):
        return (
            f"the store does not answer, after {ATTEMPTS} attempts ({told}); check the network and "
            "AWS_ENDPOINT_URL_S3; the same command continues"
        )
    if code == "NoSuchBucket" and method in ("put_object", "create_multipart_upload"):
        return "there is no such bucket; create it, or correct the URL or AWS_ENDPOINT_URL_S3"
    if status in (301, 400) and code not in ("InvalidPart", "InvalidPartOrder", "EntityTooSmall"):
        return f"the store refuses the request ({told}); check AWS_REGION, AWS_ENDPOINT_URL_S3 and the credentials"
    if isinstance(error, PermissionError) and cause is not error:  # the store's, not that of a local file
        return f"access denied ({told}); use credentials that may do {method} there (AWS_PROFILE, keys or a role)"
    if isinstance(error, ParamValidationError):
        return f"no valid name ({told}); write s3://bucket/folder"
    if isinstance(error, BotoCoreError):
        return f"{told.rstrip('.')}; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a role"
    if isinstance(error, ValueError) and "endpoint" in told:
        return f"{told}; AWS_ENDPOINT_URL_S3 is a URL such as https://s3.example.org"
    return None
