"""Publishes complete runs to Iceberg tables: ``python -m jobs.iceberg --output OUT --catalog NAME --namespace NS``."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from jobs.cli import run_job
from pipeline.errors import UsageError
from pipeline.output.opening import open_output
from pipeline.storage import check_endpoint, storage_errors_as_failure, storage_errors_as_usage


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Publishes complete runs as snapshots of the Iceberg tables ledger, flagged, errors and audit.

    Each run once, however often this is called. The catalog is described where pyiceberg looks for it: .pyiceberg.yaml
    or the environment. Exit codes: 0 all runs are published, 1 failed, 2 wrong usage or catalog.
    """

    output: str
    """The output of the scans: an s3:// prefix or a folder."""
    catalog: str
    """Name of the catalog."""
    namespace: str
    """Where the tables are in the catalog; it is made when it is not there."""
    run_id: tuple[str, ...] = ()
    """Complete runs to publish. Default: all of them."""
    endpoint_url: str | None = None
    """Address of an S3-compatible server for the output; without it AWS is meant."""

    def __post_init__(self) -> None:
        check_endpoint(self.endpoint_url)


def run(config: JobConfig) -> None:
    try:
        from pipeline.tables.iceberg import open_catalog, publish  # noqa: PLC0415  pyiceberg is an extra
    except ModuleNotFoundError as error:
        raise UsageError(
            f"Iceberg tables need the extra 'iceberg' ({error.name} is missing): pip install 'dorfman[iceberg]'"
        ) from error
    console = Console(soft_wrap=True, highlight=False)
    with storage_errors_as_usage():
        store = open_output(config.output, config.endpoint_url)
        catalog = open_catalog(config.catalog, config.namespace)
    with storage_errors_as_failure():
        for done in publish(store, config.run_id, catalog, config.namespace):
            rows = ", ".join(f"{count:,} of {table}" for table, count in done.rows.items())
            console.print(f"run {done.run_id}: {f'{rows} published' if rows else 'was published'}", markup=False)


if __name__ == "__main__":
    run_job("jobs.iceberg", JobConfig, run)
