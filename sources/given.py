"""Settings of another system as they were written: {dotted key: value}, of files and of the command line."""

from collections.abc import Mapping
from typing import Any

from configurator import NONES, convert


def is_null(value: Any) -> bool:
    """Whether a value, as a word or as itself, says that there is none."""
    return value is None or isinstance(value, str) and value.lower() in ("", *NONES)


def value_of(given: Mapping[str, Any], name: str, kind: Any = None, default: Any = None) -> Any:
    """What was written last for a name, with or without its sections before it, as a word or in the type `kind`.

    Where it is absent or null, the default. Raises ValueError for a value that is none of that type.
    """
    written = None
    for key, value in given.items():
        if f".{key}".endswith(f".{name}") and value is not None:
            written = value
    if is_null(written):
        return default
    if kind is None:
        return str(written)
    try:
        return convert(written, kind)
    except ValueError as error:
        raise ValueError(f"{name} = {written}: {error}") from error


def is_on(given: Mapping[str, Any], name: str) -> bool:
    """Whether a switch is there and on. Raises ValueError where it is neither on nor off."""
    return value_of(given, name, bool, default=False)
