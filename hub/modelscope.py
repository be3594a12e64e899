"""ModelScope: what a repository holds there, and one file from it into the ModelScope cache.

modelscope_hub resumes, fetches large files in several ranges, and holds each file against the listing's SHA-256 by
itself; this only brings it into the shape that `download` asks for.

Only `download` uses this.
"""

from __future__ import annotations

from pathlib import Path

from modelscope_hub import FileInfo, HubApi, HubConfig, ProgressCallback, get_default_config
from modelscope_hub import errors as hub_errors

from core.errors import DownloadError
from hub.parts import Part
from hub.remote import RemoteFile, Report, hex_digits, plain_name, wanted

REVISION = "master"


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
        found = [one for one in listed if one.type != "tree" and wanted(part, one.path)]
        if not found:
            raise DownloadError(f"{repo} at {self.endpoint} has no {part.pattern}")
        return [
            RemoteFile(repo, plain_name(one.path, repo, self.endpoint), one.size, self._digest(repo, one))
            for one in found
        ]

    def _digest(self, repo: str, listed: FileInfo) -> str:
        """Return the digest that a listing gives a file; empty where it gives none."""
        what = f"SHA-256 of {repo}/{listed.path}"
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
        """Say what an error of modelscope_hub means and what to do."""
        where = f"{self.endpoint}/models/{repo}"
        if isinstance(error, hub_errors.AuthenticationError | hub_errors.PermissionDeniedError):
            what = f"{where} asks for another login: set MODELSCOPE_API_TOKEN to a token that may read it"
        elif isinstance(error, hub_errors.NotExistError):
            what = f"{where} is not there; leave out `--hub modelscope` to ask the Hugging Face Hub"
        elif isinstance(error, hub_errors.NetworkError):
            what = f"{where} cannot be reached, or stopped answering: check the connection and any proxy"
        elif isinstance(error, hub_errors.HubError):
            what = f"{where}: {error}"
        else:
            return None
        return DownloadError(f"{what}. What has arrived is kept; the same command goes on from there", repo=repo)
