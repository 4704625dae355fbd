"""A scorer behind an HTTP address, in another process, environment or machine.

A request is `POST ADDRESS` with a JSON object of two lists of equal length, and the reply one with
a list of as many numbers:

    {"images": ["iVBORw0KGgo...", ...], "prompts": ["a cat", ...]}   ->   {"scores": [0.7, ...]}

An image is the base64 of its PNG file. `fields` has other names for the three, so that servers of
other projects are asked as they are; docs/evaluate-images.md has the settings for those of
X-GenGroup/Flow-Factory and of verl-project/verl-omni.
"""

from __future__ import annotations

import base64
import io
import json
import math
import pickle
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Literal

import torch
from PIL import Image
from torch import Tensor

from diffalign import keys
from diffalign.config import MAY_CHANGE
from diffalign.endpoints import (
    OF_ITEMS,
    Connection,
    RequestRefusedError,
    announce,
    key_hint,
    post,
)
from diffalign.errors import ConfigError, DataError, EndpointError
from diffalign.parsing import parse_json, shortly
from diffalign.ranges import AtLeast
from diffalign.scorers.images import AbstractImageScorer

_BROKEN = 500
"""What a server answers that fell over an image, or over everything."""
_FAILED_FIRST = 3
"""Single images that may fail in a row before a server that never scored one is given up."""
_QUALITY = 95
"""Of JPEG files that are sent."""


@dataclass(frozen=True, kw_only=True)
class FieldNames:
    """What a server calls the fields of requests and replies."""

    images: str = "images"
    """Of a request: the list of images."""
    prompts: str = "prompts"
    """Of a request: the list of prompts."""
    scores: str = "scores"
    """Of a reply: the list of numbers, higher is better."""
    error: str = "error"
    """Of a reply: why there are none, where it is there and not empty."""


@dataclass(frozen=True, kw_only=True)
class Remote(Connection, AbstractImageScorer):
    """Scores by whatever answers at an address."""

    address: str = field(metadata=MAY_CHANGE)
    """Where requests go, whole, such as http://127.0.0.1:8000/score."""
    model: str
    """Name and version of what scores there. It alone tells its scores from another model's: change
    it when the model behind the address changes."""
    fields: FieldNames = field(default_factory=FieldNames)
    """What the server calls the fields."""
    also: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of every request, as they are."""
    images_as: Literal["base64", "data_uri"] = "base64"
    """How JSON holds a file: its base64 alone, or behind `data:image/png;base64,`."""
    files: Literal["png", "jpeg"] = "png"
    """What is sent: exact pixels, or a tenth of the bytes (quality 95), which changes scores."""
    body: Literal["json", "pickle"] = "json"
    """`pickle` sends the dictionary pickled, files as bytes, and reads a reply of plain lists and
    numbers in the same way: what flow_grpo and verl-omni speak. A reply that names any class or
    function is refused unread."""
    key_variable: str | None = field(default=None, metadata=MAY_CHANGE)
    """The environment variable whose value is sent to this address alone, as a bearer token; null
    sends none. It needs `scorer.key_variable=NAME` on the command line, see `diffalign.keys`."""
    images_per_request: Annotated[int, AtLeast(1)] = field(default=8, metadata=MAY_CHANGE)
    """Images of one request."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.model.strip() or not self.model.isprintable():
            raise ValueError(
                "model is the name and version of what scores at the address, in one line, and "
                "may not be empty: by it scores are told from those of another model"
            )
        if self.fields.images == self.fields.prompts:
            raise ValueError("fields: images and prompts need two names")
        if shared := {self.fields.images, self.fields.prompts} & self.also.keys():
            raise ValueError(f"also: {min(shared)} is one of fields, and is filled anyway")
        if self.body == "pickle" and self.images_as != "base64":
            raise ValueError("images_as is of JSON, and body is pickle: leave it out")

    @property
    def fingerprint(self) -> str:
        also = json.dumps(self.also, sort_keys=True) if self.also else ""
        return "-".join(filter(None, ["remote", self.model, self.files, also]))

    def score_images(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Scores of images; NaN for one to which the server gave NaN or null.

        Raises:
            ValueError: the server refuses these images, or does not give each of them a number.
            EndpointError: it does not answer, or not as `fields` says.
            ConfigError: it wants another key, or the key may not be sent there.
        """
        variable = self._variable
        size = self.images_per_request
        parts = [slice(start, start + size) for start in range(0, len(images), size)]
        with ThreadPoolExecutor(min(self.parallel, len(parts))) as pool:
            asked = [pool.submit(self._ask, images[p], prompts[p], variable) for p in parts]
            try:
                scores = [score for future in asked for score in future.result()]
            finally:
                for future in asked:
                    future.cancel()
        return torch.tensor(scores, dtype=torch.float32)

    def _ask(
        self, images: Sequence[Image.Image], prompts: Sequence[str], variable: str | None
    ) -> list[float]:
        try:
            scores = self._scores(self._reply(images, prompts, variable), len(images))
        except ValueError as error:
            self._failures.append(str(error))
            if len(images) == 1 and len(self._failures) >= _FAILED_FIRST and not self._has_scored:
                raise EndpointError(
                    f"{self.address} has not scored any image so far, and the latest one: {error}. "
                    f"Try the server by itself, then start the same command again"
                ) from error
            raise
        self._has_scored.append(True)
        return scores

    def _reply(
        self, images: Sequence[Image.Image], prompts: Sequence[str], variable: str | None
    ) -> Mapping[str, Any]:
        content: dict[str, Any] = {
            **self.also,
            self.fields.images: [self._sent(image) for image in images],
            self.fields.prompts: list(prompts),
        }
        pickled = self.body == "pickle"
        try:
            reply = post(
                self.address,
                pickle.dumps(content) if pickled else json.dumps(content).encode(),
                _unpickled if pickled else _parsed,
                patience=self.patience,
                variable=variable,
                content_type="application/octet-stream" if pickled else "application/json",
            )
        except RequestRefusedError as error:
            raise self._refused(error, variable) from error
        except EndpointError as error:
            if error.status == _BROKEN:
                raise ValueError(f"the server fails at it: {error}") from error
            raise
        if not isinstance(reply, Mapping):
            raise EndpointError(
                f"{self.address} replies with {shortly(reply)}, and a reply is an object with a "
                f"field {self.fields.scores}"
            )
        return reply

    def _scores(self, reply: Mapping[str, Any], count: int) -> list[float]:
        names = self.fields
        if reply.get(names.error):
            said = keys.hide(str(reply[names.error]))
            raise ValueError(f"the server says: {shortly(said)}")
        if names.scores not in reply:
            raise EndpointError(
                f"{self.address} replies without a field {names.scores!r} (fields: "
                f"{', '.join(map(str, reply)) or 'none'}): set scorer.fields.scores to the one "
                f"that holds the scores"
            )
        scores = reply[names.scores]
        if not isinstance(scores, (list, tuple)) or len(scores) != count:
            got = f"{len(scores)} scores" if isinstance(scores, (list, tuple)) else shortly(scores)
            raise ValueError(f"the server was given {count} images and returned {got}: one each")
        return [_number(score) for score in scores]

    def _refused(self, error: RequestRefusedError, variable: str | None) -> Exception:
        if error.status in OF_ITEMS:
            return ValueError(f"the server refuses it: {error}")
        if error.status in (401, 403):
            hint = key_hint(variable, f"scorer.{keys.FIELD}")
            return ConfigError(f"{self.address}: HTTP {error.status}; {hint}: {error.said}")
        return EndpointError(
            f"{self.address} is not asked like this: {error}. Look whether scorer.address is whole",
            status=error.status,
        )

    def _sent(self, image: Image.Image) -> bytes | str:
        buffer = io.BytesIO()
        if self.files == "jpeg":
            image.save(buffer, format="jpeg", quality=_QUALITY)
        else:
            image.save(buffer, format="png")
        if self.body == "pickle":
            return buffer.getvalue()
        text = base64.b64encode(buffer.getvalue()).decode()
        return text if self.images_as == "base64" else f"data:image/{self.files};base64,{text}"

    @cached_property
    def _variable(self) -> str | None:
        """The variable that holds the key, which is said once; None where none is sent."""
        if self.key_variable is None:
            return None
        variable = keys.variable_for(self.address, self.key_variable)
        announce(variable, self.address, f"the scorer {self.model}")
        return variable

    @cached_property
    def _failures(self) -> list[str]:
        """What went wrong with requests so far."""
        return []

    @cached_property
    def _has_scored(self) -> list[bool]:
        """Not empty once the server has scored anything."""
        return []


def _number(score: Any) -> float:
    if score is None:
        return math.nan
    if isinstance(score, bool) or not isinstance(score, (int, float)):
        raise ValueError(f"the server returned {shortly(score)} where a number belongs")
    return float(score)


def _parsed(reply: bytes) -> Any:
    return parse_json(reply, "the reply")


class _PlainUnpickler(pickle.Unpickler):
    """Reads lists, dictionaries, text and numbers, none of which runs code."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")


def _unpickled(reply: bytes) -> Any:
    try:
        return _PlainUnpickler(io.BytesIO(reply)).load()
    except Exception as error:  # whatever bytes may bring an unpickler to
        raise DataError(
            f"the reply is no pickle of plain lists and numbers ({error}): let the server return "
            f"float(score)"
        ) from error
