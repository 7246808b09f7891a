"""Names of files and folders that users may write in a configuration."""

from __future__ import annotations

from importlib.resources import files

PACKAGE_SCHEME = "package://"


def resolve_package_path(name: str) -> str:
    """Turn `package://some_package/folder/file` into a path; return any other name unchanged.

    It names data that ships inside an installed Python package, wherever that is installed.

    Args:
        name: a path, a URL, a Hub name, or a `package://` name.

    Returns:
        The path as a string.

    Raises:
        ValueError: the package is not installed, or holds no such file or folder.
    """
    if not name.startswith(PACKAGE_SCHEME):
        return name
    package, _, inner = name[len(PACKAGE_SCHEME) :].partition("/")
    try:
        path = files(package).joinpath(inner)
    except ModuleNotFoundError as error:
        raise ValueError(f"{name!r}: the package {package!r} is not installed") from error
    if not (path.is_file() or path.is_dir()):
        raise ValueError(f"{name!r}: the package {package!r} holds no {inner!r}")
    return str(path)
