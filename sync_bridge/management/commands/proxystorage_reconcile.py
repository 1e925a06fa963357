"""Finish what crashed processes left."""

from __future__ import annotations

from typing import Any

from django.core.management.base import CommandParser

from aproxy_storage import StorageError
from aproxy_storage.tools.reconcile import reconcile

from ...storage import BridgeStorage
from ..base import StorageCommand, bridge_storages, known_storages


class Command(StorageCommand):
    """`aproxy_storage.tools.reconcile.reconcile` over the storages of the settings."""

    help = (
        "Finish what crashed processes left: undo half saves, end deletions, drop replaced bytes. Shows what would be "
        "done; --apply does it. Safe beside live callers."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("storage", nargs="*", help="alias in STORAGES or name in PROXY_STORAGE; default: all")
        parser.add_argument("--apply", action="store_true", help="do it")
        parser.add_argument("--scan", action="store_true", help="look for bytes without a record too")
        parser.add_argument("--min-age", type=float, default=86_400.0, help="seconds; a scan leaves younger bytes")
        parser.add_argument("--older-than", type=float, default=0.0, help="seconds since the lease ran out")
        parser.add_argument("--force", action="store_true", help="do not wait for leases; only if nothing else runs")
        parser.add_argument(
            "--restored", action="store_true", help="the records came out of a backup: as --force, but remove no bytes"
        )

    def handle(self, *, storage: list[str], apply: bool, **options: Any) -> None:
        chosen = list(bridge_storages(storage))
        # A scan must not take the files of another storage in the same directory, or around or below it, for orphans.
        known = known_storages() if options["scan"] else []
        for one in chosen:
            try:
                report = one.bridge.call(
                    reconcile,
                    one.proxy,
                    dry_run=not apply,
                    scan=options["scan"],
                    force=options["force"],
                    restored=options["restored"],
                    min_age=options["min_age"],
                    older_than=options["older_than"],
                    storages=known,
                )
            except StorageError as error:
                self.failed(one.proxy.name, error)
                continue
            for finding in report.findings:
                if finding.error is not None:
                    self.failed(f"{one.proxy.name}: {finding.path}", finding.error)
                elif options["verbosity"] > 1:
                    self.tell(f"{one.proxy.name}: {finding.action} {finding.path}")
            counts = ", ".join(f"{count} {action}" for action, count in sorted(report.counts.items()))
            self.tell(f"{one.proxy.name}: {counts or 'nothing is left over'}")
            if options["restored"]:
                continue  # that would remove bytes
            # Without a scan only where old bytes were in the way, which may have been what the URL led to until now.
            paths = None if options["scan"] else [finding.path for finding in report.findings]
            self._restore_keys(one, paths, apply, options["verbosity"])
        self.conclude("Done." if apply else "Nothing was changed; --apply does it.")

    def _restore_keys(self, storage: BridgeStorage, paths: list[str] | None, apply: bool, verbosity: int) -> None:
        try:
            found = storage.bridge.call(storage.restore_keys, paths, dry_run=not apply)
        except StorageError as error:
            self.failed(storage.proxy.name, error)
            return
        restored = [path for path, problem in found.items() if problem is None]
        for path, problem in found.items():
            if problem is not None:
                self.failed(f"{storage.proxy.name}: {path}", problem)
            elif verbosity > 1:
                self.tell(f"{storage.proxy.name}: own key for {path}")
        if restored:
            self.tell(f"{storage.proxy.name}: {len(restored)} with the key that their URL says")
