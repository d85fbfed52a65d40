"""Where photos come from: folders, tars, ... Each kind is a `Source`; `list_source` makes one list of them."""

from fastssl.pipelines.convert.sources.base import MAX_FILE_BYTES, Found, Passed, Source, SourceError
from fastssl.pipelines.convert.sources.listing import Listing, list_source, open_source

__all__ = ["MAX_FILE_BYTES", "Found", "Listing", "Passed", "Source", "SourceError", "list_source", "open_source"]
