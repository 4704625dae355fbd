"""Images of the data that is made: those that lie in files stay where they are."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

from PIL import Image

from diffalign.data.decoding import BadImageError, EncodedImage, format_of
from diffalign.data.skipping import UnusableRowError
from diffalign.files import write_atomically

_FOLDER = "images"


class ImageStore:
    """Names images so that rows in a folder can refer to them."""

    def __init__(self, folder: Path) -> None:
        """Args:
        folder: of the rows; names are relative to it.
        """
        self._folder = folder.absolute()

    def name(self, image: EncodedImage) -> str:
        """The name of an image of the questions; one that lies in a table gets a file of its own.

        Raises:
            ValueError: there is no image.
            UnusableRowError: it is none that can be read.
        """
        if image is None:
            raise ValueError("an image is missing, which its reader should have found")
        if isinstance(image, bytes):
            try:
                return self._written(image, format_of(image))
            except BadImageError as error:
                raise UnusableRowError(error.reason, error.detail) from error
        return Path(os.path.relpath(image.absolute(), self._folder)).as_posix()

    def save(self, image: Image.Image) -> str:
        """The name of a new image, which is written without loss."""
        stream = io.BytesIO()
        image.save(stream, "png")
        return self._written(stream.getvalue(), "png")

    def _written(self, content: bytes, suffix: str) -> str:
        """A file is named by what is in it, so that making it again changes nothing."""
        digest = hashlib.blake2b(content, digest_size=12).hexdigest()
        name = f"{_FOLDER}/{digest}.{suffix}"
        path = self._folder / name
        if not path.is_file():
            write_atomically(path, content)
        return name
