"""Errors of the Hugging Face hub as sentences with a way on.

The libraries retry by themselves (too many requests, a fault of the server, a connection that
breaks off) and then raise errors of half a dozen packages. What is known of data sets and models
that are gone, and of what people use in their place, is here and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from huggingface_hub import constants

from diffalign.errors import DiffalignError

Kind = Literal["data set", "model"]

OPEN_IMAGE_PAIRS = (
    "data-is-better-together/open-image-preferences-v1-binarized (Apache-2.0)",
    "Rapidata/OpenAI-4o_t2i_human_preference (CDLA-Permissive-2.0)",
)
"""Sets of image pairs with a licence, of which any of the configs can be made."""

_PICKAPIC = (
    "the mirror liuhuohuo2/pick-a-pic-v2 (Pick-a-Pic v2, its columns and its 335 GB)",
    *OPEN_IMAGE_PAIRS,
)
_PICKAPIC_GONE = "Pick-a-Pic is reported gone since April 2025"

GONE: dict[str, tuple[str, tuple[str, ...]]] = {
    "yuvalkirstain/pickapic_v1": (
        _PICKAPIC_GONE,
        ("the mirror pickapic-anonymous/pickapic_v1", *_PICKAPIC),
    ),
    "yuvalkirstain/pickapic_v2": (_PICKAPIC_GONE, _PICKAPIC),
    "yuvalkirstain/pickapic_v2_no_images": (_PICKAPIC_GONE, _PICKAPIC),
    "THUDM/ImageRewardDB": ("it has moved", ("zai-org/ImageRewardDB",)),
    "runwayml/stable-diffusion-v1-5": (
        "it was taken off the hub in August 2024",
        ("stable-diffusion-v1-5/stable-diffusion-v1-5, the same files",),
    ),
    "runwayml/stable-diffusion-inpainting": (
        "it was taken off the hub in August 2024",
        ("stable-diffusion-v1-5/stable-diffusion-inpainting, the same files",),
    ),
}
"""Repositories that are reported gone: why, and what serves in their place."""

_USUAL: dict[str, tuple[str, ...]] = {
    "data": OPEN_IMAGE_PAIRS,
    "responses": ("openbmb/RLHF-V-Dataset", "openbmb/RLAIF-V-Dataset"),
    "model": (
        "stabilityai/stable-diffusion-xl-base-1.0",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "llava-hf/llava-1.5-7b-hf",
    ),
}
"""Replacements for something unknown, by section of the config."""

_NETWORK_PACKAGES = frozenset(
    (
        *("huggingface_hub", "hf_xet", "fsspec", "ssl"),
        *("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3", "aiohttp"),
    )
)
_LOG_IN = "log in with `hf auth login` (or set HF_TOKEN)"


@contextmanager
def explained(
    name: str, *, kind: Kind, error: type[DiffalignError], field: str, section: str = "model"
) -> Iterator[None]:
    """Turn what the hub's libraries raise within into one sentence.

    Args:
        name: the repository, `owner/name`. A path that exists on this machine changes nothing.
        kind: what it is.
        error: what is raised.
        field: the setting that names it, for the message.
        section: `data`, `responses` or `model`, for what else there is.

    Raises:
        DiffalignError: of the type `error`, where the cause is the hub or the way to it.
    """
    try:
        yield
    except DiffalignError:
        raise
    except Exception as cause:  # errors of network libraries share no base class
        said = None if Path(name).exists() else explain(cause, name, kind=kind, section=section)
        if said is None:
            raise
        raise error(f"{field} {name}: {said}") from cause


def explain(cause: BaseException, name: str, *, kind: Kind, section: str = "model") -> str | None:
    """The meaning of an error of the hub's libraries for the user; None for other errors."""
    chain = _chain(cause)
    names = {type(error).__name__ for error in chain}
    status = _status(chain)
    text = " ".join(str(error) for error in chain)
    place = constants.ENDPOINT.rstrip("/")
    page = f"{place}/{'datasets/' if kind == 'data set' else ''}{name}"
    if (
        "OfflineModeIsEnabled" in [*names, *re.findall(r"\w+", text)]
        or "offline mode is enabled" in text.lower()
    ):
        return (
            f"it is not in the cache, and HF_HUB_OFFLINE or HF_DATASETS_OFFLINE forbids to ask the "
            f"hub for it. Unset them, or download it once with {_download(name, kind)}"
        )
    if "Dataset scripts are no longer supported" in text or "trust_remote_code" in text:
        return (
            f"it is made by code of its own, which is not run. Get its files with "
            f"{_download(name, kind)} --local-dir FOLDER and give the path of those that hold rows"
        )
    if "GatedRepoError" in names or "is a gated dataset" in text:
        return (
            f"it is gated: accept its terms at {page} while logged in there, then {_LOG_IN} on "
            f"this machine.{_instead(name, section)}"
        )
    if "RevisionNotFoundError" in names:
        return f"the hub has it, and not the revision that is asked for. {page} shows what there is"
    if status == 429 or "429" in text or "Too Many Requests" in text:
        return (
            f"{place} refuses more requests for now (429), after several attempts. Wait some "
            f"minutes; {_LOG_IN}, which raises the limit; or download it once with "
            f"{_download(name, kind)}"
        )
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError"} or status in (401, 404):
        missing = "EntryNotFoundError" in names or "RemoteEntryNotFoundError" in names
        if missing and "RepositoryNotFoundError" not in names:
            return f"{page} lacks a file that is needed: {_first_line(chain)}"
        why = GONE[name][0] if name in GONE else "it is gone, private, or its name is misspelled"
        code = f" ({status})" if status else ""
        return (
            f"{place} has no such public {kind}{code}: {why}.{_instead(name, section)}. "
            f"If it is private, {_LOG_IN}"
        )
    if status == 403:
        return (
            f"{place} refuses it (403): it is gated or private. See {page}, and "
            f"{_LOG_IN}.{_instead(name, section)}"
        )
    if re.search(r"Timeout|timed out", " ".join(names) + text):
        return (
            f"{place} does not answer in time, and several attempts did not help. Try again, "
            f"with HF_HUB_DOWNLOAD_TIMEOUT=60 and HF_HUB_ETAG_TIMEOUT=60 if the network is "
            f"slow; a run that had started continues with --resume"
        )
    if _is_cut_off(names, text):
        return (
            f"a file of it broke off before its end ({_first_line(chain)}). Try again: what has "
            f"come whole stays in the cache"
        )
    if status is not None and status >= 500:
        return f"{place} has a fault of its own ({status}), after several attempts. Try again later"
    if _is_network(chain):
        return (
            f"{place} cannot be reached or does not answer ({_first_line(chain)}). Check the "
            f"network, the proxy and HF_ENDPOINT, or give the path of a downloaded copy"
        )
    return None


def _instead(name: str, section: str) -> str:
    others = GONE[name][1] if name in GONE else _USUAL.get(section, ())
    return f" In its place: {'; '.join(others)}" if others else ""


def _download(name: str, kind: Kind) -> str:
    return f"`hf download {name}{' --repo-type dataset' if kind == 'data set' else ''}`"


def _chain(error: BaseException | None) -> list[BaseException]:
    """The error and those that caused it, the outermost first."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _status(chain: list[BaseException]) -> int | None:
    """The HTTP status that an error carries."""
    for error in chain:
        response = getattr(error, "response", None)
        status = getattr(response, "status_code", None) or getattr(error, "status", None)
        if isinstance(status, int):
            return status
    return None


def _is_cut_off(names: set[str], text: str) -> bool:
    known = {"IncompleteRead", "ChunkedEncodingError", "RemoteProtocolError", "ContentLengthError"}
    said = r"consistency check failed|incomplete|peer closed|payload is not completed|truncated"
    return bool(names & known) or re.search(said, text, re.IGNORECASE) is not None


def _is_network(chain: list[BaseException]) -> bool:
    packages = {type(error).__module__.partition(".")[0] for error in chain}
    return bool(packages & _NETWORK_PACKAGES) or any(
        isinstance(error, (ConnectionError, TimeoutError)) for error in chain
    )


def _first_line(chain: list[BaseException]) -> str:
    """The words of the network's own error, or else of the outermost one."""
    network = [e for e in chain if type(e).__module__.partition(".")[0] in _NETWORK_PACKAGES]
    error = network[-1] if network else chain[0]
    said = str(error).strip()
    line = said.splitlines()[0].rstrip(".") if said else ""
    return f"{type(error).__name__}: {line[:200]}" if line else type(error).__name__
