"""Why an image has no verdict: every error code, what it means, and whether trying again makes sense."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Code:
    meaning: str
    may_pass: bool = False
    """The same object may be judged another time: ``--retry-errors`` takes it up."""
    outage: bool = False
    """Says more about the store or the workers than about the image: see ``--max-outage``."""


CODES = {
    "fetch_not_found": Code("The object was gone when it was to be fetched."),
    "fetch_denied": Code("The storage refused access to the object.", may_pass=True, outage=True),
    "fetch_throttled": Code("The storage asked for fewer requests until the deadline.", may_pass=True, outage=True),
    "fetch_timeout": Code("The storage gave no whole answer before the deadline.", may_pass=True, outage=True),
    "fetch_failed": Code("The object could not be fetched before the deadline.", may_pass=True, outage=True),
    "fetch_short": Code("Fewer or more bytes came than were listed.", may_pass=True, outage=True),
    "fetch_corrupt": Code("The bytes that came are not those of the object's checksum.", may_pass=True, outage=True),
    "fetch_changed": Code("The object was replaced after it had been listed.", may_pass=True),
    "too_large": Code("The object has more bytes than the plan allows (max_megabytes)."),
    "empty": Code("The object has no bytes."),
    "not_an_image": Code("The content is of none of the formats that are decoded, whatever the name says."),
    "too_many_pixels": Code("The picture has more pixels than the plan allows (max_megapixels)."),
    "too_many_frames": Code("The animation or document has more frames than the plan allows (max_frames)."),
    "truncated": Code("The file ends before the picture does."),
    "decode_failed": Code("The file is damaged, or of a variant that the decoder does not know."),
    "decode_memory": Code("Decoding needed more memory than the plan allows (decode_gigabytes).", may_pass=True),
    "decode_timeout": Code(
        "Decoding took longer than the plan allows (decode_seconds); the decoder was killed.", may_pass=True
    ),
    "decode_crash": Code("The decoder died on the file.", may_pass=True, outage=True),
    "score_not_finite": Code("A net gave a score that is no number, for the image or for its group."),
}

MAY_PASS = tuple(name for name, code in CODES.items() if code.may_pass)
OUTAGE = tuple(name for name, code in CODES.items() if code.outage)
