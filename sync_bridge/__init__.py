"""The synchronous Django side of `aproxy_storage`; the bridge itself is not written yet."""

__all__: list[str] = []
