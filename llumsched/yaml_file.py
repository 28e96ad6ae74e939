"""YAML of outside: whatever is in a file, there is a value or one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml


class PlainLoader(yaml.SafeLoader):
    """PyYAML's safe loader, with constructors that other packages of the process cannot replace."""


# One of vLLM's dependencies lets the shared loader take dates for text.
PlainLoader.yaml_constructors = {
    **yaml.SafeLoader.yaml_constructors,
    "tag:yaml.org,2002:timestamp": yaml.SafeLoader.construct_yaml_timestamp,
}


class YamlFileError(ValueError):
    """A file cannot be read as YAML; the message is one line, and names the file."""


def read_yaml(path: Path) -> Any:
    """The plain value of a file.

    Raises:
        YamlFileError: the file cannot be read, or is not YAML.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8"), Loader=PlainLoader)
    except OSError as error:
        raise YamlFileError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise YamlFileError(f"{path}: not UTF-8 text: {error}") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else 1
        raise YamlFileError(f"{path}:{line}: not YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # A date that is none, or a number too long, is a ValueError.
        said = " ".join(str(error).split())
        raise YamlFileError(f"{path}: not YAML that can be read: {said}") from error
