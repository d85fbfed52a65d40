"""Where photos come from: folders, tars, ... Each kind is a `Source`; `list_source` makes one list of them."""

from fastssl.pipelines.convert.sources.base import MAX_FILE_BYTES, Found, Passed, Source, SourceError
from fastssl.pipelines.convert.sources.classes import ListingRules
from fastssl.pipelines.convert.sources.listing import Listing, list_source, list_splits, open_source

__all__ = [
    "MAX_FILE_BYTES",
    "Found",
    "Listing",
    "ListingRules",
    "Passed",
    "Source",
    "SourceError",
    "list_source",
    "list_splits",
    "open_source",
]
