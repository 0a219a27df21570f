"""Removes an object's rows from everything that complete runs keep: ``python -m jobs.erase --output OUT --uri URI``."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console

from jobs.cli import run_job
from pipeline.errors import UsageError
from pipeline.output.opening import open_output
from pipeline.storage import check_endpoint, storage_errors_as_failure, storage_errors_as_usage
from pipeline.tables.erase import Rewritten, Subject, erase


@dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Removes an object's rows from the tables, manifests, records and reports of all complete runs.

    Nothing is removed while an unfinished run lists the object. The report of a run that is rewritten loses its
    thumbnails. A bucket with versioning keeps what was overwritten until its life-cycle rule removes it.
    """

    output: str
    """The output of the scans: an s3:// prefix or a folder."""
    endpoint_url: str | None = None
    """Address of an S3-compatible server; without it AWS is meant."""
    image_id: tuple[str, ...] = ()
    """Versions of objects, as the tables name them."""
    uri: tuple[str, ...] = ()
    """Objects in all their versions, as the ledger's source_uri names them."""
    kms_key: str | None = None
    """Key in AWS KMS (id or ARN) that encrypts what is rewritten. Default: as the bucket is set up."""
    dry_run: bool = False
    """Only say what would be rewritten."""

    def __post_init__(self) -> None:
        check_endpoint(self.endpoint_url)
        if not (self.image_id or self.uri):
            raise UsageError("name what to erase with --image-id or --uri")


def run(config: JobConfig) -> None:
    console = Console(soft_wrap=True, highlight=False)
    with storage_errors_as_usage():
        store = open_output(config.output, config.endpoint_url, kms_key=config.kms_key)
    with storage_errors_as_failure():
        rewritten = erase(store, Subject(image_ids=config.image_id, uris=config.uri), dry_run=config.dry_run)
    for file in rewritten:
        console.print(_line(file), markup=False)
    if not rewritten:
        console.print("no complete run holds it")
    elif config.dry_run:
        console.print("this was a dry run: nothing was rewritten")


def _line(file: Rewritten) -> str:
    done = [f"{file.rows} rows removed"] if file.rows else []
    if file.deleted:
        done.append("deleted")
    return f"{file.path}: {', '.join(done) or 'made again'}"


if __name__ == "__main__":
    run_job("jobs.erase", JobConfig, run)
