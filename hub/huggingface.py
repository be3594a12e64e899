"""The Hugging Face Hub: what a repository holds, and one file from it into the Hugging Face cache.

huggingface_hub does the talking (endpoint, token, proxies, redirects, retries) and lays the cache out. What it lacks
is added here: its downloads begin again after an interruption, since each writes to a file of its own name and removes
it, and it does not hold a file against the hub's SHA-256. So a file is received into `blobs/<digest>.incomplete`,
kept when the line breaks, checked, and only then given its name and its link in the snapshot. `hf_hub_download` would
ask for the digest and the commit once more and take whatever is answered for a path, so it is not called.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_hf_file_metadata, hf_hub_url
from huggingface_hub import errors as hub_errors
from huggingface_hub.file_download import _create_symlink, http_get, repo_folder_name
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # its types hide what it exports
    WeakFileLock,
    build_hf_headers,
)

from core.errors import DownloadError
from core.messages import Message
from core.whole_file import write_whole
from hub import proxies
from hub.checkpoint import digest_of
from hub.parts import Part
from hub.remote import GOES_ON, RemoteFile, Report, hex_digits, plain_name, wanted

REVISION = "main"
SOCKS_PACKAGE = ("socksio", "socksio")  # what the HTTP client takes for SOCKS proxies
CACHE_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n"  # by which backup tools know what they need not keep
FULL_TRIES = 2  # a file whose content is wrong is fetched once more


class HuggingFace:
    """One hub (`hub.remote.Hub`).

    Args:
        endpoint: the hub's address; HF_ENDPOINT, or the public hub, where none is given.
        cache: the cache's folder; by the environment where none is given.
        token: what to log in with; HF_TOKEN, or what `hf auth login` stored, where none is given.
    """

    def __init__(self, endpoint: str | None = None, cache: Path | None = None, token: str | None = None) -> None:
        self.endpoint = endpoint or constants.ENDPOINT
        self.folder = cache or Path(constants.HF_HUB_CACHE)
        self._token = token

    def files(self, part: Part) -> list[RemoteFile]:
        """Return the files that belong to a part, as the hub has them now."""
        info = HfApi(self.endpoint, token=self._token).model_info(part.repo, revision=REVISION, timeout=30)
        names = [file.rfilename for file in info.siblings or [] if wanted(part, file.rfilename)]
        if not names:
            text = "{repo} at {endpoint} has no {pattern}"
            raise DownloadError(text, repo=part.repo, endpoint=self.endpoint, pattern=part.pattern)
        return [self._look(part.repo, plain_name(name, part.repo, self.endpoint)) for name in names]

    def _look(self, repo: str, name: str) -> RemoteFile:
        """Ask for a file's size and digest: by the request that downloads begin with, which mirrors answer too."""
        url = hf_hub_url(repo, name, revision=REVISION, endpoint=self.endpoint)
        found = get_hf_file_metadata(url, token=self._token, timeout=30, endpoint=self.endpoint)
        if found.etag is None or found.size is None or found.commit_hash is None:
            raise DownloadError(
                "{endpoint} does not answer as a hub does for {repo}/{name} (no etag, length or commit): check "
                "HF_ENDPOINT and any proxy",
                endpoint=self.endpoint,
                repo=repo,
                name=name,
            )
        etag = Message("digest", "etag of {repo}/{name}", repo=repo, name=name)
        digest = hex_digits(found.etag, etag, self.endpoint)
        commit = hex_digits(found.commit_hash, Message("commit", "commit of {repo}", repo=repo), self.endpoint)
        return RemoteFile(repo, name, found.size, digest, commit)

    def have(self, file: RemoteFile) -> int:
        """Return how many bytes of a file are in the cache, finished or not."""
        blob = self._blob(file)
        sizes = [path.stat().st_size for path in (blob, _partial(blob), self._snapshot(file)) if path.is_file()]
        return max((size for size in sizes if size <= file.size), default=0)

    def fetch(self, file: RemoteFile, report: Report) -> Path:
        """Make a file of the cache whole: leave it if it is, go on with what has arrived, check it, link it."""
        blob, path = self._blob(file), self._snapshot(file)
        lock = self.folder / ".locks" / blob.parent.parent.name / f"{file.digest}.lock"
        for folder in (blob.parent, path.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(lock):
            # Where links cannot be made (Windows), snapshots hold the files themselves and there are no blobs.
            if path.is_file() and not path.is_symlink() and path.stat().st_size != file.size:
                path.unlink()
            if blob.is_file() and blob.stat().st_size != file.size:
                if blob.is_symlink():  # into a store that others use
                    blob.unlink()
                else:
                    blob.replace(_partial(blob))
            loose = path.is_file() and not path.is_symlink()
            if not blob.is_file() and not loose:
                self._receive(file, blob, report)
            if not path.exists():
                _create_symlink(str(blob), str(path))
        self._note_commit(file)
        return path

    def _note_commit(self, file: RemoteFile) -> None:
        """Let the cache call a file's snapshot that of `main`, and itself a cache, as huggingface_hub does."""
        ref = self._repo(file) / "refs" / REVISION
        ref.parent.mkdir(parents=True, exist_ok=True)
        if not ref.is_file() or ref.read_bytes() != file.commit.encode():
            write_whole(ref, file.commit.encode())
        if not (tag := self.folder / "CACHEDIR.TAG").exists():
            write_whole(tag, CACHE_TAG)

    def _receive(self, file: RemoteFile, blob: Path, report: Report) -> None:
        partial = _partial(blob)
        if partial.is_file() and partial.stat().st_size > file.size:
            partial.unlink()
        url = hf_hub_url(file.repo, file.name, revision=REVISION, endpoint=self.endpoint)
        # Compressed on the way, a file could not be gone on with.
        headers = build_hf_headers(token=self._token, headers={"Accept-Encoding": "identity"})
        for _ in range(FULL_TRIES):
            with open(partial, "ab") as out:
                # Not by the redirect's address: that is signed for some hours only, and a slow line takes longer.
                http_get(
                    url,
                    out,
                    resume_size=out.tell(),
                    headers=headers,
                    expected_size=file.size,
                    tqdm_class=_reporting(report),
                )
            if digest_of(partial, file.digest) == file.digest:
                os.replace(partial, blob)
                return
            report(-file.size)
            partial.unlink()
        raise DownloadError(
            "{repo}/{name} arrived {tries} times with another content than {endpoint} announces: a proxy or a mirror "
            "changes it; set HF_ENDPOINT to another, or try again later",
            repo=file.repo,
            name=file.name,
            tries=FULL_TRIES,
            endpoint=self.endpoint,
        )

    def explain(self, error: Exception, repo: str) -> DownloadError | None:
        """Return what an error of huggingface_hub, or of the HTTP client under it, means and what to do."""
        if isinstance(error, hub_errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        values: dict[str, Any] = {"where": f"{self.endpoint}/{repo}", "log_in": _LOG_IN}
        if isinstance(error, hub_errors.GatedRepoError):
            text = "{where} is for those who accepted its terms: do so on that page, then {log_in}"
        elif isinstance(error, hub_errors.HfHubHTTPError):
            values["status"] = error.response.status_code
            text = MEANINGS.get(error.response.status_code, "{where} answers {status}; try again later")
        elif isinstance(error, hub_errors.OfflineModeIsEnabled):
            text = "{where} is not asked: offline (HF_HUB_OFFLINE or --offline)"
        elif isinstance(error, _UNREACHABLE):
            values["error"] = type(error).__name__
            text = (
                "{where} cannot be reached, or stopped answering ({error}): check the connection and any proxy; "
                "HF_ENDPOINT may name a mirror"
            )
        elif isinstance(error, OSError) and "Consistency check failed" in str(error):  # http_get has no type for it
            text = "{where} sent another number of bytes than it announced"
        elif not isinstance(error, OSError) and (fault := proxies.fault(SOCKS_PACKAGE, ("socks5", "socks5h"))):
            return DownloadError(fault)  # the client cannot be made then, and says so in errors of several kinds
        else:
            return None
        return DownloadError(GOES_ON, what=Message("hub_error", text, **values), repo=repo)

    def _blob(self, file: RemoteFile) -> Path:
        return self._repo(file) / "blobs" / file.digest

    def _repo(self, file: RemoteFile) -> Path:
        return self.folder / repo_folder_name(repo_id=file.repo, repo_type="model")

    def _snapshot(self, file: RemoteFile) -> Path:
        """Return where a file lies or should lie, under its own name."""
        return self._repo(file) / "snapshots" / file.commit / file.name


# The second is the HTTP client's base class; which client that is depends on the version of huggingface_hub.
_UNREACHABLE = (
    hub_errors.LocalEntryNotFoundError,
    hub_errors.HTTPError,  # type: ignore[attr-defined]  # imported there, from the client
    hub_errors.FileMetadataError,
)
_LOG_IN = Message("log_in", "set HF_TOKEN to a token that may read it (or run `hf auth login`)")
MEANINGS = {
    401: "{where} answers 401: it does not exist, or asks for another login; {log_in}",
    403: "{where} answers 403: this login may not read it; {log_in}",
    404: "{where} answers 404: it is not there; check HF_ENDPOINT if it names a mirror",
    429: "{where} answers 429: too many requests; wait some minutes, or {log_in}",
}


def _partial(blob: Path) -> Path:
    return blob.with_name(blob.name + ".incomplete")


def _reporting(report: Report) -> type:
    """Return a class that `http_get` takes for a progress bar, and that passes on what arrives."""

    class Bar:
        def __init__(self, **_: object) -> None:
            pass

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: int) -> None:
            report(count)

    return Bar
