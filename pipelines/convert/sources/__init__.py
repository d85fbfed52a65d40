"""Where photos come from: folders, archives, tables, lists. Each kind is a `Source`; `list_source` makes one list of
them, `list_splits` one for each split.
"""

from fastssl.pipelines.convert.sources.base import MAX_FILE_BYTES, SourceError
from fastssl.pipelines.convert.sources.classes import ListingRules
from fastssl.pipelines.convert.sources.kinds import SOURCE_ENDINGS, is_source
from fastssl.pipelines.convert.sources.listing import Listing, list_source, list_splits

__all__ = [
    "MAX_FILE_BYTES",
    "SOURCE_ENDINGS",
    "Listing",
    "ListingRules",
    "SourceError",
    "is_source",
    "list_source",
    "list_splits",
]
