"""vLLM's parser of arguments, whose errors are one sentence that names the fix."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from vllm.utils.argparse_utils import FlexibleArgumentParser

from llumsched.flags import nearest, with_hints


class ServeParser(FlexibleArgumentParser):
    """Raises ``ValueError`` where the parser of the standard library ends the process."""

    def __init__(self, **options: Any) -> None:
        options["allow_abbrev"] = False
        super().__init__(**options)  # type: ignore[no-untyped-call]

    def error(self, message: str) -> NoReturn:
        message = with_hints(message, self._option_string_actions)
        raise ValueError(f"{message} (all flags: llumsched serve --help=all)")

    def check_keys(self, document: Mapping[Any, Any], path: Path) -> None:
        """Refuse keys of a file of flags that are none.

        Raises:
            ValueError: naming the file, the key and what may have been meant.
        """
        for key in document:
            flag = f"--{key}".replace("_", "-")
            if flag.partition(".")[0] not in self._option_string_actions:
                near = nearest(flag, self._option_string_actions)
                meant = f"; did you mean {near.removeprefix('--')!r}?" if near else ""
                raise ValueError(f"--config {path}: there is no flag for the key {key!r}{meant}")
