"""Models on the Hugging Face Hub: what a source names, its files, and what to do when they fail.

A source is a local folder or file; a repository, "google/ddpm-church-256"; a commit, tag or branch
of it, "google/ddpm-church-256@5a1118b…"; or open_clip's name of a CLIP model that it keeps on the
Hub, "ViT-L-14:openai", with or without an @. What cannot be had is a FileNotFoundError that says
why and what to do.
"""

import contextlib
import errno
import functools
from collections.abc import Iterator
from pathlib import Path

LAION_HEAD = "sac+logos+ava1-l14-linearMSE.pth"
FILES = {
    "clip": [("open_clip_model.safetensors", "open_clip_pytorch_model.bin")],
    "aesthetic": [("model.safetensors", LAION_HEAD)],
    "age": [("config.json",), ("preprocessor_config.json",), ("model.safetensors",)],
}
"""Kind of model → its files in a repository; of alternatives the first that is there is taken."""


def locate(source: str) -> tuple[str, str | None] | None:
    """Repository and revision, None for the newest, of a source; None for one not the Hub's."""
    if Path(source).exists():
        return None
    name, _, revision = source.removeprefix("https://huggingface.co/").partition("@")
    architecture, _, tag = name.partition(":")
    if tag:
        import open_clip  # takes seconds, and most sources do without

        name = open_clip.get_pretrained_cfg(architecture, tag).get("hf_hub", "").rpartition("/")[0]
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        return None
    return name, revision or None


@functools.cache
def commit(source: str) -> str | None:
    """The commit that a source stands for, looked up once in a process; None for a local one.
    Where the Hub is out of reach, it is what the cache took for this revision last."""
    if (place := locate(source)) is None:
        return None
    from huggingface_hub import HfApi, constants

    api, where = HfApi(), {"revision": place[1], "local_files_only": constants.HF_HUB_OFFLINE}
    # Left alone it would wait for ever for a server that is silent.
    api.repo_info = functools.partial(api.repo_info, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    with explained(source):
        return api.resolve_revision(place[0], **where).resolved


def fetch(kind: str, source: str) -> Path:
    """The folder with a model's files, or its only file; a local source is returned as it is. What
    the cache lacks is downloaded. `kind` is "policy", or one of `FILES`."""
    if (place := locate(source)) is None:
        return Path(source)
    from huggingface_hub import constants

    where = {"revision": commit(source), "local_files_only": constants.HF_HUB_OFFLINE}
    with explained(source):
        if kind == "policy":
            from diffusers import DDPMPipeline

            return Path(DDPMPipeline.download(place[0], **where))
        files = [_first(place[0], names, where) for names in FILES[kind]]
    return files[0].parent if len(files) > 1 else files[0]


def _first(repository: str, names: tuple[str, ...], where: dict) -> Path:
    from huggingface_hub import errors, hf_hub_download

    for name in names:
        try:
            return Path(hf_hub_download(repository, name, **where))
        except errors.EntryNotFoundError:
            if name == names[-1]:
                raise


@contextlib.contextmanager
def explained(source: str, wish: str = "get") -> Iterator[None]:
    """Turn whatever the Hub's library raises into one FileNotFoundError that says what to do."""
    try:
        yield
    except Exception as error:
        title = f"cannot {wish} {source!r}, the id of a model on the Hugging Face Hub"
        said = f"{title}: {_advice(error, source, wish)}. Cause: {cause(error)}"
        raise FileNotFoundError(said) from error


def _advice(error: Exception, source: str, wish: str) -> str:
    """What to do about an error."""
    from huggingface_hub import constants, errors

    chain = [error]  # and the errors behind it
    while behind := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(behind)
    numbers = {getattr(each, "errno", None) for each in chain}
    statuses = {getattr(getattr(each, "response", None), "status_code", None) for each in chain}
    kinds = {kind for each in chain for kind in type(each).__mro__}
    repository, revision = locate(source) or (source, None)
    page, cache = f"{constants.ENDPOINT}/{repository}", constants.HF_HUB_CACHE
    if numbers & {errno.ENOSPC, errno.EDQUOT}:
        return f"the disk of its cache, {cache}, is full. Free some space, or set HF_HOME elsewhere"
    if numbers & {errno.EACCES, errno.EPERM, errno.EROFS}:
        return f"its cache, {cache}, cannot be written. Set HF_HOME to a folder that is yours"
    if errors.GatedRepoError in kinds:
        return f"its owner gives access on request. Ask on {page}, then log in: `hf auth login`"
    if errors.RevisionNotFoundError in kinds:
        others = f"a commit (all 40 digits), a tag or a branch from {page}/commits/main"
        return f"{repository} has no revision {revision!r}. Take {others}"
    if kinds & {errors.RepositoryNotFoundError, errors.HFValidationError}:
        missing = f"there is no {repository}, or it is private. Check the spelling"
        return f"{missing}; for a private one, `hf auth login`; a folder of your own must exist"
    if errors.LocalTokenNotFoundError in kinds or statuses & {401, 403}:
        return "it wants to know who you are. `hf auth login`, with a token that allows it"
    if 429 in statuses:
        return "it has had too many requests from here. Wait some minutes, or `hf auth login`"
    if errors.RemoteEntryNotFoundError in kinds:
        return f"{page} lacks a file that this kind of model has. Take another repository"
    if wish != "get":
        failed = "the Hub cannot be reached. Check the connection and try again"
        return "HF_HUB_OFFLINE is set. Start without it" if constants.HF_HUB_OFFLINE else failed
    if constants.HF_HUB_OFFLINE:
        missing = f"HF_HUB_OFFLINE is set and the cache, {cache}, does not have all of it"
        return f"{missing}. Start once without HF_HUB_OFFLINE, or name a folder with the model"
    failed = "the Hub cannot be reached, or the download broke off"
    advice = "Check the connection and start again: what is downloaded stays"
    return f"{failed}. {advice}. Without a network, name a folder with the model"


def cause(error: Exception) -> str:
    """One line that says what went wrong."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
