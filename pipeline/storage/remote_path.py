"""The path behind a URL: the path of universal_pathlib, with UserErrors.

Each kind of store raises its own errors, at any use of a path.
"""

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from upath.extensions import ProxyUPath

from ..errors import UserError, one_line


def unusable(path: object, error: Exception) -> UserError:
    """The UserError for an error that a store raised."""
    hint = ""
    if isinstance(error, ImportError):
        hint = ": pip install 'qpipe[s3]', or the package that fsspec names for it"
    return UserError(f"{path}: cannot be used: {one_line(error)}{hint}")


def _with_user_errors(
    method: Callable[..., Any], *passed_on: type[Exception]
) -> Callable[..., Any]:
    """Make the errors of a method UserErrors, except those `passed_on`."""

    @wraps(method)
    def call(self: Any, *given: Any, **named: Any) -> Any:
        try:
            found = method(self, *given, **named)
            # read a listing to its end here, where its errors are handled
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

    # one request: another process may replace the object between two
    read_bytes = _with_user_errors(lambda self: self.fs.cat_file(self.path), FileNotFoundError)

    @_with_user_errors
    def iterdir(self) -> Iterator[Any]:
        """Yield what is in a folder; nothing if it is missing: a bucket has no empty folders."""
        if not self.exists():
            return iter(())
        found = (place.rstrip("/") for place in self.fs.ls(self.path, detail=False))
        own = self.path.rstrip("/")  # the object of a folder made in a web console
        return (self / place.rpartition("/")[2] for place in found if place != own)
