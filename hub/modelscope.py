"""ModelScope: what a repository holds there, and one file from it into the ModelScope cache.

modelscope_hub resumes, fetches large files in several ranges, and holds each file against the listing's SHA-256 by
itself; this only brings it into the shape that `hub.download` asks for.
"""

from __future__ import annotations

from pathlib import Path

from modelscope_hub import FileInfo, HubApi, HubConfig, ProgressCallback, get_default_config
from modelscope_hub import errors as hub_errors

from core.errors import DownloadError
from core.messages import Message
from hub import proxies
from hub.parts import Part
from hub.remote import GOES_ON, RemoteFile, Report, hex_digits, plain_name, wanted

REVISION = "master"
SOCKS = ("socks4", "socks4a", "socks5", "socks5h")
SOCKS_PACKAGE = ("socks", "PySocks")  # what requests takes for these proxies


class ModelScope:
    """ModelScope (`hub.remote.Hub`).

    Args:
        config: endpoint, token and cache; by MODELSCOPE_ENDPOINT, MODELSCOPE_API_TOKEN and MODELSCOPE_CACHE where none
            is given.
    """

    def __init__(self, config: HubConfig | None = None) -> None:
        config = config or get_default_config()
        assert config.endpoint is not None  # the library fills it in
        self.endpoint = config.endpoint
        self.folder = Path(config.cache_dir)
        self._api = HubApi(config)

    def files(self, part: Part) -> list[RemoteFile]:
        """Return the files that belong to a part; some repositories go by another owner's name there."""
        repo = (*part.also, part.repo)[0]
        listed = self._api.list_repo_files(repo, "model", revision=REVISION)
        found = [file for file in listed if file.type != "tree" and wanted(part, file.path)]
        if not found:
            text = "{repo} at {endpoint} has no {pattern}"
            raise DownloadError(text, repo=repo, endpoint=self.endpoint, pattern=part.pattern)
        return [
            RemoteFile(repo, plain_name(file.path, repo, self.endpoint), file.size, self._digest(repo, file))
            for file in found
        ]

    def _digest(self, repo: str, listed: FileInfo) -> str:
        """Return the digest that a listing gives a file; empty where it gives none."""
        what = Message("digest", "SHA-256 of {repo}/{name}", repo=repo, name=listed.path)
        return hex_digits(listed.sha256, what, self.endpoint) if listed.sha256 else ""

    def have(self, file: RemoteFile) -> int:
        """Return how many bytes of a file are in the cache; unfinished ones are the library's own matter."""
        path = self.folder / "models" / file.repo.replace("/", "--") / "snapshots" / REVISION / file.name
        return file.size if path.is_file() and path.stat().st_size == file.size else 0

    def fetch(self, file: RemoteFile, report: Report) -> Path:
        """Make a file whole."""

        class Bar(ProgressCallback):
            def update(self, size: int) -> None:
                report(size)

        return self._api.downloader.download_file(
            file.repo,
            "model",
            file.name,
            revision=REVISION,
            expected_sha256=file.digest or None,
            file_size=file.size,
            progress_callbacks=[Bar],
        )

    def explain(self, error: Exception, repo: str) -> DownloadError | None:
        """Return what an error of modelscope_hub means and what to do."""
        # Of requests' errors, those at an address that it cannot use.
        if isinstance(error, ValueError) and (fault := proxies.fault(SOCKS_PACKAGE, SOCKS)):
            return DownloadError(fault)
        text = next((text for kind, text in _MEANINGS if isinstance(error, kind)), None)
        if text is None:
            return None
        what = Message("hub_error", text, where=f"{self.endpoint}/models/{repo}", error=str(error))
        return DownloadError(GOES_ON, what=what, repo=repo)


# In this order: the last is the base class of the others.
_MEANINGS: tuple[tuple[type[Exception] | tuple[type[Exception], ...], str], ...] = (
    (
        (hub_errors.AuthenticationError, hub_errors.PermissionDeniedError),
        "{where} asks for another login: set MODELSCOPE_API_TOKEN to a token that may read it",
    ),
    (hub_errors.NotExistError, "{where} is not there; leave out `--hub modelscope` to ask the Hugging Face Hub"),
    (hub_errors.NetworkError, "{where} cannot be reached, or stopped answering: check the connection and any proxy"),
    (hub_errors.HubError, "{where}: {error}"),
)
