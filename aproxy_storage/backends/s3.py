"""Objects in a bucket of S3, or of a service that speaks its protocol (MinIO, Ceph, R2, SeaweedFS …)."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import weakref
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, Self

from ..content import Source
from ..errors import (
    AccessDenied,
    AlreadyExists,
    ConfigurationError,
    Conflict,
    InvalidPath,
    NotFound,
    NotSupported,
    StorageError,
)
from ..loops import PerLoop
from ..paths import MAX_PATH_BYTES, check_path, new_token
from ..records import ByteRange, Capabilities, ObjectInfo, UploadForm
from ..timeouts import Timeouts
from ._s3_client import Body, Connection, ConnectionOptions
from ._s3_errors import code_of, map_error
from ._s3_listing import Bucket, delete_objects, list_objects, unfinished_uploads
from ._s3_objects import TOKEN, ObjectParameters, described, every_request_of, info_of, parameters_of, size_of
from ._s3_reading import Download, DownloadReader, ParallelDownload, range_header
from ._s3_settings import configured_endpoint, from_django_storages, from_url, is_amazon
from ._s3_urls import CloudFrontKey, Links
from ._s3_writing import Target, Upload, abort, copy_parts, decide, is_taken, remove
from .base import Backend, Reader

__all__ = ["CloudFrontKey", "ObjectParameters", "S3Backend"]

_log = logging.getLogger(__name__)

#: Codes that say who may list uploads. Others deny because of credentials, or a clock, that somebody will set right.
_NEVER_LISTED = {"AccessDenied", "403"}
_YOUNG = 900.0  # seconds; an upload of somebody else's that began later than this may still be under way
_KEPT = 1000  # tokens of the latest writes of this process that failed

MIN_PART_BYTES = 5 << 20  # of a multipart upload, but its last: a rule of S3


class S3Backend(Backend):
    """Keeps objects in one bucket, or below a prefix of it.

    Args:
        bucket: its name, or the ARN of an access point. It has to exist.
        prefix: begins every key in the bucket, followed by a slash; keys of this backend are without it.
        session: of aioboto3 or aiobotocore, to make clients from, in one event loop only if its credentials are renewed
            (those of a role). By default one of aiobotocore with `profile` for each loop.
        client: a ready S3 client, borrowed: used in the loop that it belongs to, as it is configured, never closed.
        endpoint_url: of another service than AWS; by default that of the `client`, or of AWS_ENDPOINT_URL_S3 or
            AWS_ENDPOINT_URL.
        public_endpoint_url: the same service under the name that browsers know; URLs are signed for it.
        region: by default that of the environment.
        access_key, secret_key, session_token, profile: by default what the environment, the configuration file, or
            the role of the machine gives.
        addressing_style: ``"path"``, ``"virtual"`` or ``"auto"``.
        verify: False, or the file of certificates, for TLS.
        proxies: HTTP proxies by scheme, as botocore takes them.
        config: a botocore Config; what it sets wins.
        object_parameters: further parameters of PutObject: ``CacheControl``, ``ACL``, ``ServerSideEncryption``,
            ``StorageClass``, ``Tagging`` …; or a function that gives them for a key. ``RequestPayer`` and
            ``ExpectedBucketOwner``, where no function gives them, go with every request.
        custom_domain: the host, a CDN's mostly, of URLs.
        url_protocol: of URLs on `custom_domain`, ``"https:"`` by default.
        cloudfront: signs URLs on `custom_domain`.
        querystring_auth: False gives URLs without a signature, for what everybody may read.
        expires_in: seconds that signed URLs live unless the call says otherwise; 7 days at most, but for CloudFront.
        conditional_writes: the service honours ``If-None-Match: *``. Without it a write looks first, and of two
            simultaneous writers of one key both may believe that they have won.
        conditional_copies: the service honours it on CopyObject too, so that a copy of up to 256 MiB takes one request.
            By default on AWS only: elsewhere copies are multipart uploads, because a service that ignores it would
            overwrite.
        part_bytes, parts: content of this size and more goes in parts of `part_bytes`, `parts` of them in flight:
            the memory of one write is their product. There are 10,000 parts at most: larger ones where the size is
            declared or that of a file of the disk.
        multipart_bytes: from which size on content goes in parts; `part_bytes` by default, and never more.
        parallel_reads: ranges of `part_bytes` that a read of a large object fetches at a time; 1 is one stream.
        pool_size: connections at a time, per event loop, unless `config` says ``max_pool_connections``; a borrowed
            `client` may have fewer. `pool_timeout`: seconds to wait for a free one.
        connect_timeout: seconds.
        checksums: ``"when_supported"``: each upload carries a CRC, each download of a whole object in one stream is
            checked where the service tells one; ``"when_required"`` only where S3 insists. By default the first on
            AWS, the second elsewhere.
        sign_payload: sign the content too. It costs as much CPU as the rest, and helps on plain ``http:`` only.
        flat_listings: the service lists in the byte order of keys, as S3 does. Without it listings go directory by
            directory, with a request for each: for those that have directories underneath, such as SeaweedFS.
        max_segment_bytes: what the service allows for one part of a key; S3 itself has no such limit.
        timeouts: see `Timeouts`.

    One client per event loop, made on first use, released by `aclose`. Objects carry the token of their write as
    metadata. A read is one GET, a write of less than `multipart_bytes` one PUT, `discard` one DELETE; only with a
    token, after a broken write, `discard` looks for unfinished uploads of the key too, and aborts them.
    """

    capabilities = Capabilities(
        conditional_create=True,
        range_read=True,
        list=True,
        url=True,
        modified_time=True,
        server_copy=True,
        metadata=True,
        content_type=True,
        tokens=True,
        upload_form=True,
    )

    def __init__(
        self,
        bucket: str,
        *,
        prefix: str = "",
        session: Any = None,
        client: Any = None,
        endpoint_url: str | None = None,
        public_endpoint_url: str | None = None,
        region: str | None = None,
        access_key: str | None = None,
        secret_key: str | None = None,
        session_token: str | None = None,
        profile: str | None = None,
        addressing_style: Literal["auto", "path", "virtual"] | None = None,
        verify: bool | str | None = None,
        proxies: Mapping[str, str] | None = None,
        config: Any = None,
        object_parameters: ObjectParameters | None = None,
        custom_domain: str | None = None,
        url_protocol: str | None = None,
        cloudfront: CloudFrontKey | None = None,
        querystring_auth: bool = True,
        expires_in: float = 3600.0,
        conditional_writes: bool = True,
        conditional_copies: bool | None = None,
        part_bytes: int = 8 << 20,
        parts: int = 4,
        multipart_bytes: int | None = None,
        parallel_reads: int = 1,
        pool_size: int = 64,
        pool_timeout: float | None = 20.0,
        connect_timeout: float = 10.0,
        checksums: Literal["when_required", "when_supported"] | None = None,
        sign_payload: bool = False,
        flat_listings: bool = True,
        max_segment_bytes: int | None = None,
        timeouts: Timeouts | None = None,
    ) -> None:
        if not bucket or ("/" in bucket and not bucket.startswith("arn:")):
            raise ConfigurationError(f"bucket={bucket!r}: the name of a bucket; what follows it is prefix=")
        if (access_key is None) != (secret_key is None):
            raise ConfigurationError("access_key and secret_key belong together: give both, or none")
        if client is not None and (session is not None or public_endpoint_url is not None):
            raise ConfigurationError("a client is used as it is: give a session instead, or nothing beside the client")
        if part_bytes < MIN_PART_BYTES or parts < 1 or parallel_reads < 1 or pool_size < 1:
            raise ConfigurationError(
                f"part_bytes must be at least {MIN_PART_BYTES}, parts, parallel_reads and pool_size at least 1"
            )
        multipart_bytes = part_bytes if multipart_bytes is None else multipart_bytes
        if not 0 < multipart_bytes <= part_bytes:
            raise ConfigurationError("multipart_bytes must be positive, and part_bytes at most")
        if cloudfront is not None and custom_domain is None:
            raise ConfigurationError("CloudFront signs URLs on custom_domain=, which is missing")
        if conditional_copies and not conditional_writes:
            raise ConfigurationError(
                "conditional_copies=True says that the service refuses to overwrite, conditional_writes=False that it "
                "does not: give one of them"
            )
        endpoint_url = configured_endpoint(endpoint_url, client)
        if addressing_style is None and endpoint_url is None and "." not in bucket:
            # By default botocore signs for the global host, which sends new buckets elsewhere, with a broken signature.
            addressing_style = "virtual"
        self.bucket = bucket
        self.endpoint = endpoint_url
        self.prefix = f"{check_path(prefix.strip('/'))}/" if prefix.strip("/") else ""
        super().__init__(timeouts=timeouts)
        self.capabilities = replace(
            self.capabilities,
            conditional_create=conditional_writes,
            max_key_bytes=MAX_PATH_BYTES - len(self.prefix.encode()),
            max_segment_bytes=max_segment_bytes,
        )
        self._options = ConnectionOptions(
            session=session,
            client=client,
            endpoint_url=endpoint_url,
            public_endpoint_url=public_endpoint_url,
            region=region,
            access_key=access_key,
            secret_key=secret_key,
            session_token=session_token,
            profile=profile,
            addressing_style=addressing_style,
            verify=verify,
            proxies=proxies,
            pool_size=pool_size,
            pool_timeout=pool_timeout,
            connect_timeout=connect_timeout,
            idle=self.timeouts.idle,
            checksums=checksums,
            sign_payload=sign_payload,
            config=config,
            every_request=every_request_of(object_parameters),
        )
        self._object_parameters = object_parameters or {}
        self._links = Links(
            bucket,
            domain=custom_domain,
            protocol=(url_protocol or "https:").removesuffix("//"),
            cloudfront=cloudfront,
            signed=querystring_auth,
            expires_in=expires_in,
        )
        self._conditional_copies = (
            is_amazon(endpoint_url) and conditional_writes if conditional_copies is None else conditional_copies
        )
        self._part_bytes = part_bytes
        self._parts = parts
        self._multipart_bytes = multipart_bytes
        self._parallel_reads = parallel_reads
        self._range_bytes = part_bytes
        self._flat_listings = flat_listings
        self._copy_part_bytes = 256 << 20
        self._connections: PerLoop[Connection] = PerLoop(self._connect)
        self._lent_to: weakref.ref[asyncio.AbstractEventLoop] | None = None  # the loop of a borrowed client
        self._uploads: dict[str, str] = {}  # unfinished ones of this process -> token
        self._failed: deque[str] = deque(maxlen=_KEPT)  # tokens of writes of this process
        self._may_list_uploads = True

    @classmethod
    def from_url(cls, url: str) -> Self:
        """Make one of ``s3://bucket/prefix?endpoint_url=https://host:port&region=…``.

        The parameters are the simple arguments of the class; ``s3://KEY:SECRET@bucket`` gives credentials, those of the
        environment are better.
        """
        return cls(**from_url(url))

    @classmethod
    def from_settings(cls, settings: Any, prefix: str = "AWS_", **options: Any) -> Self:
        """Make one of the settings of django-storages, with `options` on top.

        `settings` is ``django.conf.settings``, or a mapping. Another `prefix`, such as ``AWS_PRIVATE_``, is for a
        second bucket; credentials, region and protocol then come from ``AWS_`` unless they have that prefix.

        Raises:
            ConfigurationError: no bucket is named, or a setting asks for what there is not here.
        """
        return cls(**{**from_django_storages(settings, prefix), **options})

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.bucket + '/' + self.prefix.rstrip('/') if self.prefix else self.bucket!r})"

    def full_path(self, key: str) -> str:
        return f"s3://{self.bucket}/{self.prefix}{key}"

    # -- writing

    async def _write(
        self,
        key: str,
        source: Source,
        *,
        content_type: str | None,
        metadata: Mapping[str, str],
        token: str | None,
        durable: bool,
    ) -> ObjectInfo:
        # Always a token, so that an object without one cannot be taken for one whose writer is unknown.
        token = token or new_token()
        params = parameters_of(self._object_parameters, key, content_type, metadata, token)
        upload = Upload(
            self._target(f"write {key!r} in {self}", key, token, params),
            source,
            part_bytes=self._part_bytes,
            parts=self._parts,
            multipart_bytes=self._multipart_bytes,
        )
        with self._noting_failure(token):
            size, etag = await upload.run()
        return ObjectInfo(
            key, size=size, etag=etag, content_type=params.get("ContentType"), metadata=dict(metadata), token=token
        )

    def _target(self, what: str, key: str, token: str, params: Mapping[str, Any]) -> Target:
        return Target(
            connection=self._connections.get(),
            cleanup=self.cleanup,
            uploads=self._uploads,
            bucket=self.bucket,
            key=self.prefix + key,
            what=what,
            token=token,
            params=params,
            conditional=self.capabilities.conditional_create,
            undo_within=self.timeouts.cleanup,
        )

    async def _copy(
        self, key: str, new_key: str, *, token: str | None, durable: bool, content_type: str | None = None
    ) -> ObjectInfo:
        what = f"copy {key!r} to {new_key!r} in {self}"
        source = self._at(key, what)
        connection = self._connections.get()
        found = await connection.head(what, **source)
        if content_type is not None:
            found = {**found, "ContentType": content_type}
        token = token or new_token()
        params = described(found, parameters_of(self._object_parameters, new_key, None, {}, token))
        target = self._target(what, new_key, token, params)
        try:
            with self._noting_failure(token):
                answer = await self._copied(target, source, size_of(found, what), found["ETag"])
        except AlreadyExists as error:
            # The same answer says that the original is not the one any more that we have looked at.
            if not await is_taken(target):
                raise Conflict(f"could not {what}: the original was replaced meanwhile") from error.__cause__
            raise
        return replace(info_of(new_key, found), etag=answer.get("ETag"), token=token, modified_at=None, changed_at=None)

    async def _copied(self, target: Target, source: Mapping[str, Any], size: int, etag: str) -> Any:
        if not size:  # of nothing no part can be made
            return await decide(target, "put_object", body=Body())
        if size <= self._copy_part_bytes and self._conditional_copies:
            directives: dict[str, Any] = {"MetadataDirective": "REPLACE"}
            if "Tagging" in target.params:
                directives["TaggingDirective"] = "REPLACE"  # else the original's are taken
            answer = await decide(target, "copy_object", CopySource=source, CopySourceIfMatch=etag, **directives)
            return answer.get("CopyObjectResult", answer)
        return await copy_parts(target, size, source, etag, part_bytes=self._copy_part_bytes, parts=self._parts)

    @contextlib.contextmanager
    def _noting_failure(self, token: str) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._failed.append(token)
            raise

    # -- reading

    async def _read(self, key: str, byte_range: ByteRange | None, chunk_bytes: int) -> Reader:
        what = f"read {key!r} in {self}"
        target = self._at(key, what)
        connection = self._connections.get()
        if byte_range == ByteRange():
            byte_range = None
        if byte_range is not None and range_header(byte_range) is None:
            return Reader(await self._stat(key))
        download = Download(connection, what, target)
        wanted = byte_range
        if byte_range is None and self._parallel_reads > 1:
            byte_range = ByteRange(0, self._range_bytes)
        try:
            await download.open(byte_range)
        except StorageError as error:
            if code_of(error) not in ("InvalidRange", "416"):
                raise
            return Reader(await self._stat(key))  # the object ends before the range begins
        info = info_of(key, download.answer, size=download.size)
        try:
            if byte_range is not wanted and download.stop < download.size:
                parallel = ParallelDownload(
                    download, download.size, self._range_bytes, self._parallel_reads, self.cleanup
                )
                return Reader(info, parallel.chunks(chunk_bytes))
            if download.stop - download.start <= chunk_bytes:
                return Reader(info, data=b"".join(await download.rest(chunk_bytes)))
        except BaseException:
            download.close()
            raise
        return DownloadReader(info, download, chunk_bytes)

    async def _stat(self, key: str) -> ObjectInfo:
        what = f"stat {key!r} in {self}"
        connection = self._connections.get()
        try:
            return info_of(key, await connection.head(what, **self._at(key, what)))
        except NotFound:
            if not connection.bucket_seen:
                # Asked in this way S3 does not say whether it is the object or the bucket that is not there.
                await connection.check_bucket(what, self.bucket)
            raise

    def _at(self, key: str, what: str) -> dict[str, Any]:
        """Return the parameters that name an object, whatever its key; NotFound for one that no request can name."""
        if not self._can_be_object(key):
            raise NotFound(f"could not {what}: there can be no such object")
        return {"Bucket": self.bucket, "Key": self.prefix + key}

    def _can_be_object(self, key: str) -> bool:
        too_long = len((self.prefix + key).encode(errors="surrogatepass")) > MAX_PATH_BYTES
        return bool(key) and not too_long and self._can_be(key, key.split("/"))

    def _can_be(self, text: str, parts: Iterable[str]) -> bool:
        """Return whether a request can name a key of these parts and mean it."""
        # Dots are resolved on the way, however they are written. S3 itself knows keys with empty parts, others take
        # "a//b" for "a/b".
        folded = {".", ".."} if self._options.endpoint_url is None else {".", "..", ""}
        return "\0" not in text and folded.isdisjoint(parts) and _is_utf8(text)

    # -- removing

    async def _discard(self, key: str, *, token: str | None) -> None:
        what = f"discard {key!r} in {self}"
        try:
            target = self._target(what, key, token or "", {})
            at = self._at(key, what)
        except NotFound:
            return
        if token is None:
            with contextlib.suppress(NotFound):  # as Google Cloud Storage answers
                await target.connection.call("delete_object", what, **at)
            return
        # A write that was broken. Its uploads first: one that is completed meanwhile is seen as an object.
        await self._abort_uploads(target)
        await remove(target, token)

    async def _abort_uploads(self, target: Target) -> None:
        """End the unfinished uploads of the key; not those of another write of this process, and after a failed write
        of this process not those that another process may just be making."""
        if not self._may_list_uploads:
            return
        try:
            found = await unfinished_uploads(target.connection, target.what, self.bucket, target.key)
        except (AccessDenied, NotSupported) as error:
            if isinstance(error, AccessDenied) and code_of(error) not in _NEVER_LISTED:
                raise
            self._may_list_uploads = False
            _log.warning(
                "%s cannot find unfinished uploads of processes that died: give it s3:ListBucketMultipartUploads, or "
                "let a lifecycle rule of the bucket abort them (%s)",
                self, error,
            )  # fmt: skip
            return
        # Whose write an upload is, the service does not tell. All that this process has begun it knows, but for one
        # whose answer was lost: that is aborted when the journal comes again, after `settle`.
        ours = target.token in self._failed
        for upload_id, age in found:
            known = self._uploads.get(upload_id)
            if known == target.token or (known is None and not (ours and age < _YOUNG)):
                await abort(target, upload_id)

    async def delete_many(self, keys: Iterable[str]) -> dict[str, StorageError | None]:
        """Remove objects, up to 1000 with one request; return for each key None, or the error that kept it.

        One that is not there is fine. Unfinished uploads of these keys stay; see `discard`.

        Where the service removes objects only one by one, so does this, eight at a time.

        Raises:
            AccessDenied, BackendUnavailable, DeadlineExceeded; objects may have been removed.
        """
        results: dict[str, StorageError | None] = dict.fromkeys(keys)
        possible = [key for key in results if self._can_be_object(key)]
        what = f"delete objects in {self}"
        try:
            results |= await delete_objects(self._connections.get(), what, self.bucket, self.prefix, possible)
        except StorageError as error:
            error.located(operation="delete_many", path=None, backend=str(self))
            raise
        for key, failure in results.items():
            if failure is not None:
                failure.located(operation="delete_many", path=key, backend=str(self))
        return results

    # -- listing

    def _list(self, prefix: str, *, after: str | None, delimiter: str | None) -> AsyncIterator[ObjectInfo]:
        if not self._can_be(f"{prefix}{after or ''}", prefix.split("/")[:-1]):
            return _nothing()
        bucket = Bucket(self._connections.get, f"list {prefix!r} in {self}", self.bucket, self.prefix)
        return list_objects(bucket, prefix, after=after, delimiter=delimiter, flat=self._flat_listings)

    # -- URLs

    async def _url(
        self,
        key: str,
        *,
        expires_in: float | None,
        method: str = "GET",
        download_name: str | None = None,
        response_headers: Mapping[str, str] | None = None,
        content_type: str | None = None,
        **options: Any,
    ) -> str:
        """See `Backend.url`; further options:

        Args:
            method: ``"GET"``, ``"HEAD"``, ``"PUT"`` or ``"DELETE"``.
            download_name: a browser saves the file under this name.
            response_headers: other headers of the answer: Cache-Control, Content-Type …
            content_type: of a PUT; the uploader has to send exactly this one.
        """
        if options:
            raise NotSupported(f"{self} knows no {sorted(options)} for a URL")
        full_key = self._at(key, f"make a URL of {key!r} in {self}")["Key"]
        return await self._links.url(
            self._connections.get,
            full_key,
            method=method,
            expires_in=expires_in,
            headers=response_headers or {},
            download_name=download_name,
            content_type=content_type,
        )

    async def _upload_form(
        self, key: str, *, token: str, expires_in: float, max_bytes: int, content_type: str | None
    ) -> UploadForm:
        if "${filename}" in self.prefix + key:
            # The service puts in what the browser says, and the policy would allow every key that begins so.
            raise InvalidPath(f"no form can be made for {key!r}: S3 has a meaning of its own for ${{filename}}")
        fields = {f"x-amz-meta-{TOKEN}": token}
        if content_type is not None:
            fields["Content-Type"] = content_type
        return await self._links.form(
            self._connections.get, self.prefix + key, fields, expires_in=expires_in, max_bytes=max_bytes
        )

    # -- life

    def _connect(self) -> Connection:
        if self._options.client is not None:
            loop = asyncio.get_running_loop()
            owner = self._lent_to() if self._lent_to is not None else None
            if owner is not None and owner is not loop and not owner.is_closed():
                raise ConfigurationError(f"the client of {self} belongs to another event loop; pass a session instead")
            self._lent_to = weakref.ref(loop)
        return Connection(self._options)

    async def _aclose(self) -> None:
        connection = self._connections.pop()
        if connection is not None:
            await connection.aclose()

    def _map_error(self, error: Exception, what: str) -> StorageError:
        return map_error(error, what)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


async def _nothing() -> AsyncIterator[ObjectInfo]:
    nothing: tuple[ObjectInfo, ...] = ()
    for info in nothing:
        yield info
