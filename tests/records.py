"""Files that hold a record, as the command writes them."""

from __future__ import annotations

from PIL.PngImagePlugin import PngInfo

from fewstep.cli.record import Record, parameters
from fewstep.metadata import png_info


def png_text(record: Record) -> PngInfo:
    """The text chunks of a PNG file."""
    return png_info(record.to_dict(), parameters(record))
