"""Whether a shard's tables add up before it is committed: nothing unlisted, nothing twice, nothing uncounted."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.codes import OUTAGE
from pipeline.errors import RunError
from pipeline.listing.manifest import Shard
from pipeline.output.tally import Tally


def reconcile(shard: Shard, listed: pa.ChunkedArray, tables: dict[str, pa.Table], tally: Tally) -> None:
    """Rows = distinct ids = manifest rows, the very same ids; the other tables hold what the ledger says.

    ``listed``: the manifest's image ids. Adds what is in the tables to ``tally``. Raises RunError.
    """
    ledger = tables["ledger"]
    # A listing names no id twice, so equal columns say all of it; a hash of every id would take most of the memory.
    if not ledger["image_id"].equals(listed):
        distinct = pc.count_distinct(ledger["image_id"]).as_py()
        if not ledger.num_rows == distinct == len(listed):
            raise RunError(
                f"shard {shard.index} does not add up: {len(listed)} images listed, "
                f"{ledger.num_rows} ledger rows, {distinct} distinct ids"
            )
        raise RunError(
            f"shard {shard.index}: the ledger holds images that the manifest does not list, or in another order"
        )
    tally.add_outcomes(_value_counts(ledger["outcome"]))
    tally.add_errors(_value_counts(ledger["error_code"].drop_null()))
    tally.add_skips(_value_counts(ledger["skip_reason"].drop_null()))
    tally.add_taken(_taken(ledger, tables["flagged"]))
    tally.add_categories(_by_nets(tables["flagged"]))
    assert tally.listed == shard.images
    for outcome, name in (("flagged", "flagged"), ("error", "errors")):
        decided = ledger.filter(pc.equal(ledger["outcome"], outcome))["image_id"]
        found = pc.unique(tables[name]["image_id"])
        if len(found) != len(decided) or not pc.all(pc.is_in(found, decided), min_count=0).as_py():
            raise RunError(
                f"shard {shard.index}: the ledger counts {len(decided)} images as {outcome}, table {name} holds "
                f"{len(found)}, or others"
            )
    audited = ledger.filter(pc.is_in(ledger["image_id"], pc.unique(tables["audit"]["image_id"])))
    cleared = audited.filter(pc.equal(audited["outcome"], "cleared"))["image_id"]
    if not pc.all(pc.is_in(tables["audit"]["image_id"], cleared), min_count=0).as_py():
        raise RunError(f"shard {shard.index}: table audit holds images that the ledger does not count as cleared")
    for name, key in (("flagged", ["image_id", "category"]), ("errors", ["image_id"]), ("audit", ["image_id"])):
        if tables[name].group_by(key).aggregate([]).num_rows != tables[name].num_rows:
            raise RunError(f"shard {shard.index}: table {name} holds rows twice")


def check_outage(shard: Shard, tally: Tally, most: float) -> None:
    """A store or a decoder that is down must not end as a complete run full of errors. Raises RunError."""
    failed = {code: tally.errors[code] for code in OUTAGE if code in tally.errors}
    if sum(failed.values()) > most * shard.images:
        counts = ", ".join(f"{images} {code}" for code, images in failed.items())
        raise RunError(
            f"shard {shard.index}: {counts} of {shard.images} images, over the limit of {most:g}; "
            "mend the store or the workers, or raise --max-outage"
        )


def _taken(ledger: pa.Table, flagged: pa.Table) -> dict[str, int]:
    """Images that were flagged without a test: because of their content, and by the bank that they match."""
    content = pc.and_(pc.equal(ledger["outcome"], "flagged"), pc.is_valid(ledger["judged_run_id"]))
    own = pc.and_(pc.is_valid(flagged["match_bank"]), pc.is_null(flagged["judged_run_id"]))
    matched = flagged.filter(own).group_by(["image_id", "match_bank"]).aggregate([])
    counts = {f"match {bank}": images for bank, images in _value_counts(matched["match_bank"]).items()}
    known = pc.sum(content).as_py() or 0
    return counts | ({"known content": known} if known else {})


def _by_nets(flagged: pa.Table) -> dict[str, int]:
    """Images by category in which nets flagged them, and neither a bank nor a run before."""
    own = flagged.filter(pc.and_(pc.is_null(flagged["match_bank"]), pc.is_null(flagged["judged_run_id"])))
    return _value_counts(own["category"])


def _value_counts(column: pa.ChunkedArray) -> dict[str, int]:
    return {entry["values"]: entry["counts"] for entry in pc.value_counts(column).to_pylist()}
