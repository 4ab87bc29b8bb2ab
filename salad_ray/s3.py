"""S3 and what speaks its protocol: s3fs, with patience, and with errors that say what to do.

Endpoint, region, profile and keys are those of the AWS variables and files (`AWS_ENDPOINT_URL_S3`, `AWS_REGION`,
`AWS_PROFILE`, …) or of the machine's role.
"""

from __future__ import annotations

import logging
import os
from hashlib import md5
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, ParamValidationError
from botocore.exceptions import ConnectionError as NoConnection
from fsspec.asyn import sync_wrapper
from s3fs import S3FileSystem
from s3fs.core import _error_wrapper, set_custom_error_handler

from salad_ray.store import StoreError

ATTEMPTS = 14
"""Of every request: s3fs waits 0.1 · 1.7^i s after the i-th, at most 15 s, so a minute and a half in all."""
PART_BYTES = 16 * 2**20
"""Of a multipart upload, which may have 10,000 parts: objects of up to 160 GB. What is smaller is one request."""
READ_TIMEOUT_SECS = 60


class S3(S3FileSystem):
    """s3fs, every request of which ends in its answer, in a missing file or in a `StoreError`."""

    retries = ATTEMPTS
    default_block_size = PART_BYTES

    async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
        try:
            return await super()._call_s3(method, *args, **kwargs)
        except (OSError, BotoCoreError, ValueError) as error:
            if method == "complete_multipart_upload" and isinstance(error, FileNotFoundError):
                return await self._completed_before(error, **kwargs)
            explained = _explained(error, method)
            if explained is None:
                raise
            place = "/".join(filter(None, (kwargs.get("Bucket"), kwargs.get("Key") or kwargs.get("Prefix"))))
            raise StoreError(f"s3://{place}: {explained}") from error

    call_s3 = sync_wrapper(_call_s3)  # the inherited one would call the inherited other

    async def _completed_before(self, error: Exception, Bucket: str, Key: str, **kwargs: Any) -> Any:
        """An upload that is gone when it is to be completed may have been, and only the answer was lost."""
        etags = [part["ETag"].strip('"') for part in kwargs["MultipartUpload"]["Parts"]]
        expected = f"{md5(b''.join(map(bytes.fromhex, etags)), usedforsecurity=False).hexdigest()}-{len(etags)}"
        found = await self._call_s3("head_object", Bucket=Bucket, Key=Key)
        if found["ETag"].strip('"') != expected:
            raise error
        return found

    async def _download_file_part_concurrent(self, *args: Any, **kwargs: Any) -> None:
        """Anew where an answer breaks off: the inherited one has no second try."""
        await _error_wrapper(super()._download_file_part_concurrent, args=args, kwargs=kwargs, retries=self.retries)

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
            "read_timeout": READ_TIMEOUT_SECS,
        },
        client_kwargs={"region_name": region} if region else {},
    )


def _response(error: BaseException) -> tuple[int, str]:
    """HTTP status and error code of a store's answer."""
    response = getattr(error, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return int(status), str(response.get("Error", {}).get("Code", ""))


def _passes(error: BaseException) -> bool:
    """Whether an answer, or that there is none, may be another in a moment."""
    if isinstance(error, (NoConnection, HTTPClientError)):
        return True
    status, code = _response(error)
    return (status >= 500 and status != 501) or status == 429 or code in ("RequestTimeout", "InternalError", "SlowDown")


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
    if isinstance(error, PermissionError):
        return f"access denied ({told}); use credentials that may do {method} there (AWS_PROFILE, keys or a role)"
    if isinstance(error, ParamValidationError):
        return f"no valid name ({told}); write s3://bucket/folder"
    if isinstance(error, BotoCoreError):
        return f"{told.rstrip('.')}; set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or use a role"
    if isinstance(error, ValueError) and "endpoint" in told:
        return f"{told}; AWS_ENDPOINT_URL_S3 is a URL such as https://s3.example.org"
    return None
