"""From a name to a model's files: local, inside this package, or in the hub's cache.

https://huggingface.co/docs/huggingface_hub describes the cache and the environment variables
(HF_HOME, HF_HUB_OFFLINE, HF_TOKEN, HF_ENDPOINT, ...) that hold here too.
"""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Sequence
from pathlib import Path

from ..config import CONFIG_FILE
from ..errors import WeightsError, reason_of
from . import run_folder

BUNDLED = "adventures"
"""The model that comes with the package, in gpt2fast/assets/adventures/."""

CONNECT_SECONDS = 10.0
"""Time for the hub to answer before it counts as unreachable."""

_FILE_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".json", ".txt"),
    *(".gguf", ".h5", ".index", ".msgpack", ".onnx"),
)


def resolve(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    allow_patterns: Sequence[str],
) -> Path:
    """The local file or directory that `name_or_path` stands for.

    - The name of a bundled model gives its directory inside the package (a directory of the same
      name is reached as `./adventures`).
    - A path that exists is returned as it is, with one exception: the directory of a training run
      that has not finished yet gives its newest checkpoint.
    - Anything else is the name of a model on the hub: the files that match `allow_patterns` are
      downloaded (or found in huggingface_hub's cache; with `local_files_only` only there), and the
      directory that holds them is returned. It need not hold a match for every pattern.

    Raises WeightsError, with the name, the reason and the way out. A hub that does not answer
    costs `CONNECT_SECONDS`; what the cache holds is used then, as transformers does.
    """
    name = os.fspath(name_or_path)
    if name == BUNDLED:
        return _bundled(name)
    try:
        path = Path(name).expanduser()
        if path.exists():
            return _newest_checkpoint(path)
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL byte, an unknown ~user
        raise WeightsError(
            f"{name!r:.200} is neither a path nor the name of a model: {_told(error)}"
        ) from error
    hint = _prefix_hint(path)
    if hint or _looks_like_a_path(name):
        raise WeightsError(f"no such file or directory: {name}{hint}")
    return _from_hub(name, revision, local_files_only, list(allow_patterns))


def _bundled(name: str) -> Path:
    path = Path(str(importlib.resources.files("gpt2fast") / "assets" / name))
    if not path.is_dir():
        raise WeightsError(
            f"the bundled model {name!r} is not in this installation ({path} is missing): "
            "install the package again, or name another model, such as gpt2"
        )
    return path


def _newest_checkpoint(path: Path) -> Path:
    """The newest checkpoint, if `path` is a training run that has no final model yet.

    The one with the best validation loss counts where no other has been made.
    """
    checkpoints = path / run_folder.CHECKPOINTS
    if not checkpoints.is_dir() or (path / CONFIG_FILE).exists():
        return path
    # Steps are zero-padded, so that the order of names is the order of time.
    found = [checkpoints / run_folder.BEST, *sorted(checkpoints.glob(f"{run_folder.STEP}*"))]
    return next((p for p in reversed(found) if (p / CONFIG_FILE).is_file()), path)


def _prefix_hint(path: Path) -> str:
    """A hint for the prefix of a TensorFlow checkpoint's files, by which TensorFlow names it."""
    try:
        found = path.with_name(path.name + ".index").is_file()
    except (OSError, ValueError):
        return ""
    return f"; for the TensorFlow checkpoint, give its folder {path.parent}" if found else ""


def _looks_like_a_path(name: str) -> bool:
    """True for a text that cannot be a name on the hub (`gpt2`, `openai-community/gpt2`)."""
    return (
        not name
        or name.startswith((".", "~", os.sep))
        or name.endswith((os.sep, *_FILE_SUFFIXES))
        or "\\" in name
        or name.count("/") > 1
    )


def _from_hub(name: str, revision: str | None, local_files_only: bool, patterns: list[str]) -> Path:
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    unreachable: Exception | None = None
    try:
        if not local_files_only:
            try:
                # snapshot_download waits for ever when the hub accepts a connection and stays
                # silent, so its first question is asked here, with a time limit.
                HfApi().repo_info(name, revision=revision, timeout=CONNECT_SECONDS)
            except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, ValueError):
                raise
            except Exception as error:  # requests, httpx or httpx2: each has its own exceptions
                unreachable = error
        path = Path(
            snapshot_download(
                name,
                revision=revision,
                local_files_only=local_files_only or unreachable is not None,
                allow_patterns=patterns,
            )
        )
    except errors.GatedRepoError as error:
        raise WeightsError(
            f"model {name!r} is gated: accept its terms at {constants.ENDPOINT}/{name}, then "
            "log in with `hf auth login` or set HF_TOKEN"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise WeightsError(
            f"there is no model {name!r}, neither here as a file or directory nor on "
            f"{constants.ENDPOINT} (or it is private: then log in with `hf auth login` or set "
            f"HF_TOKEN); check the spelling, or use the bundled model {BUNDLED!r}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise WeightsError(
            f"model {name!r} has no revision {revision!r}: see "
            f"{constants.ENDPOINT}/{name}/commits/main, or leave the revision out"
        ) from error
    except errors.HFValidationError as error:
        raise WeightsError(
            f"{name!r:.200} is neither an existing path nor a name that a model on the hub can "
            "have (such as gpt2 or openai-community/gpt2)"
        ) from error
    except errors.LocalEntryNotFoundError as error:
        at = "" if revision is None else f" at revision {revision!r}"
        if local_files_only:
            reason = "local_files_only forbids a download"
        else:
            reason = f"{constants.ENDPOINT} cannot be reached ({_told(unreachable or error)})"
        raise WeightsError(
            f"model {name!r}{at} is neither a path nor complete in the cache "
            f"{constants.HF_HUB_CACHE}, and {reason}: download it once while connected "
            "(HF_ENDPOINT and HTTPS_PROXY set mirrors and proxies), give the path of a local copy, "
            f"or use the bundled model {BUNDLED!r}"
        ) from error
    except Exception as error:  # as above, and a full disk or a cache that cannot be written
        raise WeightsError(
            f"model {name!r} cannot be downloaded from {constants.ENDPOINT} to "
            f"{constants.HF_HUB_CACHE}: {_told(error)}; a second try continues where this one "
            "stopped"
        ) from error
    if not path.is_dir():
        raise WeightsError(
            f"model {name!r} on {constants.ENDPOINT} has none of the files {', '.join(patterns)}"
        )
    return path


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {reason_of(error)}"
