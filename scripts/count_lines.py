"""Lines of Python, all and code alone, a folder: ``python -m scripts.count_lines [REVISION…]``.

Code alone is without docstrings, comments and blank lines. A revision is anything that git names;
the default is HEAD.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from collections import Counter

FOLDERS = ("llumsched", "policies", "simulator", "scripts", "benchmarks", "tests")
NO_CODE = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}


def num_code_lines(source: str) -> int:
    """Lines of a module that hold code."""
    texts: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Expr(value=ast.Constant(value=str())):
                texts |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE and token.string:
            code |= set(range(token.start[0], token.end[0] + 1))
    return len(code - texts)


def git(*arguments: str) -> str:
    """Answer of git."""
    return subprocess.run(("git", *arguments), capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Print a line a folder and revision."""
    for revision in sys.argv[1:] or ["HEAD"]:
        lines: Counter[str] = Counter()
        code: Counter[str] = Counter()
        for path in git("ls-tree", "-r", "--name-only", revision, *FOLDERS).splitlines():
            if path.endswith(".py"):
                source = git("show", f"{revision}:{path}")
                lines[path.split("/")[0]] += source.count("\n")
                code[path.split("/")[0]] += num_code_lines(source)
        for folder in FOLDERS:
            print(f"{revision}  {folder:10}  {lines[folder]:>6,} lines, {code[folder]:>6,} of code")


if __name__ == "__main__":
    main()
