"""A merged model or an adapter, its card included, to a repository on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from san_llm.errors import InputError, SanError, first_line, nearest_file
from san_llm.files import refuse_link
from san_llm.progress import say
from san_llm.runs.folder import last_run, product_of
from san_llm.runs.record import ADAPTER_CONFIG


def check_push(name: str, option: str = "--push", signed_in: bool = True) -> None:
    """Refuse what cannot be pushed to, before anything is merged.

    Args:
        name: The hub id.
        option: The option it was named with.
        signed_in: Whether somebody must be signed in.

    Raises:
        InputError: when it is no hub id, or nobody is signed in.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(name)
        wrong = "/" not in name
    except HFValidationError:
        wrong = True
    if wrong:
        raise InputError(f"{option}: {name!r} is not a hub id; expected something like owner/name")
    if signed_in and get_token() is None:
        raise InputError(f"{option}: nobody is signed in to the hub: `hf auth login` or HF_TOKEN")


@dataclass(frozen=True)
class Upload:
    """What went to the hub, or would.

    Attributes:
        folder: The adapter's folder, or the merged model's.
        files: The size of each file in it in bytes, by name.
        address: Where it is now; None where nothing was sent.
    """

    folder: Path
    files: dict[str, int]
    address: str | None


def upload(folder: Path | None, name: str, private: bool, dry_run: bool) -> Upload:
    """Upload an adapter or a merged model, with its card; return what was sent.

    Args:
        folder: The folder to send, or the run's whose adapter is meant; None: the last run's.
        name: The hub id.
        private: Whether a repository that is made for it is seen by its owner alone.
        dry_run: Only say what would be sent.

    Raises:
        InputError: when there is nothing to send, or something that must not be.
        SanError: when the hub does not take it.
    """
    check_push(name, "HUB_ID", signed_in=not dry_run)
    folder = folder or last_run()
    if (folder / "recipe.yaml").is_file():
        folder = product_of(folder)
    of_run = (folder.parent / "recipe.yaml").is_file()
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if not is_adapter and not (folder / "config.json").is_file():
        raise InputError(f"{folder}: neither a run, nor an adapter, nor a model")
    paths = sorted(folder.rglob("*"))
    for path in paths:
        refuse_link(path)
    files = {str(path.relative_to(folder)): path.stat().st_size for path in paths if path.is_file()}
    kind = "Adapter" if is_adapter else "Tuned model" if of_run else "Merged model"
    return Upload(folder, files, None if dry_run else push(folder, name, private, kind))


def push(folder: Path, name: str, private: bool = False, message: str = "Merged model") -> str:
    """Upload a folder as a model repository, made if it is not there; return its address.

    Args:
        folder: A merged model's folder, or an adapter's.
        name: The hub id.
        private: Whether only its owner sees a repository that is made for it.
        message: The commit's message.

    Raises:
        SanError: when the hub cannot be reached or does not let the user; the folder stays.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    hub = HfApi(library_name="san-llm")
    try:
        hub.create_repo(name, private=private or None, exist_ok=True)  # None: as the owner's are
        about = hub.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    except OfflineModeIsEnabled:
        why = "the hub is switched off (HF_HUB_OFFLINE)"
    except HfHubHTTPError as error:
        answered = error.response.status_code if error.response is not None else None
        reason = error.server_message or str(error).splitlines()[0]
        why = "not open to you" if answered in (401, 403) else reason
    except Exception as error:  # of several HTTP libraries, by the hub client's version
        first = first_line(error)
        why = first.rstrip(".")
    else:
        return str(about.repo_url)
    raise SanError(
        f"{name}: not pushed: {why}; the model is in {folder}, `hf upload {name} {folder}` sends it"
    )


# Of a hub repository. Never a pickle: .bin and .pt files stay where they are.
WANTED = ["*.safetensors", "*.json", "*.jinja", "tokenizer*", "*.model", "*.txt", "LICENSE*"]


def fetch(
    name: str,
    revision: str | None = None,
    code: bool = False,
    local_dir: Path | None = None,
) -> Path:
    """Return the folder of a hub repository's weights, config and tokenizer, fetched if need be.

    What is in the cache is used.

    Args:
        name: The hub id.
        revision: Branch, tag or commit.
        code: Fetch the repository's own Python files as well.
        local_dir: Where to, if not into the hub's cache.

    Raises:
        InputError: when there is no such repository, or it is not open to the user.
        SanError: when the hub cannot be reached.
    """
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = [*WANTED, "*.py"] if code else WANTED
    try:
        if local_dir is None and try_to_load_from_cache(name, "config.json") is None:
            say(f"{name}: fetching it from the hub")
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=wanted, local_dir=local_dir)
        )
    except HFValidationError:
        raise InputError(f"{name}: not a hub id; expected something like owner/name") from None
    except RevisionNotFoundError:
        raise InputError(f"{name}: has no revision {revision!r}") from None
    except LocalEntryNotFoundError:
        if local_dir is not None:
            raise SanError(f"{name}: could not be downloaded: the hub cannot be reached") from None
        raise InputError(
            f"{name}: no such folder{nearest_file(Path(name))}, and not in the hub's cache; "
            "the hub cannot be reached"
        ) from None
    except RepositoryNotFoundError:
        raise InputError(
            f"{name}: not found on the hub, or not open to you (`hf auth login` signs in)"
        ) from None
    except Exception as error:  # of several HTTP libraries, by the hub client's version
        first = first_line(error)
        raise SanError(f"{name}: could not be fetched from the hub: {first}") from error
