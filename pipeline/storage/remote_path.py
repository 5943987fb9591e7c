"""The path behind a URL: that of universal_pathlib, with errors that a user can read.

Each kind of store raises errors of its own, and any look at a path may meet one.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from upath.extensions import ProxyUPath

from ..errors import UserError, one_line


def unusable(path: object, error: Exception) -> UserError:
    """What a store raised, as an error of ours."""
    hint = ""
    if isinstance(error, ImportError):
        hint = ": pip install 'qpipe[s3]', or the package that fsspec names for it"
    return UserError(f"{path}: cannot be used: {one_line(error)}{hint}")


def _with_user_errors(
    method: Callable[..., Any], *passed_on: type[Exception]
) -> Callable[..., Any]:
    """A method whose errors are UserErrors, but for those that its callers know of."""

    @wraps(method)
    def call(self: Any, *given: Any, **named: Any) -> Any:
        try:
            found = method(self, *given, **named)
            # a listing is read to its end here, while its errors can be told
            return iter(list(found)) if isinstance(found, Iterator) else found
        except (UserError, *passed_on):
            raise
        except Exception as error:
            raise unusable(self, error) from error

    return call


class RemotePath(ProxyUPath):
    """A path behind a URL."""

    __slots__ = ()

    exists = _with_user_errors(ProxyUPath.exists)
    is_dir = _with_user_errors(ProxyUPath.is_dir)
    is_file = _with_user_errors(ProxyUPath.is_file)
    glob = _with_user_errors(ProxyUPath.glob)
    stat = _with_user_errors(ProxyUPath.stat, FileNotFoundError)
    mkdir = _with_user_errors(ProxyUPath.mkdir)
    unlink = _with_user_errors(ProxyUPath.unlink, FileNotFoundError)

    # in one request, or an object that another process replaces between two could not be read
    read_bytes = _with_user_errors(lambda self: self.fs.cat_file(self.path), FileNotFoundError)

    @_with_user_errors
    def iterdir(self) -> Iterator[Any]:
        """What lies in a folder; nothing where there is none, as buckets have no empty ones."""
        if not self.exists():
            return iter(())
        found = (place.rstrip("/") for place in self.fs.ls(self.path, detail=False))
        own = self.path.rstrip("/")  # that a console made the folder as an object
        return (self / place.rpartition("/")[2] for place in found if place != own)
